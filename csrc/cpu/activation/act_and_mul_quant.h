// Gated activation with an fp8 output on the CPU.
#pragma once

#include "cpu/activation/act_and_mul.h"

namespace flashinfer::cpu {

template <class Config>
void act_and_mul_quant(const ActAndMulQuantParams& params) {
  act_and_mul_rows<Config>(params.act_and_mul, params.output_scale.reciprocal());
}

}  // namespace flashinfer::cpu
