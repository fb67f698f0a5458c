// Gated activation whose result is divided by a scale and rounded to fp8.
#pragma once

#include "activation/act_and_mul.cuh"

namespace flashinfer {

// Grid: as act_and_mul.
template <class Config>
__device__ __forceinline__ void act_and_mul_quant(const ActAndMulQuantParams& params) {
  act_and_mul_row<Config>(params.act_and_mul, [&] { return params.output_scale.reciprocal(); });
}

}  // namespace flashinfer
