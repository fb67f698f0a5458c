// SPDX-License-Identifier: Apache-2.0
// Merging attention states on the CPU; the equations are in attention/merge_states.cuh.
#pragma once

#include "attention/merge_params.h"
#include "cpu/types.h"

namespace flashinfer {
namespace cpu {

template <class Config>
void merge_states(const MergeParams& params) {
  using T = typename Config::T;
  constexpr int kHeadDim = Config::kHeadDim;
  const int64_t num_head_rows = params.num_rows * params.num_heads;
  const T* v = static_cast<const T*>(params.v);
  const T* v_other = static_cast<const T*>(params.v_other);

#pragma omp parallel for schedule(static) if (num_head_rows * kHeadDim > 16384)
  for (int64_t head_row = 0; head_row < num_head_rows; ++head_row) {
    const int64_t row = head_row / params.num_heads, head_idx = head_row - row * params.num_heads;
    float max = -kInfinity, sum = 0.f, out[kHeadDim] = {};
    const auto merge_state = [&](const T* state, float lse) {
      if (lse == -kInfinity) return;  // its output may be anything, NaN included
      const float new_max = __builtin_fmaxf(max, lse);
      const float old_weight = __builtin_exp2f(max - new_max), weight = __builtin_exp2f(lse - new_max);
      max = new_max;
      sum = sum * old_weight + weight;
      for (int d = 0; d < kHeadDim; ++d) out[d] = out[d] * old_weight + to_float(state[d]) * weight;
    };
    if constexpr (Config::kPair) {
      merge_state(v + head_row * kHeadDim, params.s[head_row]);
      if (params.mask == nullptr || params.mask[row]) {
        merge_state(v_other + head_row * kHeadDim, params.s_other[head_row]);
      }
    } else {
      const int64_t begin = params.indptr ? params.indptr[row] : 0;
      const int64_t end = params.indptr ? params.indptr[row + 1] : params.num_states;
      const int64_t v_first = (params.indptr ? 0 : row * params.v_row_stride) + head_idx * kHeadDim;
      const int64_t s_first = (params.indptr ? 0 : row * params.s_row_stride) + head_idx;
      for (int64_t i = begin; i < end; ++i) {
        merge_state(v + v_first + i * params.v_state_stride, params.s[s_first + i * params.s_state_stride]);
      }
    }
    const float rcp_sum = sum > 0.f ? 1.f / sum : 0.f;
    T* v_out = static_cast<T*>(params.v_out) + head_row * kHeadDim;
    for (int d = 0; d < kHeadDim; ++d) v_out[d] = from_float<T>(out[d] * rcp_sum);
    if (params.s_out != nullptr) params.s_out[head_row] = sum > 0.f ? max + __builtin_log2f(sum) : -kInfinity;
  }
}

}  // namespace cpu
}  // namespace flashinfer
