// Locating tokens in a paged cache.
#pragma once

#include "page/params.h"

namespace flashinfer {

struct TokenSlot {
  int64_t page_idx;
  int32_t slot_idx;
  bool exists;

  // Of the slot's first head, in elements.
  __device__ __forceinline__ int64_t offset(const CacheStrides& strides) const {
    return page_idx * strides.page + slot_idx * strides.slot;
  }
};

template <class TokenIndex, class PageIndex>
__device__ __forceinline__ TokenSlot find_slot(const TokenSlots& slots, int token_idx) {
  const int64_t batch_idx = static_cast<const TokenIndex*>(slots.batch_indices)[token_idx];
  const int64_t position = static_cast<const TokenIndex*>(slots.positions)[token_idx];
  if (batch_idx < 0 || batch_idx >= slots.batch_size || position < 0) return {0, 0, false};
  const PageIndex* page_indptr = static_cast<const PageIndex*>(slots.page_indptr);
  // A position fits 32 bits (it counts tokens of one request), and a 32-bit division is several times cheaper.
  const uint32_t page_of_request = uint32_t(position) / uint32_t(slots.page_size);
  const int64_t page_idx_pos = int64_t(page_indptr[batch_idx]) + page_of_request;
  if (page_idx_pos >= int64_t(page_indptr[batch_idx + 1])) return {0, 0, false};
  const int64_t page_idx = static_cast<const PageIndex*>(slots.page_indices)[page_idx_pos];
  return {page_idx, int32_t(uint32_t(position) - page_of_request * uint32_t(slots.page_size)), page_idx >= 0};
}

}  // namespace flashinfer
