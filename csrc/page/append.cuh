// SPDX-License-Identifier: Apache-2.0
// Append to a paged KV cache. Token t is at position p = positions[t] of request b = batch_indices[t]:
//
//   page = page_indices[page_indptr[b] + p / page_size]           slot = p % page_size
//   key_cache[page, slot, h, :]   = key[t, h, :]   / key_scale    a tensor's scale, where types differ; rounded once
//   value_cache[page, slot, h, :] = value[t, h, :] / value_scale
//
//   key   [num_tokens, num_heads, kKeyDim] InT        key_cache   [num_pages, page_size, num_heads, kKeyDim] CacheT
//   value [num_tokens, num_heads, kValueDim] InT      value_cache [num_pages, page_size, num_heads, kValueDim] CacheT
//
// Either cache may be null, the widths may differ (compressed KV and rotary part of MLA are one head each), and a token
// whose indices lead outside is skipped (page/params.h).
//
// A thread copies one vector of kHeadsPerThread heads: that many independent loads are in flight while the chain of
// dependent index loads (request -> page list -> page) resolves, and the chain is walked once for all of them.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "page/params.h"
#include "page/token_slots.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ Vec<typename Config::CacheT, Config::kVecSize> to_cache(
    const Vec<typename Config::InT, Config::kVecSize>& x, float scale) {
  if constexpr (Config::kConvert) {
    float y[Config::kVecSize];
    to_floats(x, y);
#pragma unroll
    for (int i = 0; i < Config::kVecSize; ++i) y[i] *= scale;
    return cast_vec<typename Config::CacheT>(y);
  } else {
    return x;
  }
}

template <class Config>
__device__ __forceinline__ void append_paged_kv(const AppendParams& params) {
  using InT = typename Config::InT;
  using CacheT = typename Config::CacheT;
  constexpr int kVec = Config::kVecSize, kHeads = Config::kHeadsPerThread;
  constexpr int kNumKeyLanes = Config::kKeyDim / kVec, kNumLanes = kNumKeyLanes + Config::kValueDim / kVec;
  constexpr int kGroupsPerBlock = Config::kNumThreads / kNumLanes;
  static_assert(Config::kKeyDim % kVec == 0 && Config::kValueDim % kVec == 0 && kGroupsPerBlock > 0);

  // Which vector of which heads of which token.
  const int lane = threadIdx.x % kNumLanes;
  const uint32_t group_idx = blockIdx.x * kGroupsPerBlock + threadIdx.x / kNumLanes;
  const uint32_t groups_per_token = ceil_div(params.num_heads, kHeads);
  const uint32_t token_idx = group_idx / groups_per_token;
  const int first_head = int(group_idx - token_idx * groups_per_token) * kHeads;
  const bool is_key = lane < kNumKeyLanes;
  const int column = (is_key ? lane : lane - kNumKeyLanes) * kVec;
  void* cache = is_key ? params.key_cache : params.value_cache;
  const CacheStrides& cache_strides = is_key ? params.key_cache_strides : params.value_cache_strides;
  const HeadStrides& row_strides = is_key ? params.key_strides : params.value_strides;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x >= kGroupsPerBlock * kNumLanes || token_idx >= params.num_tokens || cache == nullptr) return;

  // Rows in, while the slot is looked up.
  const TokenPlace place = TokenPlace::load<typename Config::TokenIndex>(params.slots, int(token_idx));
  const InT* rows_gmem =
      static_cast<const InT*>(is_key ? params.key : params.value) + column + int64_t(token_idx) * row_strides.token;
  Vec<InT, kVec> x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i < params.num_heads) x[i] = Vec<InT, kVec>::load(rows_gmem + (first_head + i) * row_strides.head);
  }

  const TokenSlot slot = find_slot<typename Config::PageIndex>(params.slots, params.bounds, place);
  if (!slot.exists) return;
  const QuantScale& cache_scale = is_key ? params.key_scale : params.value_scale;
  const float scale = Config::kConvert ? cache_scale.reciprocal() : 1.f;
  CacheT* cache_gmem = static_cast<CacheT*>(cache) + slot.offset(cache_strides) + column;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i < params.num_heads) {
      to_cache<Config>(x[i], scale).store(cache_gmem + (first_head + i) * cache_strides.head);
    }
  }
}

}  // namespace flashinfer
