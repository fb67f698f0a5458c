// Locating tokens in a paged cache (CPU).
#pragma once

#include "page/params.h"

namespace flashinfer::cpu {

struct TokenSlot {
  int64_t page_idx, slot_idx;
  bool exists;

  int64_t offset(const CacheStrides& strides, int64_t head_idx) const {
    return page_idx * strides.page + slot_idx * strides.slot + head_idx * strides.head;
  }
};

template <class TokenIndex, class PageIndex>
TokenSlot find_slot(const TokenSlots& slots, int token_idx) {
  const int64_t batch_idx = static_cast<const TokenIndex*>(slots.batch_indices)[token_idx];
  const int64_t position = static_cast<const TokenIndex*>(slots.positions)[token_idx];
  if (batch_idx < 0 || batch_idx >= slots.batch_size || position < 0) return {0, 0, false};
  const PageIndex* page_indptr = static_cast<const PageIndex*>(slots.page_indptr);
  const int64_t page_idx_pos = int64_t(page_indptr[batch_idx]) + position / slots.page_size;
  if (page_idx_pos >= int64_t(page_indptr[batch_idx + 1])) return {0, 0, false};
  const int64_t page_idx = static_cast<const PageIndex*>(slots.page_indices)[page_idx_pos];
  return {page_idx, position % slots.page_size, page_idx >= 0};
}

inline int64_t row_offset(const HeadStrides& strides, int64_t token_idx, int64_t head_idx) {
  return token_idx * strides.token + head_idx * strides.head;
}

}  // namespace flashinfer::cpu
