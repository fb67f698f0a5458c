// SPDX-License-Identifier: Apache-2.0
// How a block of prefill comes by its work on Hopper: one thread fetches units ahead of those who do them.
#pragma once

#include "attention/sm90/proofs.cuh"

namespace flashinfer::sm90 {

// The units, an item for a KV head each, that one block takes: the first by its place in the grid, then whatever is
// next on the planner's list. Without a plan they are the query tiles of a single sequence, every gridDim.x-th of them.
template <class Config>
struct Scheduler {
  using Shape = sm90::Shape<Config>;
  static constexpr bool kProvesTiles = Smem<Config>::kProvesTiles;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;
  uint32_t unit = blockIdx.x;

  // Whether a thread of a warp, or of several, has a part in it: the first, and to prove tiles its warp.
  __device__ __forceinline__ static bool has(int thread_idx) { return thread_idx < (kProvesTiles ? 32 : 1); }

  __device__ __forceinline__ bool is_planned() const { return params.items != nullptr; }
  __device__ __forceinline__ int32_t group_size() const { return params.num_qo_heads / params.num_kv_heads; }

  // That take units.
  __device__ __forceinline__ uint32_t num_blocks() const {
    if constexpr (Config::kIsMixed) return params.schedule->num_blocks;
    return gridDim.x;
  }

  __device__ __forceinline__ uint32_t claim_next() const {
    return num_blocks() + (is_planned() ? atomicAdd(&params.schedule->next_unit, 1u) : unit);
  }

  __device__ __forceinline__ void run() {
    for (uint32_t turn = 0; publish(turn); ++turn) {
    }
    if (!kProvesTiles || fresh_thread_idx() % 32 == 0) close();
  }

  // The turn-th unit, or that there is none.
  __device__ __forceinline__ bool publish(uint32_t turn) {
    bool is_there;
    if constexpr (kProvesTiles) {
      if (turn == 0) forget_entries<Config>(smem);
      if (fresh_thread_idx() % 32 == 0) fetch(turn);
      __syncwarp();
      is_there = prove_tiles<Config>(params, smem, turn);
      __syncwarp();
      if (fresh_thread_idx() % 32 != 0) return is_there;
    } else {
      is_there = fetch(turn);
    }
    smem.work_full.at(turn).arrive();
    return is_there;
  }

  // Of all that leads to a unit only its number is kept: registers are few.
  __device__ __forceinline__ bool fetch(uint32_t turn) {
    smem.work_empty.wait_empty(turn);
    if (turn > 0) unit = claim_next();
    const int32_t num_items =
        is_planned() ? params.schedule->num_items : ceil_div(params.qo_len * group_size(), Shape::kBlockM);
    const bool is_end = unit >= uint32_t(num_items * params.num_kv_heads);
    Work& work = smem.work[turn % kNumWorkSlots];
    work.is_end = is_end;
    if (!is_end) {
      const UnitOrder order = {num_items, params.num_kv_heads, num_heads_abreast(num_items)};
      int32_t item_idx, kv_head_idx;
      order.find(unit, item_idx, kv_head_idx);
      work.kv_head_idx = kv_head_idx;
      // Of a single sequence the last query tile is, under a causal mask, the longest.
      work.item = is_planned() ? params.items[item_idx] : item_of_single<Config>(params, num_items - 1 - item_idx);
      work.item.confine_to(params.num_tokens);
      const auto gap = close_gap<Config>(params, work.item, group_size());
      if constexpr (Smem<Config>::kHasGap) smem.gaps.of_slot[turn % kNumWorkSlots] = gap;
    }
    return !is_end;
  }

  // As the planner says, but no more KV heads than keep their KV in the L2 cache, where all query tiles find it:
  // reading it again from memory takes power, and that is what limits a long run. At least so many that every block has
  // two units of each turn.
  __device__ __forceinline__ int32_t num_heads_abreast(int32_t num_items) const {
    constexpr int64_t kCacheBytes = 20 << 20;
    const int32_t num_planned = is_planned() ? params.schedule->num_heads_abreast : params.num_kv_heads;
    if constexpr (Shape::kNumConsumers == 1 && !Config::kSharesKv) return num_planned;  // of short queries, read once
    const KvIndex& index = params.kv.index;
    int64_t num_rows = index.len;
    if constexpr (Config::kKvStorage != kKvSingle) {
      const bool is_counted = Config::kIsMixed || (Config::kKvStorage == kKvPaged && index.indptr == nullptr);
      num_rows = int64_t(is_counted ? params.schedule->num_kv_pages : index.indptr[params.batch_size]) *
                 index.page_size.divisor;
    }
    const int64_t head_bytes = num_rows * (Shape::kHeadDimQk + Shape::kHeadDimVo) * sizeof(typename Shape::Kv);
    const int32_t num_cached =
        head_bytes * params.num_kv_heads > kCacheBytes ? kCacheBytes / head_bytes : params.num_kv_heads;
    const int32_t num_busy = ceil_div(2 * int32_t(num_blocks()), max(num_items, 1));
    return min(num_planned, max(max(num_cached, num_busy), 1));
  }

  // The last block to leave resets the list for the next launch.
  __device__ __forceinline__ void close() const {
    if (is_planned() && atomicAdd(&params.schedule->num_done, 1u) == num_blocks() - 1) {
      params.schedule->next_unit = 0;
      params.schedule->num_done = 0;
    }
  }
};

// visit(work, turn) for the units of this block, one after the other, and prepare(turn) ahead of each. By a warp, one
// of those counted by work_empty.
template <class Smem, class Visit, class Prepare>
__device__ __forceinline__ void for_each_unit(Smem& smem, const Visit& visit, const Prepare& prepare) {
  for (uint32_t turn = 0;; ++turn) {
    prepare(turn);
    smem.work_full.wait_full(turn);
    const Work& work = smem.work[turn % kNumWorkSlots];
    if (work.is_end) break;
    visit(work, turn);
    __syncwarp();
    if (elect_lane()) smem.work_empty.at(turn).arrive();
  }
}
template <class Smem, class Visit>
__device__ __forceinline__ void for_each_unit(Smem& smem, const Visit& visit) {
  for_each_unit(smem, visit, [](uint32_t) {});
}

}  // namespace flashinfer::sm90
