// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "quant_scale.h"

namespace flashinfer {

// Gated activation of a fused gate-and-up projection. Rows come in groups, the same in input and output: row r starts
// at (r / rows_per_group) * group_stride + (r % rows_per_group) * row_stride.
struct ActAndMulParams {
  const void* input;                             // [num_rows, 2 * hidden_size]: gate, then up
  void* output;                                  // [num_rows, hidden_size]
  int64_t input_row_stride, input_group_stride;  // elements, as the other strides
  int64_t output_row_stride, output_group_stride;
  int32_t num_groups, rows_per_group, hidden_size;
};

// The same with an fp8 output.
struct ActAndMulQuantParams {
  QuantScale output_scale;  // output holds the result / scale
  ActAndMulParams act_and_mul;
};

}  // namespace flashinfer
