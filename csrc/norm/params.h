#pragma once

#include "common.h"

namespace flashinfer {

// RMSNorm and LayerNorm over the last axis, with an optional residual added first.
struct NormParams {
  const void* input;   // [num_rows, hidden_size]; with a residual also the output (in place)
  void* residual;      // [num_rows, hidden_size] or null; read, then overwritten with input + residual
  const void* weight;  // [hidden_size]
  const void* bias;    // [hidden_size] or null (LayerNorm)
  void* output;        // [num_rows, hidden_size]
  int64_t input_stride, residual_stride, output_stride;  // elements between rows
  int32_t num_rows;
  float eps;
};

}  // namespace flashinfer
