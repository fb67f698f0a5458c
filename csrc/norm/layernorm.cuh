// SPDX-License-Identifier: Apache-2.0
// LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450):
//
//   mean(r)      = sum_j input[r, j] / hidden_size
//   var(r)       = sum_j (input[r, j] − mean(r))² / hidden_size
//   output[r, i] = (input[r, i] − mean(r)) / sqrt(var(r) + eps) · weight[i] + bias[i]
//
//   input, output [num_rows, hidden_size] T      weight, bias [hidden_size] TWeight, usually fp32; all computed in fp32
//
// kThreadsPerRow threads hold a row in registers (norm/row.cuh). The variance is taken around the mean, in a second sum
// over the registers, because mean(x²) − mean(x)² cancels.
#pragma once

#include "device/pdl.cuh"
#include "norm/params.h"
#include "norm/row.cuh"

namespace flashinfer {

// Grid: ceil(num_rows / rows per block).
template <class Config>
__device__ __forceinline__ void layernorm(const NormParams& params) {
  using T = typename Config::T;
  using TWeight = typename Config::TWeight;
  using Fragment = RowFragment<T, Config>;
  __shared__ typename RowSum<Config>::Smem smem;
  RowSum<Config> row_sum{smem};
  const auto [row, thread_idx] = row_of_thread<Config>();
  const bool is_valid = row < params.num_rows;

  wait_for_previous_kernel();
  allow_next_kernel();
  Fragment x{};
  if (is_valid) x.load(input_row<T>(params, row), thread_idx);

  float sum = 0.f;
  Fragment::for_each(thread_idx, [&](int i, int j) { sum += to_float(x.vecs[i][j]); });
  const float mean = row_sum(sum) / Config::kHiddenSize;

  float sum_of_squares = 0.f;
  Fragment::for_each(thread_idx, [&](int i, int j) {
    const float centered = to_float(x.vecs[i][j]) - mean;
    sum_of_squares += centered * centered;
  });
  const float scale = rsqrtf(row_sum(sum_of_squares) / Config::kHiddenSize + params.eps);

  // Weight and bias are usually wider than the row (fp32); read through the cache element by element.
  Fragment::for_each(thread_idx, [&](int i, int j) {
    const int column = (thread_idx + i * Config::kThreadsPerRow) * Config::kVecSize + j;
    const float w = to_float(static_cast<const TWeight*>(params.weight)[column]);
    const float b = to_float(static_cast<const TWeight*>(params.bias)[column]);
    x.vecs[i][j] = from_float<T>((to_float(x.vecs[i][j]) - mean) * scale * w + b);
  });
  if (is_valid) x.store(output_row<T>(params, row), thread_idx);
}

}  // namespace flashinfer
