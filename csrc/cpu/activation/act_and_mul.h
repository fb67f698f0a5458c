// SPDX-License-Identifier: Apache-2.0
// Gated activation on the CPU: the equations and shapes of activation/act_and_mul.cuh. A row a thread.
#pragma once

#include "activation/gate.h"
#include "activation/params.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

template <class Config>
void act_and_mul_rows(const ActAndMulParams& params, float output_scale) {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
  const int64_t num_rows = int64_t(params.num_groups) * params.rows_per_group;
#pragma omp parallel for if (num_rows * params.hidden_size >= kMinParallelElements)
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t group_idx = row / params.rows_per_group, row_idx = row % params.rows_per_group;
    const T* gates =
        static_cast<const T*>(params.input) + group_idx * params.input_group_stride + row_idx * params.input_row_stride;
    const T* ups = gates + params.hidden_size;
    OutT* output =
        static_cast<OutT*>(params.output) + group_idx * params.output_group_stride + row_idx * params.output_row_stride;
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
