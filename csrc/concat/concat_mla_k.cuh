// SPDX-License-Identifier: Apache-2.0
// Keys of latent attention that is not absorbed, from their two parts:
//
//   k[t, h, :kNopeDim] = k_nope[t, h, :]      k[t, h, kNopeDim:] = k_rope[t, :]
//
//   k_nope [num_tokens, num_heads, kNopeDim]      k [num_tokens, num_heads, kNopeDim + kRopeDim]
//   k_rope [num_tokens, kRopeDim]
//
// A thread moves one vector of kHeadsPerThread heads: the loads of k_nope overlap, that of k_rope is one for all of
// them.
#pragma once

#include "concat/params.h"
#include "device/pdl.cuh"
#include "device/vec.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void concat_mla_k(const ConcatParams& params) {
  using T = typename Config::T;
  using Vector = Vec<T, Config::kVecSize>;
  constexpr int kHeads = Config::kHeadsPerThread, kNumNope = Config::kNopeDim / Config::kVecSize;
  constexpr int kNumLanes = kNumNope + Config::kRopeDim / Config::kVecSize;
  constexpr int kGroupsPerBlock = Config::kNumThreads / kNumLanes;
  static_assert(Config::kNopeDim % Config::kVecSize == 0 && Config::kRopeDim % Config::kVecSize == 0);
  static_assert(kGroupsPerBlock > 0);

  const int lane = threadIdx.x % kNumLanes, column = lane * Config::kVecSize;
  const uint32_t group_idx = blockIdx.x * kGroupsPerBlock + threadIdx.x / kNumLanes;
  const uint32_t groups_per_token = ceil_div(params.num_heads, kHeads);
  const uint32_t token_idx = group_idx / groups_per_token;
  const int first_head = int(group_idx - token_idx * groups_per_token) * kHeads;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x >= kGroupsPerBlock * kNumLanes || token_idx >= params.num_tokens) return;

  const bool is_nope = lane < kNumNope;
  const T* src_gmem =
      is_nope ? static_cast<const T*>(params.k_nope) + token_idx * params.k_nope_strides.token + column
              : static_cast<const T*>(params.k_rope) + token_idx * params.k_rope_stride + column - Config::kNopeDim;
  const int64_t head_stride = is_nope ? params.k_nope_strides.head : 0;
  T* dst_gmem = static_cast<T*>(params.k) + token_idx * params.k_strides.token + column;
  Vector x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i < params.num_heads) x[i] = Vector::load(src_gmem + (first_head + i) * head_stride);
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i < params.num_heads) x[i].store(dst_gmem + (first_head + i) * params.k_strides.head);
  }
}

}  // namespace flashinfer
