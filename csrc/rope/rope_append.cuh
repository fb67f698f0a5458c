// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding and append to a paged KV cache in one pass. With turn() the rotation of rope.cuh, and page
// and slot of token t as in page/append.cuh,
//
//   q_out[t, h, :]                = turn(q[t, h, :])
//   key_cache[page, slot, h, :]   = turn(k[t, h, :]) / key_scale      a tensor's scale, where types differ
//   value_cache[page, slot, h, :] = v[t, h, :] / value_scale
//
//   q, q_out    [num_tokens, num_qo_heads, head_dim] T      k, v [num_tokens, num_kv_heads, head_dim] T
//   both caches [num_pages, page_size, num_kv_heads, head_dim] CacheT
//
// Threads are spread as in rope.cuh, with values as a third kind of heads. Keys are rounded once, from the fp32 result
// of the rotation, and written to their slots only.
#pragma once

#include "device/pdl.cuh"
#include "page/token_slots.cuh"
#include "rope/head_pairs.cuh"

namespace flashinfer {

template <class Config, class OutT>
__device__ __forceinline__ void turn_and_store(
    const HeadPair<typename Config::T, Config::kVecSize> (&x)[Config::kHeadsPerThread],
    const LaneAngles<Config>& angles, bool is_turned, const HeadGroup& group, const HeadLane<Config>& lane,
    OutT* token_gmem, int64_t head_stride, float scale) {
  constexpr int kVec = Config::kVecSize;
#pragma unroll
  for (int i = 0; i < Config::kHeadsPerThread; ++i) {
    const int head_idx = group.first_head + i;
    if (head_idx >= group.num_heads) break;
    float first[kVec], second[kVec];
    to_floats(x[i].first, first);
    to_floats(x[i].second, second);
    if (is_turned) angles.rotate(first, second);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      first[j] *= scale;
      second[j] *= scale;
    }
    OutT* row_gmem = token_gmem + head_idx * head_stride;
    cast_vec<OutT>(first).store(row_gmem + lane.first);
    cast_vec<OutT>(second).store(row_gmem + lane.second);
  }
}

template <class Config>
__device__ __forceinline__ void rope_append(const RopeAppendParams& params) {
  using T = typename Config::T;
  using CacheT = typename Config::CacheT;
  using Lanes = HeadLanes<Config>;
  constexpr int kVec = Config::kVecSize, kHeads = Config::kHeadsPerThread;

  const HeadLane<Config> lane(threadIdx.x % Lanes::kNumLanes);
  const HeadGroup group = HeadGroup::find<kHeads>(blockIdx.x * Lanes::kGroupsPerBlock + threadIdx.x / Lanes::kNumLanes,
                                                  params.num_qo_heads, params.num_kv_heads, params.num_kv_heads);
  const bool is_query = group.kind == HeadKind::kQuery, is_value = group.kind == HeadKind::kValue;
  const HeadStrides& in_strides = is_query ? params.q_strides : is_value ? params.v_strides : params.k_strides;
  const bool is_used = lane.is_used && group.token_idx < params.num_tokens;
  // Threads without work read the last token's indices, so that those loads need no branch.
  const uint32_t token_idx = min(group.token_idx, uint32_t(params.num_tokens - 1));
  wait_for_previous_kernel();
  allow_next_kernel();

  // Positions, then heads in: slots are looked up and angles computed while the heads are on their way.
  const int64_t position = rotary_position<Config>(params.rotation, params.setup, token_idx);
  const TokenPlace place = TokenPlace::load<typename Config::TokenIndex>(params.slots, token_idx);
  const T* in_gmem = static_cast<const T*>(is_query   ? params.q
                                           : is_value ? params.v
                                                      : params.k) +
                     group.token_idx * in_strides.token;
  HeadPair<T, kVec> x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head_idx = group.first_head + i;
    if (is_used && head_idx < group.num_heads) {
      x[i] = HeadPair<T, kVec>::load(in_gmem + head_idx * in_strides.head, lane);
    }
  }

  // Where to, and by which angles.
  if (!is_used) return;
  const TokenSlot slot =
      is_query ? TokenSlot{0, 0, true} : find_slot<typename Config::PageIndex>(params.slots, params.bounds, place);
  if (!slot.exists) return;
  const bool is_turned = lane.is_rotary && !is_value;
  LaneAngles<Config> angles;
  if (is_turned) {
    angles = LaneAngles<Config>::make(params.rotation, params.setup, lane, position);
  }

  // Turn, and heads out: queries in their own type, keys and values in the cache's.
  T* q_gmem = static_cast<T*>(params.q_out) + token_idx * params.q_out_strides.token;
  const CacheStrides& cache_strides = is_value ? params.value_cache_strides : params.key_cache_strides;
  CacheT* cache_gmem =
      static_cast<CacheT*>(is_value ? params.value_cache : params.key_cache) + slot.offset(cache_strides);
  const int64_t head_stride = is_query ? params.q_out_strides.head : cache_strides.head;
  if constexpr (Config::kConvert) {
    if (is_query) {
      turn_and_store<Config>(x, angles, is_turned, group, lane, q_gmem, head_stride, 1.f);
    } else {
      const float scale = is_value ? params.value_scale.reciprocal() : params.key_scale.reciprocal();
      turn_and_store<Config>(x, angles, is_turned, group, lane, cache_gmem, head_stride, scale);
    }
  } else {
    turn_and_store<Config>(x, angles, is_turned, group, lane, is_query ? q_gmem : cache_gmem, head_stride, 1.f);
  }
}

}  // namespace flashinfer
