#pragma once

#include "common.h"
#include "quant_scale.h"

namespace flashinfer {

// Gated activation of a fused gate-and-up projection.
struct ActAndMulParams {
  const void* input;                    // [num_rows, 2 * hidden_size]: gate, then up
  void* output;                         // [num_rows, hidden_size]
  int64_t input_stride, output_stride;  // elements between rows
  int32_t num_rows, hidden_size;
};

// The same with an fp8 output.
struct ActAndMulQuantParams {
  QuantScale output_scale;  // output holds the result / scale
  ActAndMulParams act_and_mul;
};

}  // namespace flashinfer
