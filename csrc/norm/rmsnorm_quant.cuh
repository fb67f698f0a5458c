// SPDX-License-Identifier: Apache-2.0
// RMSNorm to fp8, as a quantized projection reads it. With y what rmsnorm.cuh calls output, before it is rounded,
//
//   output[r, i] = fp8(y[r, i] / output_scale)       to nearest even, at most the largest finite value
//
//   output [num_rows, hidden_size] OutT, fp8_e4m3 or fp8_e5m2       output_scale: one number (quant_scale.h)
//
// The reciprocal of the scale is folded into the factor of the row, so an element is rounded once.
#pragma once

#include "norm/rmsnorm.cuh"

namespace flashinfer {

// Grid: ceil(num_rows / rows per block).
template <class Config>
__device__ __forceinline__ void rmsnorm_quant(const NormQuantParams& params) {
  rmsnorm_row<Config>(params.norm, [&] { return params.output_scale.reciprocal(); });
}

}  // namespace flashinfer
