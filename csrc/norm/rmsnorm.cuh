// RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), optionally adding a residual first and Gemma's (1 + weight):
//
//   x        = input                              or  x = residual = input + residual
//   output_i = x_i / sqrt(mean(x²) + eps) · weight_i   (Gemma: · (1 + weight_i))
//
// Persistent blocks keep the weight in registers and load the next row while this one is reduced; every element of memory
// is read and written once.
#pragma once

#include "device/pdl.cuh"
#include "norm/params.h"
#include "norm/row.cuh"

namespace flashinfer {

template <class Config>
struct RmsNormRow {
  using T = typename Config::T;
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
    Fragment output;
    Fragment::for_each(thread_idx, [&](int i, int j) {
      const float x = value(i, j), w = to_float(weight.vecs[i][j]) + (Config::kGemma ? 1.f : 0.f);
      output.vecs[i][j] = from_float<T>(x * scale * w);
      if constexpr (Config::kAddResidual) residual.vecs[i][j] = from_float<T>(x);
    });
    if constexpr (Config::kAddResidual) {
      residual.store(residual_row<T>(params, row), thread_idx);
    }
    output.store(output_row<T>(params, row), thread_idx);
  }
};

template <class Config>
__device__ __forceinline__ void rmsnorm(const NormParams& params) {
  using Row = RmsNormRow<Config>;
  __shared__ typename RowSum<Config>::Smem smem;
  RowSum<Config> row_sum{smem};
  RowLoop<Config> loop(params.num_rows);

  wait_for_previous_kernel();
  allow_next_kernel();
  typename Row::Fragment weight;
  weight.load(static_cast<const typename Config::T*>(params.weight), loop.thread_idx);
  Row current{}, next{};
  if (loop.is_valid()) current.load(params, loop.row, loop.thread_idx);

  for (; loop.running(); loop.advance(), current = next) {
    if (loop.next_row() < params.num_rows) next.load(params, loop.next_row(), loop.thread_idx);
    const float sum = row_sum(current.sum_of_squares(loop.thread_idx));
    const float scale = rsqrtf(sum / Config::kHiddenSize + params.eps);
    if (loop.is_valid()) current.store(params, loop.row, loop.thread_idx, weight, scale);
  }
}

}  // namespace flashinfer
