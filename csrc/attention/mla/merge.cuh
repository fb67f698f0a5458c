// SPDX-License-Identifier: Apache-2.0
// How the splits of a query tile are merged in latent attention, whose partial results are large: 66 KB of 64 rows.
// The last block to arrive (attention/merge.cuh) would read megabytes. Instead the tile is cut into as many shares as
// it has splits, and each is merged by a block of its own once all splits have been left.
//
// That block waits. All units are claimed by then, by blocks that are running, and none of them waits before it has
// done its own: so the wait ends, whatever else the GPU is at, and however many blocks of the grid have yet to start.
#pragma once

#include "attention/mla/params.h"
#include "attention/mla/partial_unit.h"
#include "attention/prefill/work.cuh"
#include "device/kv_codec.cuh"
#include "device/reduce.cuh"

namespace flashinfer {

// Where the splits of a tile count: those that have left their partial results, then the shares that know.
struct SplitCounter {
  uint32_t* counter_gmem;
  uint32_t num_splits;

  // By one thread, after a barrier with those that wrote the partial results.
  __device__ __forceinline__ void arrive() const { atomic_add_release(counter_gmem, 1); }
  // By one thread, before a barrier with those that read them. Leaves zero for the next launch.
  __device__ __forceinline__ void await_all() const {
    while (load_acquire(counter_gmem) < num_splits) {
    }
    if (atomicAdd(counter_gmem, 1u) == 2 * num_splits - 1) *counter_gmem = 0;
  }
};

// A row of what a split leaves: its output in fp16, in units of a power of two; behind it the LSE and the unit. What
// writing and merging take is the bandwidth of the L2 cache, and fp32 would be twice the bytes. An element is rounded
// by at most 2^-11 of itself; the result in bf16 is by 2^-8.
//
// Columns are in an order that both sides know: eight elements are one vector, what a lane had of 32 columns, in pairs.
template <class Config>
struct PartialRow {
  static constexpr int kNumVecs = Config::kHeadDimVo / 8, kVecBytes = 16;
  static constexpr int kStatsOffset = kNumVecs * kVecBytes, kNumBytes = kStatsOffset + 32;  // sectors of the L2 cache
  static_assert(kNumBytes <= Config::kHeadDimVo * int(sizeof(float)), "the host makes room for fp32");
  uint8_t* row_gmem;

  __device__ __forceinline__ static PartialRow at(const MlaParams& params, int64_t row) {
    return {reinterpret_cast<uint8_t*>(params.partial_out) + row * kNumBytes};
  }
  __device__ __forceinline__ uint4* vec(int idx) const { return reinterpret_cast<uint4*>(row_gmem) + idx; }
  // The LSE, and the unit.
  __device__ __forceinline__ float2* stats() const { return reinterpret_cast<float2*>(row_gmem + kStatsOffset); }
};

using MergedVec = RunningState<8>;

// Without a branch, as RunningState::merge.
template <int kNum>
__device__ __forceinline__ void merge_partials(MergedVec& state, const uint4 (&vecs)[kNum],
                                               const float2 (&stats)[kNum]) {
  float new_max = state.max;
#pragma unroll
  for (int j = 0; j < kNum; ++j) new_max = fmaxf(new_max, stats[j].x);
  const float shift = new_max == kMinusInfinity ? 0.f : new_max, old_weight = fast_exp2(state.max - shift);
  state.max = new_max;
  state.sum *= old_weight;
#pragma unroll
  for (float& x : state.out) x *= old_weight;
#pragma unroll
  for (int j = 0; j < kNum; ++j) {
    const float weight = fast_exp2(stats[j].x - shift), factor = weight * stats[j].y;
    state.sum += weight;
    const uint32_t pairs[4] = {vecs[j].x, vecs[j].y, vecs[j].z, vecs[j].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_16bit<fp16>(weight == 0.f ? 0u : pairs[i]);  // it may be anything, NaN included
      state.out[2 * i] += pair.x * factor;
      state.out[2 * i + 1] += pair.y * factor;
    }
  }
}
__device__ __forceinline__ void join(MergedVec& state, const MergedVec& other) {
  const float new_max = fmaxf(state.max, other.max), shift = new_max == kMinusInfinity ? 0.f : new_max;
  const float weight = fast_exp2(state.max - shift), other_weight = fast_exp2(other.max - shift);
  state.max = new_max;
  state.sum = state.sum * weight + other.sum * other_weight;
#pragma unroll
  for (int i = 0; i < 8; ++i) state.out[i] = state.out[i] * weight + other.out[i] * other_weight;
}

// Merges the split_idx-th of num_splits shares of a query tile. A lane has 16 vectors in flight: of kNumStates places
// four splits, or, where there are more, of one place 16; then several lanes of a warp may read different splits of the
// same place. Pairs of a vector are kPairDistance columns apart: 8, or 2 and, of the two later, 16.
template <class Config, int kNumThreads, int kPairDistance>
__device__ __forceinline__ void merge_share(const MlaParams& params, const PrefillUnit& unit,
                                            const FastDivisor& group_size) {
  using T = typename Config::Out;
  using Row = PartialRow<Config>;
  constexpr int kNumStates = 4, kBatch = 4, kMaxParts = 16;
  static_assert(kPairDistance == 8 || kPairDistance == 2);
  const PrefillItem& item = unit.item;
  const int32_t num_splits = item.num_splits;
  const int32_t num_rows = unit.num_rows(group_size.divisor, Config::kBlockM), num_vecs = num_rows * Row::kNumVecs;
  const int32_t end = num_vecs * (item.split_idx + 1) / num_splits;  // num_splits is at most that of threads that plan
  const bool is_wide = num_splits <= kBatch;
  int32_t num_parts = 1;
  while (num_parts < kMaxParts && num_parts * kNumStates * kBatch < num_splits) num_parts *= 2;
  const int32_t lanes_of_part = kWarpSize / num_parts, lane_idx = fresh_thread_idx() % kWarpSize;
  const int32_t part = lane_idx / lanes_of_part, vecs_of_pass = kNumThreads / kWarpSize * lanes_of_part;
  const int32_t vecs_of_state = is_wide ? vecs_of_pass : 0, splits_of_state = is_wide ? 0 : kBatch * num_parts;
  int32_t first = num_vecs * item.split_idx / num_splits + fresh_thread_idx() / kWarpSize * lanes_of_part;
#pragma unroll 1
  for (; first < end; first += (is_wide ? kNumStates : 1) * vecs_of_pass) {
    const int32_t first_of_lane = first + lane_idx % lanes_of_part;
    MergedVec states[kNumStates];
#pragma unroll 1
    for (int32_t split = part; split < num_splits; split += kNumStates * kBatch * num_parts) {
      uint4 vecs[kNumStates][kBatch];
      float2 stats[kNumStates][kBatch];
#pragma unroll
      for (int v = 0; v < kNumStates; ++v) {
        const int32_t vec_idx = min(first_of_lane + v * vecs_of_state, end - 1);
        const int32_t row = item.partial_row + vec_idx / Row::kNumVecs, place = vec_idx % Row::kNumVecs;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int32_t idx = split + v * splits_of_state + j * num_parts;
          stats[v][j] = {kMinusInfinity, 0.f};
          if (idx < num_splits) {
            const Row partial = Row::at(params, row + int64_t(idx) * num_rows);
            vecs[v][j] = __ldcg(partial.vec(place));
            stats[v][j] = __ldcg(partial.stats());
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kNumStates; ++v) merge_partials(states[v], vecs[v], stats[v]);
    }
    if (!is_wide) {
#pragma unroll
      for (int v = 1; v < kNumStates; ++v) join(states[0], states[v]);
#pragma unroll 1
      for (int32_t step = lanes_of_part; step < kWarpSize; step *= 2) {
        MergedVec other;
        other.max = __shfl_xor_sync(0xffffffffu, states[0].max, step);
        other.sum = __shfl_xor_sync(0xffffffffu, states[0].sum, step);
#pragma unroll
        for (int i = 0; i < 8; ++i) other.out[i] = __shfl_xor_sync(0xffffffffu, states[0].out[i], step);
        join(states[0], other);
      }
    }
#pragma unroll
    for (int v = 0; v < kNumStates; ++v) {
      const int32_t vec_idx = first_of_lane + v * vecs_of_state;
      if ((v > 0 && !is_wide) || part > 0 || vec_idx >= end) continue;
      MergedVec& state = states[v];
      state.normalize();
      const int32_t place = vec_idx % Row::kNumVecs;
      const int32_t column = place / 4 * 32 + place % 4 * (kPairDistance == 2 ? 4 : 2);
      const QueryRow query = unit.query_row(group_size, item.q_tile * Config::kBlockM + vec_idx / Row::kNumVecs);
      T* row_gmem = static_cast<T*>(params.out) + unit.offset(query, params.out_token_stride, params.out_head_stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = kPairDistance == 2 ? i / 2 * 16 + i % 2 * 2 : i * 8;
        *reinterpret_cast<uint32_t*>(row_gmem + column + distance) =
            pack_16bit<T>(state.out[2 * i], state.out[2 * i + 1]);
      }
      if (place == 0 && params.lse != nullptr) {
        params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = state.lse();
      }
    }
  }
}

// The shares of this block, after all of its units. By kNumThreads threads; sync(): their barrier.
template <class Config, int kNumThreads, int kPairDistance, class Sync>
__device__ __forceinline__ void merge_shares(const MlaParams& params, const FastDivisor& group_size, const Sync& sync) {
  if (!params.schedule->has_splits) return;
  for (int32_t i = blockIdx.x; i < params.schedule->num_items; i += gridDim.x) {
    PrefillUnit unit = {params.items[i], 0};
    if (unit.item.num_splits == 1) continue;
    unit.item.confine_to(params.num_tokens);
    const SplitCounter counter = {params.counters + unit.item.counter, uint32_t(unit.item.num_splits)};
    if (fresh_thread_idx() == 0) counter.await_all();
    sync();
    merge_share<Config, kNumThreads, kPairDistance>(params, unit, group_size);
  }
}

}  // namespace flashinfer
