// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys, in place or not. A token at
// position p turns the pairs (x, y) of each of its heads, i < rotary_dim / 2:
//
//   x, y = elements i and i + rotary_dim / 2       kInterleave: 2 i and 2 i + 1
//   c, s = cos and sin of p · frequency[i]         kCosSinCache: from cos_sin_cache[p, :], cos first, then sin
//   x, y <- x c − y s, y c + x s
//
// and the elements from rotary_dim on stay as they are.
//
//   q, q_out [num_tokens, num_qo_heads, head_dim] T      k, k_out [num_tokens, num_kv_heads, head_dim] T
//   positions [num_tokens], or kRagged: offsets[b] + row within request b
//   frequency [rotary_dim / 2], theta^(−2 i / rotary_dim) scaled by the host; cos_sin_cache [num_positions, rotary_dim]
//
// Each element moves once in and once out, so the time is that of a copy. A thread has the two vectors of
// kHeadsPerThread heads in flight before it needs the angles, which it computes once for all of them
// (rope/head_pairs.cuh).
#pragma once

#include "device/pdl.cuh"
#include "rope/head_pairs.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void rope(const RopeParams& params) {
  using T = typename Config::T;
  using Lanes = HeadLanes<Config>;
  constexpr int kVec = Config::kVecSize, kHeads = Config::kHeadsPerThread;

  const HeadLane<Config> lane(threadIdx.x % Lanes::kNumLanes);
  const HeadGroup group = HeadGroup::find<kHeads>(blockIdx.x * Lanes::kGroupsPerBlock + threadIdx.x / Lanes::kNumLanes,
                                                  params.num_qo_heads, params.num_kv_heads, 0);
  const bool is_query = group.kind == HeadKind::kQuery;
  const HeadStrides& in_strides = is_query ? params.q_strides : params.k_strides;
  const HeadStrides& out_strides = is_query ? params.q_out_strides : params.k_out_strides;
  const bool is_used = lane.is_used && group.token_idx < params.num_tokens;
  // Threads without work read the last token's indices, so that those loads need no branch.
  const uint32_t token_idx = min(group.token_idx, uint32_t(params.num_tokens - 1));
  wait_for_previous_kernel();
  allow_next_kernel();

  // The position, then heads in: the angles are computed while the heads are on their way.
  const int64_t position = rotary_position<Config>(params.rotation, params.setup, token_idx);
  const T* in_gmem = static_cast<const T*>(is_query ? params.q : params.k) + group.token_idx * in_strides.token;
  HeadPair<T, kVec> x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head_idx = group.first_head + i;
    if (is_used && head_idx < group.num_heads) {
      x[i] = HeadPair<T, kVec>::load(in_gmem + head_idx * in_strides.head, lane);
    }
  }

  // Angles.
  if (!is_used) return;
  LaneAngles<Config> angles;
  if (lane.is_rotary) {
    angles = LaneAngles<Config>::make(params.rotation, params.setup, lane, position);
  }

  // Turn, and heads out.
  T* out_gmem = static_cast<T*>(is_query ? params.q_out : params.k_out) + group.token_idx * out_strides.token;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head_idx = group.first_head + i;
    if (head_idx >= group.num_heads) break;
    if (lane.is_rotary) {
      float first[kVec], second[kVec];
      to_floats(x[i].first, first);
      to_floats(x[i].second, second);
      angles.rotate(first, second);
      x[i] = {cast_vec<T>(first), cast_vec<T>(second)};
    }
    x[i].first.store_past_l1(out_gmem + head_idx * out_strides.head + lane.first);
    x[i].second.store_past_l1(out_gmem + head_idx * out_strides.head + lane.second);
  }
}

}  // namespace flashinfer
