// Gated activation on the CPU; see activation/act_and_mul.cuh.
#pragma once

#include "activation/gate.h"
#include "activation/params.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

template <class Config>
void act_and_mul(const ActAndMulParams& params) {
  using T = typename Config::T;
#pragma omp parallel for
  for (int row = 0; row < params.num_rows; ++row) {
    const T* gates = static_cast<const T*>(params.input) + row * params.input_stride;
    const T* ups = gates + params.hidden_size;
    T* output = static_cast<T*>(params.output) + row * params.output_stride;
#pragma omp simd
    for (int i = 0; i < params.hidden_size; ++i) {
      output[i] = from_float<T>(gate<Config::kGate>(to_float(gates[i])) * to_float(ups[i]));
    }
  }
}

}  // namespace flashinfer::cpu
