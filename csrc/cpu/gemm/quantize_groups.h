// SPDX-License-Identifier: Apache-2.0
// Rows to 8 bits with a scale for each 128 elements, on the CPU: gemm/quantize_groups.cuh.
#pragma once

#include "cpu/types.h"
#include "gemm/params.h"

namespace flashinfer::cpu {

template <class Config>
void quantize_groups(const QuantizeGroupsParams& params) {
  using T = typename Config::T;
  const int32_t num_blocks = params.num_columns / kScaleBlock;
#pragma omp parallel for if (int64_t(params.num_rows) * params.num_columns >= kMinParallelElements)
  for (int32_t row = 0; row < params.num_rows; ++row) {
    const T* input = static_cast<const T*>(params.input) + row * params.input_row_stride;
    fp8_e4m3* output = static_cast<fp8_e4m3*>(params.output) + int64_t(row) * params.num_columns;
    for (int32_t block = 0; block < num_blocks; ++block, input += kScaleBlock, output += kScaleBlock) {
      float largest = 0.f;
      for (int i = 0; i < kScaleBlock; ++i) {
        const float size = __builtin_fabsf(to_float(input[i]));
        largest = size > largest ? size : largest;
      }
      const float scale = scale_of_block(largest);
      for (int i = 0; i < kScaleBlock; ++i) output[i] = from_float<fp8_e4m3>(to_float(input[i]) / scale);
      params.scale[int64_t(block) * params.num_rows + row] = scale;
    }
  }
}

}  // namespace flashinfer::cpu
