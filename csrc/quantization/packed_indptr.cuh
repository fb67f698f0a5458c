// SPDX-License-Identifier: Apache-2.0
// Where each segment's bytes begin once it is packed from a byte of its own:
//
//   packed_indptr[s] = sum_{t < s} ceil(max(indptr[t + 1] − indptr[t], 0) / 8)
//
//   indptr [num_segments + 1] Index, in booleans      packed_indptr [num_segments + 1] Index, in bytes
//
// One block, which walks the segments in strips of its width and carries the sum along; there are as many segments as
// requests in a batch.
#pragma once

#include "device/pdl.cuh"
#include "device/reduce.cuh"
#include "quantization/params.h"

namespace flashinfer {

// Sum of x over the threads up to and including this one; block_sum receives the sum over all.
template <int kNumThreads>
__device__ __forceinline__ int64_t block_inclusive_sum(int64_t x, int64_t (&warp_sums_smem)[kNumThreads / kWarpSize],
                                                       int64_t& block_sum) {
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane_idx >= offset) x += below;
  }
  __syncthreads();  // the sums of the strip before have been read
  if (lane_idx == kWarpSize - 1) warp_sums_smem[warp_idx] = x;
  __syncthreads();
  block_sum = 0;
  int64_t before = 0;
#pragma unroll
  for (int i = 0; i < kNumThreads / kWarpSize; ++i) {
    if (i == warp_idx) before = block_sum;
    block_sum += warp_sums_smem[i];
  }
  return before + x;
}

template <class Config>
__device__ __forceinline__ void packed_indptr(const PackedIndptrParams& params) {
  using Index = typename Config::Index;
  __shared__ int64_t warp_sums_smem[Config::kNumThreads / kWarpSize];
  wait_for_previous_kernel();
  allow_next_kernel();
  const Index* indptr = static_cast<const Index*>(params.indptr);
  Index* packed = static_cast<Index*>(params.packed_indptr);
  if (threadIdx.x == 0) packed[0] = 0;
  int64_t carried = 0;
  for (int strip = 0; strip < params.num_segments; strip += Config::kNumThreads) {
    const int segment_idx = strip + threadIdx.x;
    const bool exists = segment_idx < params.num_segments;
    const int64_t length = exists ? max(int64_t(indptr[segment_idx + 1]) - indptr[segment_idx], int64_t(0)) : 0;
    int64_t strip_sum;
    const int64_t sum = block_inclusive_sum<Config::kNumThreads>(ceil_div(length, 8), warp_sums_smem, strip_sum);
    if (exists) packed[segment_idx + 1] = Index(carried + sum);
    carried += strip_sum;
  }
}

}  // namespace flashinfer
