// SPDX-License-Identifier: Apache-2.0
// The few elements of a row that a filter has yet to decide on, gathered in the first block of the cluster, the leader,
// and put in order there: one a thread, by descending score, equal scores by ascending token id. So sums over the list
// have a fixed order, whichever way its elements came.
#pragma once

#include "device/scan.cuh"
#include "sampling/draw.cuh"
#include "sampling/order.cuh"

namespace flashinfer {

template <class Config>
struct RankedList {
  using Slice = RowSlice<Config>;
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kCapacity = kNumThreads;
  // What one block may send: blocks are uneven.
  static constexpr int kPerBlock = kClusterSize == 1 ? kCapacity : kCapacity / kClusterSize + 64;

  // Score and token in one number, larger where the element comes earlier.
  using Key = uint64_t;
  // What a block sent, or would have sent if there had been room.
  struct alignas(16) Sent {
    int32_t count, least, most;  // scores as ordered bits
  };
  struct Smem {
    union {
      Key arrived[kClusterSize * kPerBlock];  // of the leader; each block fills its own part
      Key ranked[kCapacity];
    };
    Sent mine;
    Sent blocks[kClusterSize];
    float warp_sums[kNumWarps];
  };

  Smem& smem;
  RowMail<kClusterSize>& mail;
  int num_gathered = 0;  // times
  int size;
  float least, most;  // of the scores in the range gathered last

  // Of the leader's thread, after rank().
  float score;
  int token_id;
  bool is_listed = false;

  // Sends the elements in (low, high] to the leader. Returns whether they all found a place; least and most are right
  // also if not. Collective over the cluster; an exchange between all warps must come before the next time.
  __device__ __forceinline__ bool gather(Slice& slice, float thread_max, float low, float high) {
    const int rank = cluster_rank<kClusterSize>();
    if (threadIdx.x == 0) smem.mine = {0, kHighestBits, kLowestBits};
    __syncthreads();
    int32_t thread_least = kHighestBits, thread_most = kLowestBits;
    if (thread_max > low) {
      Key* const list = smem.arrived + rank * kPerBlock;
      slice.for_each_granule([&](const typename Slice::Granule& granule, int slot) {
        uint32_t inside = 0;
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) {
          const float x = to_float(granule[i]);
          inside |= uint32_t(x > low && x <= high) << i;
        }
        if (inside == 0) return;
        int place = atomicAdd(&smem.mine.count, __popc(inside));
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) {
          if (!(inside >> i & 1)) continue;
          const int32_t bits = ordered_bits(to_float(granule[i]));
          thread_least = min(thread_least, bits);
          thread_most = max(thread_most, bits);
          if (place < kPerBlock) mail.list.send(list + place, key(bits, slice.token_id(slot, threadIdx.x, i)), 0);
          ++place;
        }
      });
    }
    const int32_t warp_least = __reduce_min_sync(0xffffffffu, thread_least);
    const int32_t warp_most = __reduce_max_sync(0xffffffffu, thread_most);
    if (threadIdx.x % kWarpSize == 0 && warp_least <= warp_most) {
      atomicMin(&smem.mine.least, warp_least);
      atomicMax(&smem.mine.most, warp_most);
    }
    __syncthreads();
    if (threadIdx.x < kClusterSize) mail.sent.send(&smem.blocks[rank], smem.mine, threadIdx.x);
    mail.sent.receive(kClusterSize * sizeof(Sent), num_gathered);
    int num_listed = 0;
    bool fits = true;
    Sent all{0, kHighestBits, kLowestBits};
#pragma unroll
    for (int block = 0; block < kClusterSize; ++block) {
      const Sent sent = smem.blocks[block];
      all = {all.count + sent.count, min(all.least, sent.least), max(all.most, sent.most)};
      fits &= sent.count <= kPerBlock;
      num_listed += min(sent.count, kPerBlock);
    }
    if (rank == 0) mail.list.receive(num_listed * sizeof(Key), num_gathered);
    ++num_gathered;
    size = all.count;
    least = from_ordered_bits(all.least);
    most = from_ordered_bits(all.most);
    return fits && size <= kCapacity;
  }

  // Puts the list in order. Called by the leader's threads.
  __device__ __forceinline__ void rank() {
    is_listed = threadIdx.x < size;
    Key mine = 0;
    int place = threadIdx.x;
#pragma unroll
    for (int block = 0; block < kClusterSize; ++block) {
      const int count = smem.blocks[block].count;
      if (place >= 0 && place < count) mine = smem.arrived[block * kPerBlock + place];
      place -= count;
    }
    __syncthreads();
    smem.ranked[threadIdx.x] = mine;
    __syncthreads();
    int num_before = 0;
    // Whole warps without an element have nothing to compare.
    if (threadIdx.x / kWarpSize * kWarpSize < size) {
#pragma unroll 4
      for (int i = 0; i < size; ++i) num_before += smem.ranked[i] > mine;
    }
    __syncthreads();
    if (is_listed) smem.ranked[num_before] = mine;
    __syncthreads();
    if (is_listed) mine = smem.ranked[threadIdx.x];
    score = score_at(threadIdx.x);
    token_id = ~static_cast<uint32_t>(mine);
  }

  // A filter keeps the first elements of the list, those whose threads say so, and at least one; and what is equal to
  // the last of them. Returns the score above which elements stay.
  __device__ __forceinline__ float floor_of_first(bool stays) const {
    return next_below(score_at(max(__syncthreads_count(stays), 1) - 1));
  }

  // Of this thread's element: the weight of the elements before it.
  __device__ __forceinline__ float weight_before(float weight) {
    const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    const float inclusive = inclusive_warp_sum(weight);
    float before = __shfl_up_sync(0xffffffffu, inclusive, 1);
    if (lane_idx == 0) before = 0.f;
    const float* warp_sums = share_sum(__shfl_sync(0xffffffffu, inclusive, kWarpSize - 1));
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) before += warp < warp_idx ? warp_sums[warp] : 0.f;
    return before;
  }

  // The sum over all threads of the block.
  __device__ __forceinline__ float total(float weight) {
    const float* warp_sums = share_sum(warp_reduce(weight, Sum{}));
    const int lane_idx = threadIdx.x % kWarpSize;
    return warp_reduce(lane_idx < kNumWarps ? warp_sums[lane_idx] : 0.f, Sum{});
  }

  // Draws one thread of the block in proportion to its weight. Its warp receives its index, other warps -1.
  __device__ __forceinline__ int pick(float weight, const RandomWords& words) {
    const float* warp_sums = share_sum(warp_reduce(weight, Sum{}));
    const int lane_idx = threadIdx.x % kWarpSize, warp_idx = threadIdx.x / kWarpSize;
    const int picked_warp = pick_lane(lane_idx < kNumWarps ? warp_sums[lane_idx] : 0.f, words.uniform(0));
    if (picked_warp != warp_idx) return -1;
    return picked_warp * kWarpSize + pick_lane(weight, words.uniform(1));
  }

 private:
  // Every warp's sum, where all can read it until the next call.
  __device__ __forceinline__ const float* share_sum(float warp_sum) {
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) smem.warp_sums[threadIdx.x / kWarpSize] = warp_sum;
    __syncthreads();
    return smem.warp_sums;
  }

  static constexpr int32_t kHighestBits = 0x7fffffff, kLowestBits = -kHighestBits - 1;

  __device__ __forceinline__ static Key key(int32_t bits, int token_id) {
    return Key(uint32_t(bits ^ kLowestBits)) << 32 | ~static_cast<uint32_t>(token_id);
  }
  __device__ __forceinline__ float score_at(int place) const {
    return from_ordered_bits(static_cast<int32_t>(smem.ranked[place] >> 32) ^ kLowestBits);
  }
};

}  // namespace flashinfer
