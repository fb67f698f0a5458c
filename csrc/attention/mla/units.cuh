// SPDX-License-Identifier: Apache-2.0
// How a block of latent attention comes by its work.
#pragma once

#include "attention/mla/params.h"
#include "attention/prefill/work.cuh"

namespace flashinfer {

// The planner's list, of which a block takes one unit by its place in the grid, then whatever is next. So blocks that
// are neighbours on the chip begin with rows of one request, and share what they read of its cache.
//
// Blocks wait for each other's splits in the end (mla/merge.cuh), which must not be those of a block that has not
// started: another kernel, waiting in turn, may have its place. So units by place are marked as taken, and those of
// blocks that are late are done by others, by whom nothing else is left to do: most are late by a microsecond.
struct LatentUnits {
  const MlaParams& params;

  // The first, which is read while it is taken, or the next; false: there are no more on the list. By one thread.
  __device__ __forceinline__ bool claim(bool is_first, PrefillUnit& unit) const {
    PrefillSchedule& schedule = *params.schedule;
    unit.kv_head_idx = 0;
    const bool is_own = is_first && take(blockIdx.x);
    const uint32_t num_items = schedule.num_items;
    if (is_first) {  // all in one trip to memory; there is room for an item for every block
      unit.item = params.items[blockIdx.x];
      if (is_own && blockIdx.x < num_items) return confine(unit);
    }
    const uint32_t idx = gridDim.x + atomicAdd(&schedule.next_unit, 1u);
    if (idx >= num_items) return false;
    unit.item = params.items[idx];
    return confine(unit);
  }

  // Whether there are units of blocks that are late, by what each lane of a warp has read.
  __device__ __forceinline__ bool has_late(uint32_t word) const {
    const int32_t num_units = num_by_place() - int32_t(32 * (fresh_thread_idx() % 32));
    const bool is_late = num_units > 0 && ~word << (num_units < 32 ? 32 - num_units : 0) != 0;
    return __any_sync(0xffffffffu, is_late);
  }
  __device__ __forceinline__ uint32_t taken_of_lane() const {
    const uint32_t lane_idx = fresh_thread_idx() % 32;
    return lane_idx < sizeof(PrefillSchedule::taken) / 4 ? taken(lane_idx) : ~0u;
  }
  // One of them; false: there are no more. By one thread of a block that has done all of its own.
  __device__ __forceinline__ bool steal(PrefillUnit& unit) const {
    const int32_t num_units = num_by_place();
    for (int32_t i = 0; i < num_units; ++i) {
      const uint32_t word = taken(i / 32);
      if (word == ~0u) i |= 31;
      if (word >> i % 32 & 1 || !take(i)) continue;
      unit.item = params.items[i];
      unit.kv_head_idx = 0;
      return confine(unit);
    }
    return false;
  }

  // The last block to leave resets the list for the next launch.
  __device__ __forceinline__ void close() const {
    PrefillSchedule& schedule = *params.schedule;
    if (atomicAdd(&schedule.num_done, 1u) != gridDim.x - 1) return;
    for (uint32_t& word : schedule.taken) word = 0;
    schedule.next_unit = schedule.num_done = 0;
  }

 private:
  __device__ __forceinline__ int32_t num_by_place() const {
    return min(int32_t(gridDim.x), params.schedule->num_items);
  }
  __device__ __forceinline__ uint32_t taken(uint32_t word_idx) const {
    return const_cast<volatile uint32_t&>(params.schedule->taken[word_idx]);
  }
  __device__ __forceinline__ bool take(uint32_t idx) const {
    const uint32_t bit = 1u << idx % 32;
    return !(atomicOr(&params.schedule->taken[idx / 32], bit) & bit);
  }
  __device__ __forceinline__ bool confine(PrefillUnit& unit) const {
    unit.item.confine_to(params.num_tokens);
    return true;
  }
};

}  // namespace flashinfer
