// SPDX-License-Identifier: Apache-2.0
// Append to a paged KV cache on the CPU: the equations and shapes of page/append.cuh. A token a thread.
#pragma once

#include "cpu/page/token_slots.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

template <class Config, int kDim>
void append_row(const typename Config::InT* row, typename Config::CacheT* slot, float scale) {
  if constexpr (Config::kConvert) {
    for (int i = 0; i < kDim; ++i) slot[i] = from_float<typename Config::CacheT>(to_float(row[i]) * scale);
  } else {
    std::memcpy(slot, row, kDim * sizeof(*row));
  }
}

template <class Config>
void append_paged_kv(const AppendParams& params) {
  using InT = typename Config::InT;
  using CacheT = typename Config::CacheT;
  const float key_scale = Config::kConvert ? params.key_scale.reciprocal() : 1.f;
  const float value_scale = Config::kConvert ? params.value_scale.reciprocal() : 1.f;

#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const TokenSlot slot = find_slot<Config>(params.slots, params.bounds, token_idx);
    if (!slot.exists) continue;
    for (int head_idx = 0; head_idx < params.num_heads; ++head_idx) {
      if (params.key_cache != nullptr) {
        append_row<Config, Config::kKeyDim>(
            static_cast<const InT*>(params.key) + row_offset(params.key_strides, token_idx, head_idx),
            static_cast<CacheT*>(params.key_cache) + slot.offset(params.key_cache_strides, head_idx), key_scale);
      }
      if (params.value_cache != nullptr) {
        append_row<Config, Config::kValueDim>(
            static_cast<const InT*>(params.value) + row_offset(params.value_strides, token_idx, head_idx),
            static_cast<CacheT*>(params.value_cache) + slot.offset(params.value_cache_strides, head_idx), value_scale);
      }
    }
  }
}

}  // namespace flashinfer::cpu
