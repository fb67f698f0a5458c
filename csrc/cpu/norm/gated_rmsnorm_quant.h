// SPDX-License-Identifier: Apache-2.0
// Gated RMSNorm to fp8 on the CPU: the equations and shapes of norm/gated_rmsnorm_quant.cuh.
#pragma once

#include "cpu/norm/gated_rmsnorm.h"

namespace flashinfer::cpu {

template <class Config>
void gated_rmsnorm_quant(const NormQuantParams& params) {
  gated_rmsnorm_rows<Config>(params.norm, params.output_scale.reciprocal());
}

}  // namespace flashinfer::cpu
