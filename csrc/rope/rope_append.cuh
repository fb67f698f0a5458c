// Rotary position embedding and append to a paged KV cache in one pass: queries are turned and written out, keys are
// turned and written to their slots only, values are copied to theirs. An fp8 cache is written from the fp32 result of
// the rotation, so keys are rounded once.
#pragma once

#include "device/pdl.cuh"
#include "page/token_slots.cuh"
#include "rope/head_pairs.cuh"

namespace flashinfer {

// One lane's two vectors of a head, scaled and converted to the type they are stored in.
template <class OutT, int kVec, class Lane>
__device__ __forceinline__ void store_pair(OutT* row_gmem, const Lane& lane, float (&first)[kVec],
                                           float (&second)[kVec], float scale) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    first[i] *= scale;
    second[i] *= scale;
  }
  cast_vec<OutT>(first).store(row_gmem + lane.first);
  cast_vec<OutT>(second).store(row_gmem + lane.second);
}

template <class Config>
__device__ __forceinline__ void rope_append(const RopeAppendParams& params) {
  using T = typename Config::T;
  using CacheT = typename Config::CacheT;
  using Lanes = HeadLanes<Config>;
  constexpr int kVec = Config::kVecSize, kHeads = Config::kHeadsPerThread;
  __shared__ FrequencyTable<Config> frequencies_smem;

  const HeadLane<Config> lane(threadIdx.x % Lanes::kNumLanes);
  const HeadGroup group = HeadGroup::find<kHeads>(blockIdx.x * Lanes::kGroupsPerBlock + threadIdx.x / Lanes::kNumLanes,
                                                  params.num_qo_heads, params.num_kv_heads, params.num_kv_heads);
  const bool is_query = group.kind == HeadKind::kQuery, is_value = group.kind == HeadKind::kValue;
  const HeadStrides& in_strides = is_query ? params.q_strides : is_value ? params.v_strides : params.k_strides;
  const bool is_used = lane.is_used && group.token_idx < params.num_tokens;
  wait_for_previous_kernel();
  allow_next_kernel();

  // Heads in.
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
  frequencies_smem.fill(params.rotary);
  if (!is_used) return;
  TokenSlot slot{0, 0, true};
  if (!is_query) {
    slot = find_slot<typename Config::TokenIndex, typename Config::PageIndex>(params.slots, int(group.token_idx));
    if (!slot.exists) return;
  }
  const bool is_turned = lane.is_rotary && !is_value;
  LaneAngles<Config> angles;
  if (is_turned) {
    const int64_t position = rotary_position<Config>(params.rotary, group.token_idx);
    angles = LaneAngles<Config>::make(params.rotary, frequencies_smem, lane, position);
  }
  const float scale = is_query ? 1.f : is_value ? params.value_scale.reciprocal() : params.key_scale.reciprocal();

  // Turn, and heads out.
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head_idx = group.first_head + i;
    if (head_idx >= group.num_heads) break;
    float first[kVec], second[kVec];
    to_floats(x[i].first, first);
    to_floats(x[i].second, second);
    if (is_turned) angles.rotate(first, second);
    if (is_query) {
      T* row_gmem = static_cast<T*>(params.q_out) + group.token_idx * params.q_out_strides.token +
                    head_idx * params.q_out_strides.head;
      store_pair<T>(row_gmem, lane, first, second, 1.f);
    } else {
      const CacheStrides& strides = is_value ? params.value_cache_strides : params.key_cache_strides;
      CacheT* row_gmem = static_cast<CacheT*>(is_value ? params.value_cache : params.key_cache) + slot.offset(strides) +
                         head_idx * strides.head;
      store_pair<CacheT>(row_gmem, lane, first, second, scale);
    }
  }
}

}  // namespace flashinfer
