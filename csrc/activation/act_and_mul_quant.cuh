// SPDX-License-Identifier: Apache-2.0
// Gated activation to fp8, as a quantized projection reads it. With y what act_and_mul.cuh calls output, not yet
// rounded,
//
//   output[r, i] = fp8(y[r, i] / output_scale)       to nearest even, at most the largest finite value
//
//   output [num_groups, rows_per_group, hidden_size] OutT, fp8_e4m3 or fp8_e5m2       output_scale: one number
//
// The same kernel: the reciprocal of the scale is one factor more, and an element is rounded once.
#pragma once

#include "activation/act_and_mul.cuh"

namespace flashinfer {

// Grid: as act_and_mul.
template <class Config>
__device__ __forceinline__ void act_and_mul_quant(const ActAndMulQuantParams& params) {
  act_and_mul_row<Config>(params.act_and_mul, [&] { return params.output_scale.reciprocal(); });
}

}  // namespace flashinfer
