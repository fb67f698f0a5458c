// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding and append to a paged KV cache in one pass, on the CPU: the equations and shapes of
// rope/rope_append.cuh. A token a thread.
#pragma once

#include "cpu/page/token_slots.h"
#include "cpu/rope/rope.h"

namespace flashinfer::cpu {

template <class Config>
void rope_append(const RopeAppendParams& params) {
  using T = typename Config::T;
  using CacheT = typename Config::CacheT;
  constexpr int kDim = Config::kHeadDim;
  const float key_scale = params.key_scale.reciprocal();
  const float value_scale = params.value_scale.reciprocal();

#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const TokenAngles<Config> angles(params.rotation, params.setup, token_idx);
    rope_heads(angles, params.q, params.q_strides, params.q_out, params.q_out_strides, token_idx, params.num_qo_heads);

    const TokenSlot slot = find_slot<Config>(params.slots, params.bounds, token_idx);
    if (!slot.exists) continue;
    for (int head_idx = 0; head_idx < params.num_kv_heads; ++head_idx) {
      float x[kDim];
      load_floats<kDim>(static_cast<const T*>(params.k) + row_offset(params.k_strides, token_idx, head_idx), x);
      angles.rotate(x);
      store_floats<kDim>(x, key_scale,
                         static_cast<CacheT*>(params.key_cache) + slot.offset(params.key_cache_strides, head_idx));
      load_floats<kDim>(static_cast<const T*>(params.v) + row_offset(params.v_strides, token_idx, head_idx), x);
      store_floats<kDim>(x, value_scale,
                         static_cast<CacheT*>(params.value_cache) + slot.offset(params.value_cache_strides, head_idx));
    }
  }
}

}  // namespace flashinfer::cpu
