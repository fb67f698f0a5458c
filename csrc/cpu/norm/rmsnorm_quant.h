// SPDX-License-Identifier: Apache-2.0
// RMSNorm to fp8 on the CPU: the equations and shapes of norm/rmsnorm_quant.cuh.
#pragma once

#include "cpu/norm/rmsnorm.h"

namespace flashinfer::cpu {

template <class Config>
void rmsnorm_quant(const NormQuantParams& params) {
  rmsnorm_rows<Config>(params.norm, params.output_scale.reciprocal());
}

}  // namespace flashinfer::cpu
