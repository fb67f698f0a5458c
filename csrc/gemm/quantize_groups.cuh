// SPDX-License-Identifier: Apache-2.0
// Rows of 16 bits to fp8 (e4m3) with a scale for each 128 elements, the left operand of a scaled product:
//
//   scale[j, r] = max_i |input[r, 128 j + i]| / 448        output[r, 128 j + i] = input[r, 128 j + i] / scale[j, r]
//
//   input [num_rows, num_columns] T      output [num_rows, num_columns] e4m3      scale [num_columns / 128, num_rows]
//
// Memory-bound: a lane has 8 elements, 16 lanes a block of 128.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "gemm/params.h"

namespace flashinfer {

// Grid: ceil(num_rows · num_columns / (8 kNumThreads)).
template <class Config>
__device__ __forceinline__ void quantize_groups(const QuantizeGroupsParams& params) {
  using T = typename Config::T;
  constexpr int kVecSize = 8, kLanes = kScaleBlock / kVecSize;
  const int32_t num_blocks = params.num_columns / kScaleBlock;
  const int64_t group = (int64_t(blockIdx.x) * Config::kNumThreads + threadIdx.x) / kLanes;
  const int32_t row = int32_t(group / num_blocks), block = int32_t(group % num_blocks);
  const int32_t column = block * kScaleBlock + threadIdx.x % kLanes * kVecSize;
  wait_for_previous_kernel();
  allow_next_kernel();

  const bool exists = row < params.num_rows;
  Vec<T, kVecSize> input{};
  if (exists) {
    input = Vec<T, kVecSize>::load(static_cast<const T*>(params.input) + row * params.input_row_stride + column);
  }
  float x[kVecSize], largest = 0.f;
  to_floats(input, x);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if (!exists) return;
  const float scale = scale_of_block(largest);
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) x[i] /= scale;
  cast_vec<fp8_e4m3>(x).store(static_cast<fp8_e4m3*>(params.output) + int64_t(row) * params.num_columns + column);
  if (threadIdx.x % kLanes == 0) params.scale[int64_t(block) * params.num_rows + row] = scale;
}

}  // namespace flashinfer
