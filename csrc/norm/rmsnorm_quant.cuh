// RMSNorm whose result is divided by a scale and rounded to fp8: what a quantized projection reads next.
#pragma once

#include "norm/rmsnorm.cuh"

namespace flashinfer {

// Grid: ceil(num_rows / rows per block).
template <class Config>
__device__ __forceinline__ void rmsnorm_quant(const NormQuantParams& params) {
  rmsnorm_row<Config>(params.norm, [&] { return params.output_scale.reciprocal(); });
}

}  // namespace flashinfer
