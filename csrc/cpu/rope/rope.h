// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding of queries and keys on the CPU: the equations and shapes of rope/rope.cuh. A token a
// thread, whose angles are computed once for all its heads.
#pragma once

#include "cpu/rope/rotation.h"

namespace flashinfer::cpu {

template <class Config>
void rope_heads(const TokenAngles<Config>& angles, const void* in, const HeadStrides& in_strides, void* out,
                const HeadStrides& out_strides, int token_idx, int num_heads) {
  using T = typename Config::T;
  constexpr int kDim = Config::kRotaryPartOnly ? Config::kRotaryDim : Config::kHeadDim;
  for (int head_idx = 0; head_idx < num_heads; ++head_idx) {
    float x[kDim];
    load_floats<kDim>(static_cast<const T*>(in) + row_offset(in_strides, token_idx, head_idx), x);
    angles.rotate(x);
    store_floats<kDim>(x, 1.f, static_cast<T*>(out) + row_offset(out_strides, token_idx, head_idx));
  }
}

template <class Config>
void rope(const RopeParams& params) {
#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const TokenAngles<Config> angles(params.rotation, params.setup, token_idx);
    rope_heads(angles, params.q, params.q_strides, params.q_out, params.q_out_strides, token_idx, params.num_qo_heads);
    rope_heads(angles, params.k, params.k_strides, params.k_out, params.k_out_strides, token_idx, params.num_kv_heads);
  }
}

}  // namespace flashinfer::cpu
