// Drawing one token in proportion to weights: by inverse CDF, one level of the machine at a time (block of the cluster,
// warp, lane, slot, element), each level with a random word of its own. So no level needs more resolution than its own
// few alternatives, no prefix sum runs over the whole row, and one reading of the row is enough.
//
// A level may only choose what has weight. Rounding can put the target behind the last prefix; then the last
// alternative with weight is taken.
#pragma once

#include "device/philox.cuh"
#include "sampling/row.cuh"

namespace flashinfer {

// The lane to take, by the warp's weights; at least one must be positive. Every lane receives the answer.
__device__ __forceinline__ int pick_lane(float weight, float uniform) {
  const int lane_idx = threadIdx.x % kWarpSize;
  float prefix = weight;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const float below = __shfl_up_sync(0xffffffffu, prefix, offset);
    if (lane_idx >= offset) prefix += below;
  }
  const float target = uniform * __shfl_sync(0xffffffffu, prefix, kWarpSize - 1);
  const uint32_t alive = __ballot_sync(0xffffffffu, weight > 0.f);
  const uint32_t hit = alive & __ballot_sync(0xffffffffu, prefix > target);
  return hit ? __ffs(hit) - 1 : 31 - __clz(alive);
}

struct RandomKey {
  uint64_t seed, offset;
  int row;

  template <class Params>
  __device__ __forceinline__ static RandomKey of(const Params& params, int row) {
    if (params.random_state) return {params.random_state[0], params.random_state[1], row};
    return {params.seed, params.offset, row};
  }
  // Words 4 * i ... 4 * i + 3 of the row.
  __device__ __forceinline__ RandomWords words(int i) const { return philox(seed, row, offset / 4 + i); }
};

template <class Config>
struct Draw {
  static constexpr int kNumWarps = Config::kNumThreads / kWarpSize;
  static constexpr int kClusterSize = Config::kClusterSize;
  struct Smem {
    float warps[kNumWarps];
  };

  // Sums thread_weight over the block and leaves each warp's sum for the choice that follows.
  __device__ __forceinline__ static float block_weight(float thread_weight, Smem& smem) {
    const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    const float warp_weight = warp_reduce(thread_weight, Sum{});
    if (lane_idx == 0) smem.warps[warp_idx] = warp_weight;
    __syncthreads();
    return warp_reduce(lane_idx < kNumWarps ? smem.warps[lane_idx] : 0.f, Sum{});
  }

  // Called by every thread of the block that the cluster chose. emit(token id) runs in one thread.
  // element_weight(slot, thread_idx, weights[kVecSize]) computes the weights behind thread_weight.
  template <class Slice, class ElementWeight, class Emit>
  __device__ __forceinline__ static void pick_in_block(const Slice& slice, float thread_weight, const RandomKey& random,
                                                       const RandomWords& words, Smem& smem,
                                                       ElementWeight element_weight, Emit emit) {
    const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    if (pick_lane(lane_idx < kNumWarps ? smem.warps[lane_idx] : 0.f, words.uniform(1)) != warp_idx) return;
    const int thread_idx = warp_idx * kWarpSize + pick_lane(thread_weight, words.uniform(2));

    // The lanes of the warp look at the chosen thread's slots side by side.
    float slot_weight = 0.f;
    float weights[Slice::kVecSize];
    for (int slot = lane_idx; slot < slice.num_slots; slot += kWarpSize) {
      element_weight(slot, thread_idx, weights);
#pragma unroll
      for (int i = 0; i < Slice::kVecSize; ++i) slot_weight += weights[i];
    }
    if (pick_lane(slot_weight, words.uniform(3)) != lane_idx) return;

    const float target = random.words(1).uniform(0) * slot_weight;
    float prefix = 0.f;
    int token_id = 0;
    for (int slot = lane_idx; slot < slice.num_slots && !(prefix > target); slot += kWarpSize) {
      element_weight(slot, thread_idx, weights);
#pragma unroll
      for (int i = 0; i < Slice::kVecSize; ++i) {
        if (weights[i] > 0.f && !(prefix > target)) {
          prefix += weights[i];
          token_id = slice.token_id(slot, thread_idx, i);
        }
      }
    }
    emit(token_id);
  }
};

}  // namespace flashinfer
