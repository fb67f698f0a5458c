// SPDX-License-Identifier: Apache-2.0
// Warp and block reductions. Every thread of the block must call them; every thread receives the result.
#pragma once

#include "common.h"

namespace flashinfer {

constexpr int kWarpSize = 32;

struct Sum {
  __device__ __forceinline__ static float identity() { return 0.f; }
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  __device__ __forceinline__ static float identity() { return __int_as_float(0xff800000); }  // -infinity
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Butterfly over groups of kWidth consecutive lanes.
template <int kWidth = kWarpSize, class Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// N sums, each over a group of kWidth consecutive lanes, in the shuffles of two: lane l of a group receives that of
// values[l / (kWidth / N)]. Overwrites the values.
template <int kWidth, int N>
__device__ __forceinline__ float warp_sums(float (&values)[N]) {
  static_assert(N <= kWidth && (N & (N - 1)) == 0 && (kWidth & (kWidth - 1)) == 0);
  // Lanes that differ in one bit share their values out, each adding what it keeps to what it is given.
  int offset = kWidth / 2;
#pragma unroll
  for (int kept = N / 2; kept > 0; kept /= 2, offset /= 2) {
    const bool is_upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = is_upper ? values[i] : values[i + kept];
      values[i] = (is_upper ? values[i + kept] : values[i]) + __shfl_xor_sync(0xffffffffu, given, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
  return values[0];
}

// scratch_smem holds one float per warp. Ends with a barrier before the scratch is read, none after: two reductions
// in a row need two scratch arrays or a __syncthreads() between them.
template <int kNumThreads, class Op>
__device__ __forceinline__ float block_reduce(float x, Op op, float* scratch_smem) {
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  static_assert(kNumThreads % kWarpSize == 0 && kNumWarps <= kWarpSize);
  x = warp_reduce(x, op);
  if constexpr (kNumWarps == 1) return x;
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  if (lane_idx == 0) scratch_smem[warp_idx] = x;
  __syncthreads();
  x = lane_idx < kNumWarps ? scratch_smem[lane_idx] : Op::identity();
  return warp_reduce(x, op);
}

}  // namespace flashinfer
