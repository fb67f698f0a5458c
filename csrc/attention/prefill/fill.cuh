// SPDX-License-Identifier: Apache-2.0
// How long a batch takes where blocks take the planner's list in its order, the longest item first and one when that
// before is about to end (PlanCosts::fills_gaps). How well short items fill the gaps that long ones leave is a matter
// of their numbers: limits that were estimated from loads alone made lists that take up to 16% longer than the best. So
// lists are played through.
#pragma once

#include "device/reduce.cuh"

namespace flashinfer {

// A warp has a choice each. Time counts in units, of which the longest item has at most kMaxSize, and so does the load
// of a block on average.
struct FillChoices {
  static constexpr int kNum = 16, kMaxSize = 190, kNumSizes = 192, kNumLoads = 2 * kNumSizes;
  int32_t num_items[kNum][kNumSizes];    // by size
  uint16_t num_blocks[kNum][kNumLoads];  // by load

  __device__ __forceinline__ void clear(int choice) {
    for (int i = threadIdx.x % kWarpSize; i < kNumSizes; i += kWarpSize) num_items[choice][i] = 0;
    for (int i = threadIdx.x % kWarpSize; i < kNumLoads; i += kWarpSize) num_blocks[choice][i] = 0;
    __syncwarp();
  }

  // An item without a size would leave its block where play() looks no more.
  __device__ __forceinline__ void add(int choice, int32_t num, float size) {
    atomicAdd(&num_items[choice][max(int(size + 0.5f), 1)], num);
  }

  // The load of the block that is the last to end, if an item always goes to the block that is the first to be free;
  // kNumLoads if that is more than there is room for.
  __device__ __forceinline__ int play(int choice, int32_t num_free) {
    __syncwarp();
    uint16_t* blocks = num_blocks[choice];
    int load = 0, last = 0;  // `load`: of the num_free blocks that are the first to be free
#pragma unroll 1
    for (int first = kNumSizes - kWarpSize; first >= 0; first -= kWarpSize) {
      const int32_t num_of_lane = num_items[choice][first + threadIdx.x % kWarpSize];
#pragma unroll 1
      for (uint32_t sizes = __ballot_sync(0xffffffffu, num_of_lane > 0); sizes != 0;) {
        const int lane_idx = 31 - __clz(sizes), end = first + lane_idx;
        sizes ^= 1u << lane_idx;
        int32_t num = __shfl_sync(0xffffffffu, num_of_lane, lane_idx);
#pragma unroll 1
        while (num > 0) {
          while (num_free == 0) {
            num_free = blocks[++load];
          }
          if (load + end >= kNumLoads) return kNumLoads;
          const int32_t num_taken = min(num, num_free);
          __syncwarp();
          if (threadIdx.x % kWarpSize == 0) blocks[load + end] += num_taken;
          __syncwarp();
          num -= num_taken, num_free -= num_taken;
          last = max(last, load + end);
        }
      }
    }
    return last;
  }
};

}  // namespace flashinfer
