// SPDX-License-Identifier: Apache-2.0
// Booleans, eight to a byte, on the CPU: the equation and shapes of quantization/packbits.cuh.
#pragma once

#include "cpu/quantization/pack_byte.h"
#include "quantization/params.h"

namespace flashinfer::cpu {

template <class Config>
void packbits(const PackbitsParams& params) {
  const int64_t num_full = params.num_elements / 8;
#pragma omp parallel for if (num_full > 4096)
  for (int64_t i = 0; i < num_full; ++i) params.output[i] = pack_byte<Config::kBigEndian>(params.input + 8 * i, 8);
  if (params.num_elements % 8 != 0) {
    params.output[num_full] = pack_byte<Config::kBigEndian>(params.input + 8 * num_full, params.num_elements % 8);
  }
}

}  // namespace flashinfer::cpu
