// SPDX-License-Identifier: Apache-2.0
// Where a token is in a paged cache, on the CPU: the equations of page/token_slots.cuh.
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

template <class Config>
TokenSlot find_slot(const TokenSlots& slots, const SlotBounds& bounds, int token_idx) {
  using TokenIndex = typename Config::TokenIndex;
  using PageIndex = typename Config::PageIndex;
  const int64_t batch_idx = static_cast<const TokenIndex*>(slots.batch_indices)[token_idx];
  const int64_t position = static_cast<const TokenIndex*>(slots.positions)[token_idx];
  if (batch_idx < 0 || batch_idx >= bounds.batch_size || position < 0) return {0, 0, false};
  const PageIndex* page_indptr = static_cast<const PageIndex*>(slots.page_indptr) + batch_idx;
  const int64_t i = int64_t(uint64_t(page_indptr[0]) + uint64_t(position / bounds.page_size));
  if (i < 0 || i >= page_indptr[1] || i >= bounds.num_page_indices) return {0, 0, false};
  const int64_t page_idx = static_cast<const PageIndex*>(slots.page_indices)[i];
  return {page_idx, position % bounds.page_size, page_idx >= 0 && page_idx < bounds.num_pages};
}

inline int64_t row_offset(const HeadStrides& strides, int64_t token_idx, int64_t head_idx) {
  return token_idx * strides.token + head_idx * strides.head;
}

}  // namespace flashinfer::cpu
