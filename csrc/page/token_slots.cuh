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

// A token's place as the caller gives it. Apart from find_slot, so that a kernel can issue these loads first, then its
// larger ones, and only then wait.
struct TokenPlace {
  int64_t batch_idx, position;

  template <class TokenIndex>
  __device__ __forceinline__ static TokenPlace load(const TokenSlots& slots, int token_idx) {
    return {static_cast<const TokenIndex*>(slots.batch_indices)[token_idx],
            static_cast<const TokenIndex*>(slots.positions)[token_idx]};
  }
};

template <class PageIndex>
__device__ __forceinline__ TokenSlot find_slot(const TokenSlots& slots, const TokenPlace& place) {
  const auto [batch_idx, position] = place;
  if (batch_idx < 0 || batch_idx >= slots.batch_size || position < 0) return {0, 0, false};
  const PageIndex* page_indptr = static_cast<const PageIndex*>(slots.page_indptr) + batch_idx;
  const PageIndex first = page_indptr[0], end = page_indptr[1];
  // A position fits 32 bits (it counts tokens of one request), and a 32-bit division is several times cheaper.
  const uint32_t page_of_request = uint32_t(position) / uint32_t(slots.page_size);
  const int64_t i = int64_t(first) + page_of_request;
  if (i >= int64_t(end)) return {0, 0, false};
  const int64_t page_idx = static_cast<const PageIndex*>(slots.page_indices)[i];
  return {page_idx, int32_t(uint32_t(position) - page_of_request * uint32_t(slots.page_size)), page_idx >= 0};
}

}  // namespace flashinfer
