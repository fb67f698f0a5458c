// SPDX-License-Identifier: Apache-2.0
// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of the heads of a linear attention, and the gate of its output:
//
//   output[r, i] = input[r, i] · weight[i] / sqrt(sum_j input[r, j]² / hidden_size + eps) · silu(gate[r, i])
//
//   input, gate [num_rows, hidden_size] T      weight [hidden_size] T      output [num_rows, hidden_size] OutT
//
// OutT is T (gated_rmsnorm_quant.cuh: fp8). The gate has the place of NormParams::residual. Rows are short, so a few
// threads have one (norm/row.cuh), and what hides the latency are the other rows of the block and the SM.
#pragma once

#include "activation/gate.h"
#include "device/pdl.cuh"
#include "norm/params.h"
#include "norm/row.cuh"

namespace flashinfer {

// output_scale() multiplies the result; it may read memory that the previous kernel wrote.
template <class Config, class OutputScale>
__device__ __forceinline__ void gated_rmsnorm_row(const NormParams& params, OutputScale output_scale) {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
  using Fragment = RowFragment<T, Config>;
  __shared__ typename RowSum<Config>::Smem smem;
  const auto [row, thread_idx] = row_of_thread<Config>();
  const bool is_valid = row < params.num_rows;

  wait_for_previous_kernel();
  allow_next_kernel();
  Fragment x{}, gates{}, weight{};
  if (is_valid) {
    x.load(input_row<T>(params, row), thread_idx);
    gates.load(residual_row<T>(params, row), thread_idx);
    weight.load(static_cast<const T*>(params.weight), thread_idx);
  }
  float sum = 0.f;
  Fragment::for_each(thread_idx, [&](int i, int j) { sum += to_float(x.vecs[i][j]) * to_float(x.vecs[i][j]); });
  const float scale = rsqrtf(RowSum<Config>{smem}(sum) / Config::kHiddenSize + params.eps) * output_scale();
  RowFragment<OutT, Config> output;
  Fragment::for_each(thread_idx, [&](int i, int j) {
    const float normalized = to_float(x.vecs[i][j]) * scale * to_float(weight.vecs[i][j]);
    output.vecs[i][j] = from_float<OutT>(normalized * gate<kSilu>(to_float(gates.vecs[i][j])));
  });
  if (is_valid) output.store(output_row<OutT>(params, row), thread_idx);
}

// Grid: ceil(num_rows / rows per block).
template <class Config>
__device__ __forceinline__ void gated_rmsnorm(const NormParams& params) {
  gated_rmsnorm_row<Config>(params, [] { return 1.f; });
}

}  // namespace flashinfer
