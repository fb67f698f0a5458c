// SPDX-License-Identifier: Apache-2.0
// How a head's elements lie across threads in the rotary kernels, and the rotation itself.
//
// A lane holds two vectors of one head, `first` and `second`. In the rotary part they lie rotary_dim / 2 apart, so that
// in the half layout (element i turns with i + rotary_dim / 2) each pair is within one lane; in the interleaved layout
// (2i turns with 2i + 1) each pair is within one vector. Both layouts thus load, store and need angles alike: kVecSize
// of them a lane. Past the rotary part the two vectors are neighbours and only pass through.
#pragma once

#include "device/cast.cuh"
#include "device/rotary.cuh"
#include "device/search.cuh"
#include "rope/params.h"

namespace flashinfer {

FLASHINFER_HOST_DEVICE constexpr int next_power_of_two(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

template <class Config>
struct HeadLanes {
  static constexpr int kVec = Config::kVecSize, kRotaryDim = Config::kRotaryDim, kHeadDim = Config::kHeadDim;
  static constexpr int kNumRotary = kRotaryDim / (2 * kVec);
  static constexpr int kNumUsed = Config::kRotaryPartOnly ? kNumRotary : kHeadDim / (2 * kVec);
  static constexpr int kNumLanes = next_power_of_two(kNumUsed);  // so that a head never straddles warps
  static constexpr int kGroupsPerBlock = Config::kNumThreads / kNumLanes;
  static_assert(kRotaryDim % (2 * kVec) == 0 && kHeadDim % (2 * kVec) == 0 && kRotaryDim <= kHeadDim);
  static_assert(kRotaryDim <= kMaxRotaryDim && Config::kNumThreads % kNumLanes == 0);
  static_assert(!Config::kInterleave || kVec % 2 == 0, "an interleaved pair must lie in one vector");
};

template <class Config>
struct HeadLane {
  int idx;
  bool is_used, is_rotary;
  int first, second;  // columns of the two vectors

  __device__ __forceinline__ explicit HeadLane(int lane_idx) {
    using Lanes = HeadLanes<Config>;
    idx = lane_idx;
    is_used = lane_idx < Lanes::kNumUsed;
    is_rotary = lane_idx < Lanes::kNumRotary;
    first = is_rotary ? lane_idx * Lanes::kVec : 2 * lane_idx * Lanes::kVec;
    second = first + (is_rotary ? Lanes::kRotaryDim / 2 : Lanes::kVec);
  }

  // Which of the head's rotary_dim / 2 angles turns the lane's i-th pair.
  __device__ __forceinline__ int angle_idx(int i) const {
    constexpr int kVec = Config::kVecSize;
    if constexpr (!Config::kInterleave) return idx * kVec + i;
    return idx * (kVec / 2) + (i < kVec / 2 ? i : Config::kRotaryDim / 4 + i - kVec / 2);
  }
};

// A thread's share of the work: one lane of the heads [first_head, first_head + kHeadsPerThread) of one token. Groups
// of queries and of keys are apart, so that everything but the bound on heads is uniform in a group. The third kind,
// values, exists where num_value_heads says so.
enum class HeadKind : int { kQuery, kKey, kValue };

struct HeadGroup {
  uint32_t token_idx;
  HeadKind kind;
  int first_head, num_heads;  // num_heads: of the kind, in the token

  template <int kHeads>
  __device__ __forceinline__ static HeadGroup find(uint32_t group_idx, int num_qo_heads, int num_kv_heads,
                                                   int num_value_heads) {
    const uint32_t num_q = ceil_div(num_qo_heads, kHeads), num_k = ceil_div(num_kv_heads, kHeads);
    const uint32_t num_groups = num_q + num_k + ceil_div(num_value_heads, kHeads);
    HeadGroup group;
    group.token_idx = group_idx / num_groups;
    const uint32_t in_token = group_idx - group.token_idx * num_groups;
    group.kind = in_token < num_q ? HeadKind::kQuery : in_token < num_q + num_k ? HeadKind::kKey : HeadKind::kValue;
    const uint32_t before = group.kind == HeadKind::kQuery ? 0 : group.kind == HeadKind::kKey ? num_q : num_q + num_k;
    group.first_head = int(in_token - before) * kHeads;
    group.num_heads = group.kind == HeadKind::kQuery ? num_qo_heads
                      : group.kind == HeadKind::kKey ? num_kv_heads
                                                     : num_value_heads;
    return group;
  }
};

template <class T, int kVec>
struct HeadPair {
  Vec<T, kVec> first, second;

  template <class Lane>
  __device__ __forceinline__ static HeadPair load(const T* row_gmem, const Lane& lane) {
    return {Vec<T, kVec>::load(row_gmem + lane.first), Vec<T, kVec>::load(row_gmem + lane.second)};
  }
};

// Frequencies are a kernel parameter, and those lie in constant memory, which serves lanes that read different words
// one by one. Through an address the compiler knows nothing of, the same bytes are read like global memory, L1 cache
// included (PTX gives parameters of kernels generic addresses from sm_70 on). It must be a __grid_constant__ parameter:
// otherwise taking its address makes a copy in every thread.
__device__ __forceinline__ const uint64_t* generic_address(const uint64_t* parameter) {
  asm("" : "+l"(parameter));
  return parameter;
}

template <class Config>
__device__ __forceinline__ int64_t rotary_position(const Rotation& rotation, const RotationSetup& setup,
                                                   uint32_t token_idx) {
  using Index = typename Config::PositionIndex;
  if constexpr (Config::kRagged) {
    const Index* indptr = static_cast<const Index*>(rotation.indptr);
    const int batch_idx = find_segment(indptr, setup.batch_size, token_idx);
    if (batch_idx == setup.batch_size) return 0;  // padding past the last request
    const int64_t row = int64_t(token_idx) - indptr[batch_idx];
    if (row < 0) return 0;  // or before the first
    return int64_t(uint64_t(static_cast<const Index*>(rotation.offsets)[batch_idx]) + uint64_t(row));
  } else {
    return static_cast<const Index*>(rotation.positions)[token_idx];
  }
}

// The angles of a rotary lane at one position.
template <class Config>
struct LaneAngles {
  static constexpr int kVec = Config::kVecSize;
  float cos[kVec], sin[kVec];

  __device__ __forceinline__ static LaneAngles make(const Rotation& rotation, const RotationSetup& setup,
                                                    const HeadLane<Config>& lane, int64_t position) {
    LaneAngles angles;
    if constexpr (Config::kCosSinCache) {
      using CosSinT = typename Config::CosSinT;
      constexpr int kRun = Config::kInterleave ? kVec / 2 : kVec;  // angles that are neighbours in a row
      constexpr int kLoad = kRun * sizeof(CosSinT) > 16 ? 16 / sizeof(CosSinT) : kRun;
      const uint32_t table_row = uint64_t(position) < uint64_t(setup.num_positions) ? uint32_t(position) : 0;
      const CosSinT* row_gmem = static_cast<const CosSinT*>(rotation.cos_sin_cache) + table_row * setup.cos_sin_stride;
#pragma unroll
      for (int i = 0; i < kVec; i += kLoad) {
        const auto cos = Vec<CosSinT, kLoad>::load(row_gmem + lane.angle_idx(i));
        const auto sin = Vec<CosSinT, kLoad>::load(row_gmem + Config::kRotaryDim / 2 + lane.angle_idx(i));
#pragma unroll
        for (int j = 0; j < kLoad; ++j) {
          angles.cos[i + j] = to_float(cos[j]);
          angles.sin[i + j] = to_float(sin[j]);
        }
      }
    } else {
      const uint64_t* frequencies = generic_address(setup.frequencies);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const CosSin angle = rotary_cos_sin(position, frequencies[lane.angle_idx(i)]);
        angles.cos[i] = angle.cos;
        angles.sin[i] = angle.sin;
      }
    }
    return angles;
  }

  __device__ __forceinline__ void rotate(float (&first)[kVec], float (&second)[kVec]) const {
    if constexpr (Config::kInterleave) {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        turn(first[2 * i], first[2 * i + 1], i);
        turn(second[2 * i], second[2 * i + 1], kVec / 2 + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) turn(first[i], second[i], i);
    }
  }

 private:
  __device__ __forceinline__ void turn(float& x, float& y, int i) const {
    const float x_turned = x * cos[i] - y * sin[i];
    y = y * cos[i] + x * sin[i];
    x = x_turned;
  }
};

}  // namespace flashinfer
