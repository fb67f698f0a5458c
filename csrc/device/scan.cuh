// SPDX-License-Identifier: Apache-2.0
// Sums over the threads of a block.
//
//   before of thread i = sum of the values of threads j < i
//   total              = sum of the values of all threads
#pragma once

#include "device/reduce.cuh"

namespace flashinfer {

// Over a warp: the sum of this lane's value and those of the lanes before it. By all of its lanes.
template <class T>
__device__ __forceinline__ T inclusive_warp_sum(T value) {
  const int lane_idx = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane_idx >= offset) value += before;
  }
  return value;
}

template <class T>
struct Scan {
  T before, total;
};

// By all threads. A warp scans by shuffles and leaves its sum to the others in warp_sums, which is shared.
template <int kNumThreads, class T>
__device__ __forceinline__ Scan<T> scan_block(T value, T (&warp_sums)[kWarpSize]) {
  static_assert(kNumThreads <= kWarpSize * kWarpSize);
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  const T inclusive = inclusive_warp_sum(value);
  __syncthreads();  // the sums of the scan before this one have been read
  if (lane_idx == kWarpSize - 1) warp_sums[warp_idx] = inclusive;
  __syncthreads();
  Scan<T> scan{inclusive - value, 0};
#pragma unroll
  for (int w = 0; w < kNumThreads / kWarpSize; ++w) {
    const T sum = warp_sums[w];
    scan.before += w < warp_idx ? sum : 0;
    scan.total += sum;
  }
  return scan;
}

}  // namespace flashinfer
