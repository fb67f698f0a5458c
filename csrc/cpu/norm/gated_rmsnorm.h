// SPDX-License-Identifier: Apache-2.0
// Gated RMSNorm on the CPU: the equations and shapes of norm/gated_rmsnorm.cuh. A row a thread, as floats in its own
// memory.
#pragma once

#include "activation/gate.h"
#include "cpu/types.h"
#include "norm/params.h"

namespace flashinfer::cpu {

template <class Config>
void gated_rmsnorm_rows(const NormParams& params, float output_scale) {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
  constexpr int kHiddenSize = Config::kHiddenSize;
  const T* weight = static_cast<const T*>(params.weight);

#pragma omp parallel for if (int64_t(params.num_rows) * kHiddenSize >= kMinParallelElements)
  for (int row = 0; row < params.num_rows; ++row) {
    const T* input = input_row<T>(params, row);
    const T* gates = residual_row<T>(params, row);
    OutT* output = output_row<OutT>(params, row);
    float x[kHiddenSize];
    float sum_of_squares = 0.f;
#pragma omp simd reduction(+ : sum_of_squares)
    for (int i = 0; i < kHiddenSize; ++i) {
      x[i] = to_float(input[i]);
      sum_of_squares += x[i] * x[i];
    }
    const float scale = 1.f / __builtin_sqrtf(sum_of_squares / kHiddenSize + params.eps) * output_scale;
#pragma omp simd
    for (int i = 0; i < kHiddenSize; ++i) {
      output[i] = from_float<OutT>(x[i] * scale * to_float(weight[i]) * gate<kSilu>(to_float(gates[i])));
    }
  }
}

template <class Config>
void gated_rmsnorm(const NormParams& params) {
  gated_rmsnorm_rows<Config>(params, 1.f);
}

}  // namespace flashinfer::cpu
