// SPDX-License-Identifier: Apache-2.0
// Gated activation to fp8 on the CPU: the equations and shapes of activation/act_and_mul_quant.cuh.
#pragma once

#include "cpu/activation/act_and_mul.h"

namespace flashinfer::cpu {

template <class Config>
void act_and_mul_quant(const ActAndMulQuantParams& params) {
  act_and_mul_rows<Config>(params.act_and_mul, params.output_scale.reciprocal());
}

}  // namespace flashinfer::cpu
