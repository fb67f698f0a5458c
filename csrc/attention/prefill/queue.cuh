// SPDX-License-Identifier: Apache-2.0
// How a block of prefill comes by its work.
#pragma once

#include "attention/prefill/tile.cuh"

namespace flashinfer {

// The units of work, an item for a KV head each, that one block takes: the first by its place in the grid, then
// whatever is next on the planner's list. The next one is fetched while the KV of this one are on their way. Without a
// plan, a block has one (query tile, KV head) of a single sequence. One thread does all of it.
template <class Config>
struct WorkQueue {
  using Shape = PrefillShape<Config>;
  const PrefillParams& params;
  PrefillSmem<Config>& smem;

  __device__ __forceinline__ PrefillSchedule& schedule() const {
    PrefillSchedule* schedule_gmem;  // found where it is used, like fresh_thread_idx()
    asm volatile("mov.u64 %0, %1;" : "=l"(schedule_gmem) : "l"(params.schedule));
    return *schedule_gmem;
  }
  __device__ __forceinline__ bool is_planned() const { return params.items != nullptr; }

  __device__ __forceinline__ void open() const {
    const int32_t num_items = is_planned() ? schedule().num_items : gridDim.x / params.num_kv_heads;
    smem.order = {num_items, params.num_kv_heads, is_planned() ? schedule().num_heads_abreast : params.num_kv_heads};
    smem.num_units = num_items * params.num_kv_heads;
    smem.next_work.group_size = FastDivisor::of(params.num_qo_heads / params.num_kv_heads);
    fetch_async(blockIdx.x);
  }

  // Number of the next unit. It takes a trip to memory until it is known.
  __device__ __forceinline__ uint32_t claim() const {
    return is_planned() ? gridDim.x + atomicAdd(&schedule().next_unit, 1u) : smem.num_units;
  }

  __device__ __forceinline__ void fetch_async(uint32_t unit) const {
    using Kv = typename Config::Kv;
    smem.next_unit = unit;
    if (unit >= smem.num_units) return;
    int32_t item_idx, kv_head_idx;
    smem.order.find(unit, item_idx, kv_head_idx);
    smem.next_work.kv_head_idx = kv_head_idx;
    smem.next_work.k_gmem = static_cast<const Kv*>(params.kv.k) + kv_head_idx * params.kv.k_head_stride;
    smem.next_work.v_gmem = static_cast<const Kv*>(params.kv.v) + kv_head_idx * params.kv.v_head_stride;
    if (!is_planned()) {
      const int32_t num_tiles = gridDim.x / params.num_kv_heads;  // the last is, under a causal mask, the longest
      smem.next_work.item = item_of_single<Config>(params, num_tiles - 1 - item_idx);
      return;
    }
    const PrefillItem* item_gmem = params.items + item_idx;
    static_assert(sizeof(PrefillItem) % 16 == 0);
#pragma unroll
    for (int i = 0; i < int(sizeof(PrefillItem)) / 16; ++i) {
      cp_async_16(smem_address(&smem.next_work.item) + 16 * i, reinterpret_cast<const uint4*>(item_gmem) + i, true);
    }
    cp_async_commit();
  }

  // Makes the unit that was fetched the current one.
  __device__ __forceinline__ void take_next() const {
    cp_async_wait<0>();
    smem.unit = smem.next_unit;
    if (smem.unit >= smem.num_units) return;  // of a block that never had one, the item is whatever was there
    smem.work = smem.next_work;
    smem.work.item.confine_to(params.num_tokens);
    smem.gap = close_gap<Config>(params, smem.work.item, smem.work.group_size.divisor);
  }

  // The last block to leave resets the list for the next launch.
  __device__ __forceinline__ void close() const {
    if (is_planned() && atomicAdd(&schedule().num_done, 1u) == gridDim.x - 1) {
      schedule().next_unit = 0;
      schedule().num_done = 0;
    }
  }
};

}  // namespace flashinfer
