// SPDX-License-Identifier: Apache-2.0
// RMSNorm over each head of queries and keys, then their rotation, in place, on the CPU: the equations and shapes of
// rope/qk_norm_rope.cuh. A token a thread.
#pragma once

#include "cpu/rope/rotation.h"

namespace flashinfer::cpu {

template <class Config>
void qk_norm_rope_heads(const QkNormRopeParams& params, const TokenAngles<Config>& angles, void* heads,
                        const void* weight, int token_idx, int num_heads) {
  using T = typename Config::T;
  constexpr int kDim = Config::kHeadDim;
  float w[kDim];
  load_floats<kDim>(static_cast<const T*>(weight), w);
  for (int head_idx = 0; head_idx < num_heads; ++head_idx) {
    T* row = static_cast<T*>(heads) + row_offset(params.qkv_strides, token_idx, head_idx);
    float x[kDim];
    load_floats<kDim>(row, x);
    float sum_of_squares = 0.f;
#pragma omp simd reduction(+ : sum_of_squares)
    for (int i = 0; i < kDim; ++i) sum_of_squares += x[i] * x[i];
    const float rcp_rms = 1.f / __builtin_sqrtf(sum_of_squares / kDim + params.eps);
    for (int i = 0; i < kDim; ++i) x[i] *= rcp_rms * (params.weight_bias + w[i]);
    angles.rotate(x);
    store_floats<kDim>(x, 1.f, row);
  }
}

template <class Config>
void qk_norm_rope(const QkNormRopeParams& params) {
#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const TokenAngles<Config> angles(params.rotation, params.setup, token_idx);
    qk_norm_rope_heads(params, angles, params.q, params.q_weight, token_idx, params.num_qo_heads);
    qk_norm_rope_heads(params, angles, params.k, params.k_weight, token_idx, params.num_kv_heads);
  }
}

}  // namespace flashinfer::cpu
