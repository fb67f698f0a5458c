// SPDX-License-Identifier: Apache-2.0
// A unit of work of prefill: where its query rows are, what it leaves if the KV of its query tile are split, and how
// that is merged. Shared by the planner and by the kernels, whatever they multiply with.
#pragma once

#include "attention/merge.cuh"
#include "attention/prefill/params.h"
#include "attention/sink.cuh"
#include "attention/visibility.cuh"
#include "device/cast.cuh"
#include "device/thread_idx.cuh"

namespace flashinfer {

// Where a row of a query tile is among the request's tokens and the query heads.
struct QueryRow {
  int32_t token_idx;  // within the request
  int32_t qo_head_idx;
};

// An item for one KV head.
struct PrefillUnit {
  PrefillItem item;
  int32_t kv_head_idx;

  // Rows of the query tile that exist.
  __device__ __forceinline__ int32_t num_rows(int32_t group_size, int32_t block_m) const {
    const int32_t num_left = item.qo_len * group_size - item.q_tile * block_m;
    return num_left < block_m ? num_left : block_m;
  }
  // `row` counts from the request's first.
  __device__ __forceinline__ QueryRow query_row(const FastDivisor& group_size, int row) const {
    const int32_t token_idx = group_size.divide(row), size = group_size.divisor;
    return {token_idx, kv_head_idx * size + row - token_idx * size};
  }
  __device__ __forceinline__ int32_t position(const QueryRow& query) const {
    return position_of(query.token_idx, item.qo_len, item.kv_len);
  }
  // Elements from the start of q or out to such a row.
  __device__ __forceinline__ int64_t offset(const QueryRow& query, int64_t token_stride, int64_t head_stride) const {
    return (item.q_begin + query.token_idx) * token_stride + query.qo_head_idx * head_stride;
  }
  // First row of a slot of partial results. Slots follow each other, within one the KV heads, within those the rows.
  __device__ __forceinline__ int64_t partial_row(int32_t slot_idx, int64_t num_rows, int32_t num_kv_heads) const {
    return (item.partial_row + slot_idx * num_rows) * num_kv_heads + kv_head_idx * num_rows;
  }
};

// The query tiles of a single sequence, without a plan: all of the keys they see.
template <class Config>
__device__ __forceinline__ PrefillItem item_of_single(const PrefillParams& params, int32_t q_tile) {
  const Range tiles =
      visibility_of<Config>(params, 0).tiles_of(q_tile, Config::kBlockM, params.num_qo_heads / params.num_kv_heads,
                                                params.qo_len, params.kv.index.len, Config::kBlockN);
  PrefillItem item = {};
  item.q_tile = q_tile;
  item.qo_len = params.qo_len;
  item.kv_len = params.kv.index.len;
  item.tile_begin = tiles.begin;
  item.tile_end = tiles.end;
  item.num_splits = 1;
  return item;
}

// KV tiles that are left out among those of an item: from `begin` on its tiles are numbered without them.
template <bool kExists>
struct TileGap {
  int32_t begin, len;

  // Where the keys of a tile are, in tiles.
  __device__ __forceinline__ int key_tile(int tile) const { return tile >= begin ? tile + len : tile; }
  // The numbers of tiles behind the gap.
  __device__ __forceinline__ Range numbers_of(const Range& key_tiles) const {
    return {key_tiles.begin - len, key_tiles.end - len};
  }
};
template <>
struct TileGap<false> {
  __device__ __forceinline__ static int key_tile(int tile) { return tile; }
  __device__ __forceinline__ static Range numbers_of(const Range& key_tiles) { return key_tiles; }
};

// Takes the tiles that no row of an item sees anything of out of it. By one thread, before anyone else looks at it.
template <class Config>
__device__ __forceinline__ TileGap<Config::Function::kHasGap> close_gap(const AttentionParams& params,
                                                                        PrefillItem& item, int32_t group_size) {
  if constexpr (!Config::Function::kHasGap) {
    return {};
  } else {
    const Range hidden =
        visibility_of<Config>(params, item.request_idx)
            .tiles_hidden_of(item.q_tile, Config::kBlockM, group_size, item.qo_len, item.kv_len, Config::kBlockN);
    const int32_t begin = max(hidden.begin, item.tile_begin), end = min(hidden.end, item.tile_end);
    const int32_t len = max(end - begin, 0);
    item.tile_end -= len;
    return {begin, len};
  }
}

// What the splits of a query tile leave: a slot of partial results each, behind them one for every group of the tree;
// and where they count: a counter for the tile, behind it one for every group.
struct PartialResults {
  MergeTree tree;

  __device__ __forceinline__ static PartialResults of(int32_t num_splits) {
    constexpr int32_t kMaxUngrouped = 8, kLog2MinGroup = 2;
    return {MergeTree::of(num_splits, kMaxUngrouped, kLog2MinGroup)};
  }
  __device__ __forceinline__ int32_t num_slots() const { return tree.num_parts + tree.num_groups; }
  __device__ __forceinline__ int32_t num_counters() const { return 1 + tree.num_groups; }
  __device__ __forceinline__ int32_t slot_of_group(int32_t group_idx) const { return tree.num_parts + group_idx; }
  __device__ __forceinline__ int32_t counter_of(int32_t group_idx) const { return 1 + group_idx; }
  // Of the states that are merged for a group, or for all of them.
  __device__ __forceinline__ int32_t first_slot_in(int32_t group_idx) const {
    if (group_idx != kAllGroups) return tree.first_of_group(group_idx);
    return tree.num_groups > 0 ? tree.num_parts : 0;
  }
};
static_assert(kAllGroups == -1, "the first counter is that of the tile");

// Merges the splits of the query tile as far as this block is the one to do it. By kNumThreads threads, each of which
// merges kNumVecs vectors of four columns of a row, whose weights they share, of kBatch partial results at a time, with
// as many more under way. The order is the same whoever does it. arrives_last(counter, count): that of merge.cuh, by
// these threads.
template <class Config, int kNumThreads, int kNumVecs, int kBatch, class ArrivesLast>
__device__ __forceinline__ void merge_splits(const PrefillParams& params, const PrefillUnit& unit,
                                             const FastDivisor& group_size, const ArrivesLast& arrives_last) {
  using T = typename Config::Out;
  constexpr int kHeadDim = Config::kHeadDimVo, kVecsPerRow = kHeadDim / 4, kThreadsPerRow = kVecsPerRow / kNumVecs;
  static_assert(kVecsPerRow % kNumVecs == 0);
  using State = RunningState<4 * kNumVecs>;
  const PrefillItem& item = unit.item;
  const PartialResults partial = PartialResults::of(item.num_splits);
  const int32_t num_rows = unit.num_rows(group_size.divisor, Config::kBlockM), num_parts = num_rows * kThreadsPerRow;
  climb(partial.tree, item.split_idx, [&](int32_t group_idx, int32_t count) {
    const int64_t counter_idx = item.counter + int64_t(partial.counter_of(group_idx));
    if (!arrives_last(params.counters + counter_idx * params.num_kv_heads + unit.kv_head_idx, count)) return false;
    if (num_parts <= 0) return true;  // offsets that are not true
    const int64_t first_row = unit.partial_row(partial.first_slot_in(group_idx), num_rows, params.num_kv_heads);
    const auto store = [&](int part, State& state) {
      if (part >= num_parts) return;
      const int row = part / kThreadsPerRow, first_column = part % kThreadsPerRow * 4;
      state.normalize();
      float lse = state.lse();
      const auto store_to = [&]<class Element>(Element* row_gmem) {
#pragma unroll
        for (int v = 0; v < kNumVecs; ++v) {
          const float x[4] = {state.out[4 * v], state.out[4 * v + 1], state.out[4 * v + 2], state.out[4 * v + 3]};
          cast_vec<Element>(x).store(row_gmem + first_column + v * 4 * kThreadsPerRow);
        }
      };
      if (group_idx != kAllGroups) {
        const int64_t at = unit.partial_row(partial.slot_of_group(group_idx), num_rows, params.num_kv_heads) + row;
        store_to(params.partial_out + at * kHeadDim);
        if (first_column == 0) params.partial_lse[at] = lse;
        return;
      }
      const QueryRow query = unit.query_row(group_size, item.q_tile * Config::kBlockM + row);
      if constexpr (Config::kHasSinks) {
        const float factor = add_sink(params.sinks[query.qo_head_idx], lse);
#pragma unroll
        for (float& x : state.out) x *= factor;
      }
      store_to(static_cast<T*>(params.out) + unit.offset(query, params.out_token_stride, params.out_head_stride));
      if (first_column == 0 && params.lse != nullptr) {
        params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse;
      }
    };
    const int64_t rows_per_slot = int64_t(num_rows) * params.num_kv_heads;
    struct Batch {
      float x[kBatch][4 * kNumVecs], lse[kBatch];
    };
    const auto load = [&](Batch& batch, int part, int first) {
      part = min(part, num_parts - 1);
      const int64_t row = first_row + part / kThreadsPerRow;
      const float4* vec_gmem =
          reinterpret_cast<const float4*>(params.partial_out) + row * kVecsPerRow + part % kThreadsPerRow;
      const float* lse_gmem = params.partial_lse + row;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t slot_rows = min(first + j, count - 1) * rows_per_slot;
#pragma unroll
        for (int v = 0; v < kNumVecs; ++v) {
          const float4 x = __ldcg(vec_gmem + slot_rows * kVecsPerRow + v * kThreadsPerRow);
          batch.x[j][4 * v] = x.x, batch.x[j][4 * v + 1] = x.y, batch.x[j][4 * v + 2] = x.z,
                         batch.x[j][4 * v + 3] = x.w;
        }
        const float lse = __ldcg(lse_gmem + slot_rows);
        batch.lse[j] = first + j < count ? lse : kMinusInfinity;
      }
    };
    Batch batch, next;
    State state;
    int part = fresh_thread_idx(), first = 0;
    load(batch, part, first);
#pragma unroll 1
    while (part < num_parts) {
      const bool is_last = first + kBatch >= count;
      const int next_part = is_last ? part + kNumThreads : part, next_first = is_last ? 0 : first + kBatch;
      load(next, next_part, next_first);
      state.merge(batch.x, batch.lse);
      if (is_last) {
        store(part, state);
        state = {};
      }
      batch = next;
      part = next_part, first = next_first;
    }
    return true;
  });
}

}  // namespace flashinfer
