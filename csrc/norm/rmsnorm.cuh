// SPDX-License-Identifier: Apache-2.0
// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), adding a residual first or not, with Gemma's weight or not:
//
//   x[r, i]        = input[r, i]                            kAddResidual: input[r, i] + residual[r, i]
//   output[r, i]   = x[r, i] · weight[i] / sqrt(sum_j x[r, j]² / hidden_size + eps)      kGemma: (1 + weight[i])
//   residual[r, i] = x[r, i]                                kAddResidual only
//
//   input, residual [num_rows, hidden_size] T      weight [hidden_size] T      output [num_rows, hidden_size] OutT
//
// T is fp16, bf16 or fp32, and OutT is T (rmsnorm_quant.cuh: fp8). x stays fp32, also where residual receives it
// rounded.
//
// kThreadsPerRow threads hold a row in registers (norm/row.cuh), a whole block or a part of a warp: one reading, one
// sum, one writing. What hides the latency of a row is the other blocks on the SM.
#pragma once

#include "device/pdl.cuh"
#include "norm/params.h"
#include "norm/row.cuh"

namespace flashinfer {

template <class Config>
struct RmsNormRow {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
  using Fragment = RowFragment<T, Config>;
  Fragment input;
  Fragment residual;

  __device__ __forceinline__ void load(const NormParams& params, int row, int thread_idx) {
    input.load(input_row<T>(params, row), thread_idx);
    if constexpr (Config::kAddResidual) {
      residual.load(residual_row<T>(params, row), thread_idx);
    }
  }

  // The normalized value before rounding: the sum keeps the precision that the stored residual loses.
  __device__ __forceinline__ float value(int i, int j) const {
    const float x = to_float(input.vecs[i][j]);
    return Config::kAddResidual ? x + to_float(residual.vecs[i][j]) : x;
  }

  __device__ __forceinline__ float sum_of_squares(int thread_idx) const {
    float sum = 0.f;
    Fragment::for_each(thread_idx, [&](int i, int j) { sum += value(i, j) * value(i, j); });
    return sum;
  }

  __device__ __forceinline__ void store(const NormParams& params, int row, int thread_idx, const Fragment& weight,
                                        float scale) {
    RowFragment<OutT, Config> output;
    Fragment::for_each(thread_idx, [&](int i, int j) {
      const float x = value(i, j), w = to_float(weight.vecs[i][j]) + (Config::kGemma ? 1.f : 0.f);
      output.vecs[i][j] = from_float<OutT>(x * scale * w);
      if constexpr (Config::kAddResidual) residual.vecs[i][j] = from_float<T>(x);
    });
    if constexpr (Config::kAddResidual) {
      residual.store(residual_row<T>(params, row), thread_idx);
    }
    output.store(output_row<OutT>(params, row), thread_idx);
  }
};

// output_scale() multiplies the result; it may read memory that the previous kernel wrote.
template <class Config, class OutputScale>
__device__ __forceinline__ void rmsnorm_row(const NormParams& params, OutputScale output_scale) {
  using Row = RmsNormRow<Config>;
  __shared__ typename RowSum<Config>::Smem smem;
  const auto [row, thread_idx] = row_of_thread<Config>();
  const bool is_valid = row < params.num_rows;

  wait_for_previous_kernel();
  allow_next_kernel();
  Row x{};
  typename Row::Fragment weight;
  if (is_valid) {
    x.load(params, row, thread_idx);
    weight.load(static_cast<const typename Config::T*>(params.weight), thread_idx);  // in flight during the sum
  }
  const float sum = RowSum<Config>{smem}(x.sum_of_squares(thread_idx));
  const float scale = rsqrtf(sum / Config::kHiddenSize + params.eps) * output_scale();
  if (is_valid) x.store(params, row, thread_idx, weight, scale);
}

// Grid: ceil(num_rows / rows per block).
template <class Config>
__device__ __forceinline__ void rmsnorm(const NormParams& params) {
  rmsnorm_row<Config>(params, [] { return 1.f; });
}

}  // namespace flashinfer
