// SPDX-License-Identifier: Apache-2.0
// Searching index arrays.
#pragma once

#include "common.h"

namespace flashinfer {

// The segment that holds element `i`: the last s with indptr[s] <= i, so that empty segments are passed over.
// indptr[num_segments + 1] ascends from 0. Returns num_segments for an element past the end.
template <class Index>
__device__ __forceinline__ int find_segment(const Index* indptr, int num_segments, int64_t i) {
  if (i >= int64_t(indptr[num_segments])) return num_segments;
  int low = 0, high = num_segments;  // indptr[low] <= i < indptr[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (int64_t(indptr[middle]) <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace flashinfer
