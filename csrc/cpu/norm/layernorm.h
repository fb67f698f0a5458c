// SPDX-License-Identifier: Apache-2.0
// LayerNorm on the CPU: the equations and shapes of norm/layernorm.cuh. A row a thread, as floats in its own memory.
#pragma once

#include "cpu/types.h"
#include "norm/params.h"

namespace flashinfer::cpu {

template <class Config>
void layernorm(const NormParams& params) {
  using T = typename Config::T;
  using TWeight = typename Config::TWeight;
  constexpr int kHiddenSize = Config::kHiddenSize;
  const TWeight* weight = static_cast<const TWeight*>(params.weight);
  const TWeight* bias = static_cast<const TWeight*>(params.bias);

#pragma omp parallel for if (int64_t(params.num_rows) * kHiddenSize >= kMinParallelElements)
  for (int row = 0; row < params.num_rows; ++row) {
    const T* input = input_row<T>(params, row);
    T* output = output_row<T>(params, row);
    float x[kHiddenSize];
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kHiddenSize; ++i) {
      x[i] = to_float(input[i]);
      sum += x[i];
    }
    const float mean = sum / kHiddenSize;
    float sum_of_squares = 0.f;
#pragma omp simd reduction(+ : sum_of_squares)
    for (int i = 0; i < kHiddenSize; ++i) {
      x[i] -= mean;
      sum_of_squares += x[i] * x[i];
    }
    const float scale = 1.f / __builtin_sqrtf(sum_of_squares / kHiddenSize + params.eps);
#pragma omp simd
    for (int i = 0; i < kHiddenSize; ++i) {
      output[i] = from_float<T>(x[i] * scale * to_float(weight[i]) + to_float(bias[i]));
    }
  }
}

}  // namespace flashinfer::cpu
