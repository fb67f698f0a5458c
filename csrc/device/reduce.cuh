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
