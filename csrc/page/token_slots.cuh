// SPDX-License-Identifier: Apache-2.0
// Where token t of request b, at position p, is in a paged cache, and whether it is anywhere:
//
//   page = page_indices[page_indptr[b] + p / page_size]           slot = p % page_size
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

// Whether 0 <= i < count, in one comparison.
__device__ __forceinline__ bool is_below(int64_t i, int32_t count) {
  return uint64_t(i) < uint64_t(uint32_t(count));
}

template <class PageIndex>
__device__ __forceinline__ TokenSlot find_slot(const TokenSlots& slots, const SlotBounds& bounds,
                                               const TokenPlace& place) {
  const auto [batch_idx, position] = place;
  // A position fits 32 bits (it counts tokens of one request), and a 32-bit division is several times cheaper.
  constexpr int32_t kMaxPosition = 0x7fffffff;
  if (!is_below(batch_idx, bounds.batch_size) || !is_below(position, kMaxPosition)) return {0, 0, false};
  const PageIndex* page_indptr = static_cast<const PageIndex*>(slots.page_indptr) + batch_idx;
  const PageIndex first = page_indptr[0], end = page_indptr[1];
  const uint32_t page_of_request = uint32_t(position) / uint32_t(bounds.page_size);
  const int64_t i = int64_t(uint64_t(first) + page_of_request);
  if (i >= int64_t(end) || !is_below(i, bounds.num_page_indices)) return {0, 0, false};
  const int64_t page_idx = static_cast<const PageIndex*>(slots.page_indices)[i];
  return {page_idx, int32_t(uint32_t(position) - page_of_request * uint32_t(bounds.page_size)),
          is_below(page_idx, bounds.num_pages)};
}

}  // namespace flashinfer
