// Rotary position embedding and append to a paged KV cache in one pass, on the CPU.
#pragma once

#include "cpu/page/token_slots.h"
#include "cpu/rope/rope.h"

namespace flashinfer::cpu {

template <class Config>
void rope_append(const RopeAppendParams& params) {
  using T = typename Config::T;
  using CacheT = typename Config::CacheT;
  constexpr int kDim = Config::kHeadDim;
  const float key_scale = store_scale(params.key_scale_value, params.key_scale);
  const float value_scale = store_scale(params.value_scale_value, params.value_scale);

#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const TokenAngles<Config> angles(params.rotary, token_idx);
    rope_heads(angles, params.q, params.q_out, token_idx, params.num_qo_heads);

    const TokenSlot slot = find_slot<typename Config::TokenIndex, typename Config::PageIndex>(params.slots, token_idx);
    if (!slot.exists) continue;
    CacheT* key_slot = static_cast<CacheT*>(params.key_cache.data) + slot.offset(params.key_cache);
    CacheT* value_slot = static_cast<CacheT*>(params.value_cache.data) + slot.offset(params.value_cache);
    for (int head_idx = 0; head_idx < params.num_kv_heads; ++head_idx) {
      float x[kDim];
      load_floats<kDim>(head_row<const T>(params.k, token_idx, head_idx), x);
      angles.rotate(x);
      store_floats<kDim>(x, key_scale, key_slot + head_idx * params.key_cache.head_stride);
      load_floats<kDim>(head_row<const T>(params.v, token_idx, head_idx), x);
      store_floats<kDim>(x, value_scale, value_slot + head_idx * params.value_cache.head_stride);
    }
  }
}

}  // namespace flashinfer::cpu
