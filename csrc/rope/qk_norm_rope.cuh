// SPDX-License-Identifier: Apache-2.0
// RMSNorm over each head of queries and keys (Qwen3), then their rotation, in place. With turn() the rotation of
// rope.cuh and w the weight of queries or of keys,
//
//   x[t, h, :] <- turn(x[t, h, :] / sqrt(sum_i x[t, h, i]² / head_dim + eps) · (weight_bias + w))
//
//   q [num_tokens, num_qo_heads, head_dim] T, k [num_tokens, num_kv_heads, head_dim] T: views of one packed qkv
//   q_weight, k_weight [head_dim] T
//
// Threads are spread as in rope.cuh, and the lanes of a head sum its squares by shuffles. The norm's result stays in
// fp32 registers until it is turned, so it is rounded once; values are not touched.
#pragma once

#include "device/pdl.cuh"
#include "device/reduce.cuh"
#include "rope/head_pairs.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void qk_norm_rope(const QkNormRopeParams& params) {
  using T = typename Config::T;
  using Lanes = HeadLanes<Config>;
  constexpr int kVec = Config::kVecSize, kHeads = Config::kHeadsPerThread;
  static_assert(Lanes::kNumLanes <= kWarpSize, "a head is reduced within a warp");

  const HeadLane<Config> lane(threadIdx.x % Lanes::kNumLanes);
  const HeadGroup group = HeadGroup::find<kHeads>(blockIdx.x * Lanes::kGroupsPerBlock + threadIdx.x / Lanes::kNumLanes,
                                                  params.num_qo_heads, params.num_kv_heads, 0);
  const bool is_query = group.kind == HeadKind::kQuery;
  // Every lane stays to the end: the reduction is of the whole warp. Lanes without work read nothing and write nothing.
  const bool is_used = lane.is_used && group.token_idx < params.num_tokens;
  const int num_heads = is_used ? group.num_heads : 0;
  // Threads without work read the last token's indices, so that those loads need no branch.
  const uint32_t token_idx = min(group.token_idx, uint32_t(params.num_tokens - 1));
  wait_for_previous_kernel();
  allow_next_kernel();

  // The position, then heads in: the angles are computed while the heads are on their way.
  const int64_t position = rotary_position<Config>(params.rotation, params.setup, token_idx);
  T* heads_gmem = static_cast<T*>(is_query ? params.q : params.k) + group.token_idx * params.qkv_strides.token;
  HeadPair<T, kVec> x[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head_idx = group.first_head + i;
    if (head_idx < num_heads) x[i] = HeadPair<T, kVec>::load(heads_gmem + head_idx * params.qkv_strides.head, lane);
  }

  // Weights and angles.
  HeadPair<T, kVec> weight{};
  LaneAngles<Config> angles;
  if (is_used) {
    const T* weight_gmem = static_cast<const T*>(is_query ? params.q_weight : params.k_weight);
    weight = HeadPair<T, kVec>::load(weight_gmem, lane);
    if (lane.is_rotary) {
      angles = LaneAngles<Config>::make(params.rotation, params.setup, lane, position);
    }
  }

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    // Norm.
    float first[kVec], second[kVec];
    to_floats(x[i].first, first);
    to_floats(x[i].second, second);
    float sum_of_squares = 0.f;
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum_of_squares += first[j] * first[j] + second[j] * second[j];
    sum_of_squares = warp_reduce<Lanes::kNumLanes>(sum_of_squares, Sum());
    const float rcp_rms = rsqrtf(sum_of_squares / Config::kHeadDim + params.eps);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      first[j] *= rcp_rms * (params.weight_bias + to_float(weight.first[j]));
      second[j] *= rcp_rms * (params.weight_bias + to_float(weight.second[j]));
    }

    // Turn, and heads out.
    if (lane.is_rotary) angles.rotate(first, second);
    const int head_idx = group.first_head + i;
    if (head_idx < num_heads) {
      T* row_gmem = heads_gmem + head_idx * params.qkv_strides.head;
      cast_vec<T>(first).store_past_l1(row_gmem + lane.first);
      cast_vec<T>(second).store_past_l1(row_gmem + lane.second);
    }
  }
}

}  // namespace flashinfer
