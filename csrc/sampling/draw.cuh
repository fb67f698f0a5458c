// SPDX-License-Identifier: Apache-2.0
// Drawing one token in proportion to weights: by inverse CDF, one level of the machine at a time (warp of the cluster,
// lane, slot, element), each level with a random word of its own. So no level needs more resolution than its own few
// alternatives, no prefix sum runs over the whole row, and one reading of the row is enough.
//
// A level may only choose what has weight. Rounding can put the target behind the last prefix; then the last
// alternative with weight is taken. Each level sums what the one above it summed, so that a row whose sum is positive
// has a token with weight at the end of every path, negative probabilities among the others or not.
#pragma once

#include "device/philox.cuh"
#include "device/scan.cuh"
#include "sampling/totals.cuh"

namespace flashinfer {

// The lane to take, by the warp's weights; at least one must be positive. Every lane receives the answer.
__device__ __forceinline__ int pick_lane(float weight, float uniform) {
  const float prefix = inclusive_warp_sum(weight);
  const float target = uniform * __shfl_sync(0xffffffffu, prefix, kWarpSize - 1);
  const uint32_t alive = __ballot_sync(0xffffffffu, weight > 0.f);
  const uint32_t hit = alive & __ballot_sync(0xffffffffu, prefix > target);
  return hit ? __ffs(hit) - 1 : 31 - __clz(alive);
}

// The warp of the cluster to take, by weight_of(entry) of a table; every lane of every warp receives the answer.
template <class Table, class WeightOf>
__device__ __forceinline__ int pick_warp(const Table& table, float uniform0, float uniform1, WeightOf weight_of) {
  const int lane_idx = threadIdx.x % kWarpSize;
  float weight = 0.f;
  table.for_lane([&](const auto& entry) { weight += weight_of(entry); });
  const int picked_lane = pick_lane(weight, uniform0);
  // The picked lane's few entries, one after the other.
  int picked = 0, i = 0;
  float prefix = 0.f;
  table.for_lane([&](const auto& entry) {
    const float w = weight_of(entry);
    if (w > 0.f && !(prefix > uniform1 * weight)) {
      prefix += w;
      picked = lane_idx * Table::kEntriesPerLane + i;
    }
    ++i;
  });
  return __shfl_sync(0xffffffffu, picked, picked_lane);
}

struct RandomKey {
  uint64_t seed, offset, subsequence;

  template <class Params>
  __device__ __forceinline__ static RandomKey of(const Params& params, int row) {
    const RandomState& state = params.random;
    return {state.seeds ? state.seeds[params.seeds_per_row ? row : 0] : state.seed,
            state.offsets ? state.offsets[params.offsets_per_row ? row : 0] : state.offset, uint64_t(row)};
  }
  // A stream of its own for each attempt at a row's token; the row itself is the first.
  __device__ __forceinline__ RandomKey attempt(int i) const {
    return {seed, offset, subsequence + (uint64_t(i) << 32)};
  }
  // Words 4 * i ... 4 * i + 3.
  __device__ __forceinline__ RandomWords words(int i) const { return philox(seed, subsequence, offset / 4 + i); }
};

// Draws from the part of the row that belongs to one warp of this block. Called by a whole warp, which need not be that
// one; emit(slot, thread_idx, lane) names the element, in one thread.
//   thread_weight                             of the lane's fellow in that warp
//   element_weights(slot, thread_idx, w[])    the weights behind it
template <class Slice, class ElementWeights, class Emit>
__device__ __forceinline__ void draw_from_warp(const Slice& slice, const RandomWords& words, float last_uniform,
                                               int warp_idx, float thread_weight, ElementWeights element_weights,
                                               Emit emit) {
  const int lane_idx = threadIdx.x % kWarpSize;
  const int thread_idx = warp_idx * kWarpSize + pick_lane(thread_weight, words.uniform(2));
  __syncwarp();  // a resident row was stored by each of its threads

  // The lanes of the warp look at the picked thread's slots side by side.
  float slot_weight = 0.f;
  float weights[Slice::kVecSize];
  for (int slot = lane_idx; slot < slice.num_slots; slot += kWarpSize) {
    element_weights(slot, thread_idx, weights);
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i)
      slot_weight += Slice::kMayBeNegative ? fmaxf(weights[i], 0.f) : weights[i];
  }
  if (pick_lane(slot_weight, words.uniform(3)) != lane_idx) return;

  const float target = last_uniform * slot_weight;
  float prefix = 0.f;
  int picked_slot = 0, picked_lane = 0;
  for (int slot = lane_idx; slot < slice.num_slots && !(prefix > target); slot += kWarpSize) {
    element_weights(slot, thread_idx, weights);
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) {
      if (weights[i] > 0.f && !(prefix > target)) {
        prefix += weights[i];
        picked_slot = slot;
        picked_lane = i;
      }
    }
  }
  emit(picked_slot, thread_idx, picked_lane);
}

// Draws from what is spread over the warps of a cluster. Called by all of them; emit(slot, thread_idx, lane) runs in
// one thread.
//   warp_weight_of(entry of the table)        weights of warps, in one scale
//   thread_weight                             of this thread, in a scale of its warp
//   element_weights                           as above
template <class Config, class Slice, class Table, class WarpWeightOf, class ElementWeights, class Emit>
__device__ __forceinline__ void draw_from_warps(const Slice& slice, const RandomKey& random, const Table& table,
                                                WarpWeightOf warp_weight_of, float thread_weight,
                                                ElementWeights element_weights, Emit emit) {
  constexpr int kNumWarps = Config::kNumThreads / kWarpSize;
  const int warp_idx = threadIdx.x / kWarpSize;
  const RandomWords words = random.words(0);
  const int picked_warp = pick_warp(table, words.uniform(0), words.uniform(1), warp_weight_of);
  if (picked_warp != cluster_rank<Config::kClusterSize>() * kNumWarps + warp_idx) return;
  draw_from_warp(slice, words, random.words(1).uniform(0), warp_idx, thread_weight, element_weights, emit);
}

}  // namespace flashinfer
