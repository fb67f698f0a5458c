// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "fast_divisor.h"
#include "quant_scale.h"

namespace flashinfer {

// RMSNorm and LayerNorm over the last axis, with an optional residual added first.
// Rows come in groups, the same in every operand, so that the heads of a packed qkv projection can be normalized in
// place: row r starts at (r / rows_per_group) * group_stride + (r % rows_per_group) * row_stride.
struct NormParams {
  const void* input;   // [num_rows, hidden_size]
  void* residual;      // [num_rows, hidden_size] or null; read, then overwritten with input + residual; or a gate, read
  const void* weight;  // [hidden_size]
  const void* bias;    // [hidden_size] or null (LayerNorm)
  void* output;        // [num_rows, hidden_size]; may be input
  int64_t input_row_stride, input_group_stride;  // elements, as the other strides
  int64_t residual_row_stride, residual_group_stride;
  int64_t output_row_stride, output_group_stride;
  int32_t num_rows;
  FastDivisor rows_per_group;
  float eps;
};

// RMSNorm with an fp8 output.
struct NormQuantParams {
  QuantScale output_scale;  // output holds the result / scale
  NormParams norm;
};

FLASHINFER_HOST_DEVICE inline int64_t grouped_row_offset(const NormParams& params, int32_t row, int64_t row_stride,
                                                         int64_t group_stride) {
  const int32_t group = params.rows_per_group.divide(row);
  return group * group_stride + (row - group * int32_t(params.rows_per_group.divisor)) * row_stride;
}
template <class T>
FLASHINFER_HOST_DEVICE const T* input_row(const NormParams& params, int32_t row) {
  return static_cast<const T*>(params.input) +
         grouped_row_offset(params, row, params.input_row_stride, params.input_group_stride);
}
template <class T>
FLASHINFER_HOST_DEVICE T* output_row(const NormParams& params, int32_t row) {
  return static_cast<T*>(params.output) +
         grouped_row_offset(params, row, params.output_row_stride, params.output_group_stride);
}
template <class T>
FLASHINFER_HOST_DEVICE T* residual_row(const NormParams& params, int32_t row) {
  return static_cast<T*>(params.residual) +
         grouped_row_offset(params, row, params.residual_row_stride, params.residual_group_stride);
}

}  // namespace flashinfer
