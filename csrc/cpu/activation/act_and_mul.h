// Gated activation on the CPU; see activation/act_and_mul.cuh.
#pragma once

#include "activation/gate.h"
#include "activation/params.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

template <class Config>
void act_and_mul_rows(const ActAndMulParams& params, float output_scale) {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
#pragma omp parallel for if (int64_t(params.num_rows) * params.hidden_size >= kMinParallelElements)
  for (int row = 0; row < params.num_rows; ++row) {
    const T* gates = static_cast<const T*>(params.input) + row * params.input_stride;
    const T* ups = gates + params.hidden_size;
    OutT* output = static_cast<OutT*>(params.output) + row * params.output_stride;
#pragma omp simd
    for (int i = 0; i < params.hidden_size; ++i) {
      output[i] = from_float<OutT>(gate<Config::kGate>(to_float(gates[i])) * to_float(ups[i]) * output_scale);
    }
  }
}

template <class Config>
void act_and_mul(const ActAndMulParams& params) {
  act_and_mul_rows<Config>(params, 1.f);
}

}  // namespace flashinfer::cpu
