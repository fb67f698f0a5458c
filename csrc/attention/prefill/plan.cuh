// SPDX-License-Identifier: Apache-2.0
// The planner of prefill: one block that reads the lengths on the device and writes the list of work items.
//
//   query tiles of request b:  ceil(qo_len_b * group_size / block_m), each over the KV tiles that its rows see
//   items:                     of a query tile of n KV tiles max(1, ceil(n / limit)), runs of about equal length, or
//                              of `limit` each and a rest
//
//   qo_indptr [batch_size + 1], the KV's lengths -> items [max_items], the longest first, and the head of the schedule
//   (prefill/params.h)
//
// An item's cost is its number of KV tiles. Costs are kept in bins (exact up to 32, then 16 to an octave), and the bins
// are all that the decisions look at, so that they cost the same for ten query tiles and for a hundred thousand:
//   1. count the query tiles of every request; sum them up
//   2. histogram of the costs of the query tiles
//   3. choose the longest run of KV tiles one item may have: every thread estimates the time of one choice
//   4. write the items, sorted by cost with the longest first, split where longer than the choice allows
//
// Of a mixed batch (kIsMixed) it leaves out the requests that decode takes, chooses on how many blocks its
// launch goes on beside decode's, and plans for those (share.h).
//
// Offsets and lengths may be anything. Nothing is written outside of the workspace for that: there are at most
// max_items query tiles, of at most kMaxKvLen keys each, and the kernel keeps their rows within q and out.
#pragma once

#include "attention/kv_view.cuh"
#include "attention/prefill/fill.cuh"
#include "attention/prefill/share.h"
#include "attention/prefill/work.cuh"
#include "attention/visibility.cuh"
#include "device/pdl.cuh"
#include "device/scan.cuh"
#include "device/search.cuh"

namespace flashinfer {

struct CostBins {
  static constexpr int kNumExact = 32, kNumPerOctave = 16, kNum = kNumExact + (31 - 5) * kNumPerOctave;

  __device__ __forceinline__ static int of(int32_t cost) {
    if (cost < kNumExact) return cost;
    const int octave = 31 - __clz(cost);
    return kNumExact + (octave - 5) * kNumPerOctave + ((cost >> (octave - 4)) & (kNumPerOctave - 1));
  }
  // The largest cost in a bin.
  __device__ __forceinline__ static int32_t bound(int bin) {
    if (bin < kNumExact) return bin;
    const int octave = (bin - kNumExact) / kNumPerOctave + 5, step = (bin - kNumExact) % kNumPerOctave;
    return ((kNumPerOctave + step + 1) << (octave - 4)) - 1;
  }
};

constexpr int32_t kMaxKvLen = 1 << 30;   // of a request that can be true
constexpr int32_t kMaxFixedSplits = 16;  // for which the host makes sure of room (prefill/launch.py)

struct PlanLists {
  alignas(16) int32_t warp_sums[kWarpSize];
  int32_t num_tiles_of_cost[CostBins::kNum];
  int32_t occupied_bins[CostBins::kNum];  // those with a tile in them, the most costly first
  int32_t num_occupied;
  int32_t num_items_of_cost[CostBins::kNum];  // after splitting
  int32_t first_item_of_cost[CostBins::kNum];
  int32_t max_cost, max_rows;      // of any query tile
  int32_t num_kv_pages;            // of requests that are listed
  unsigned long long best_choice;  // estimated time and whose it is, to be minimized
  int32_t limit;                   // that one's
  int32_t num_partial_rows, num_counters;
};

template <bool kIsMixed>
struct PrefillPlanSmem : PlanLists {};
template <>
struct PrefillPlanSmem<true> : PlanLists {
  unsigned long long num_read;    // KV tiles that the requests decode takes see
  unsigned long long best_share;  // estimated time and blocks left to decode, to be minimized
  int32_t num_blocks;             // that take units
  int32_t num_decoded;            // requests that decode takes
};

// Number of splits of an item of this cost when no run may be longer than `limit`.
__device__ __forceinline__ int32_t num_splits_of(int32_t cost, int32_t limit) {
  return cost > limit ? ceil_div(cost, limit) : 1;
}

// Config: kKvStorage, kIsMixed, kNumThreads, Function.
template <class Config>
struct PrefillPlanner {
  static constexpr int kNumThreads = Config::kNumThreads;
  const PrefillPlanParams& params;
  PrefillPlanSmem<Config::kIsMixed>& smem;

  __device__ __forceinline__ int32_t qo_begin(int32_t request_idx) const {
    return params.qo_indptr != nullptr ? params.qo_indptr[request_idx] : request_idx * params.qo_len;
  }
  __device__ __forceinline__ int32_t qo_len(int32_t request_idx) const {
    return params.qo_indptr != nullptr ? params.qo_indptr[request_idx + 1] - params.qo_indptr[request_idx]
                                       : params.qo_len;
  }

  __device__ __forceinline__ int64_t num_rows(int32_t request_idx) const {
    return int64_t(qo_len(request_idx)) * params.group_size;
  }
  // Blocks that take units.
  __device__ __forceinline__ int32_t num_blocks() const {
    if constexpr (Config::kIsMixed) return smem.num_blocks;
    return params.num_blocks;
  }

  // Requests that are not decode's.
  __device__ __forceinline__ int32_t num_listed() const {
    if constexpr (Config::kIsMixed) return params.batch_size - smem.num_decoded;
    return params.batch_size;
  }

  // The cost that decisions attribute to a bin: no tile in it costs more.
  __device__ __forceinline__ int32_t bin_cost(int bin) const { return min(CostBins::bound(bin), smem.max_cost); }

  // tile_indptr[i] = query tiles of requests before i, as far as there may be items. max_items is at most 2^20, and the
  // sum over a block of threads cannot overflow.
  __device__ __forceinline__ void count_tiles() const {
    if (threadIdx.x == 0) params.tile_indptr[0] = 0;
    int32_t num_before = 0;
    for (int32_t first = 0; first < params.batch_size; first += kNumThreads) {
      const int32_t request_idx = first + threadIdx.x;
      int64_t num_rows = request_idx < params.batch_size ? this->num_rows(request_idx) : 0;
      if constexpr (Config::kIsMixed) {
        if (num_rows > 0 && leaves_to_decode(request_idx)) num_rows = 0;
      }
      const int64_t num_tiles = num_rows > 0 ? (num_rows + params.block_m - 1) / params.block_m : 0;
      const int32_t num_listed = int32_t(num_tiles < params.max_items ? num_tiles : params.max_items);
      const auto scan = scan_block<kNumThreads>(num_listed, smem.warp_sums);
      const int32_t sum = min(num_before + scan.before + num_listed, params.max_items);
      if (request_idx < params.batch_size) params.tile_indptr[request_idx + 1] = sum;
      num_before = min(num_before + scan.total, params.max_items);
    }
    __syncthreads();
  }

  // Whether a request of the mixed batch is decode's (decode/plan.cuh); if so, counts the KV tiles that it sees.
  __device__ __forceinline__ bool leaves_to_decode(int32_t request_idx) const {
    const int32_t kv_len = min(max(KvView<Config::kKvStorage>::of_request(params.kv, request_idx).len, 0), kMaxKvLen);
    if (qo_len(request_idx) != 1 || kv_len == 0) return false;
    const Range tiles =
        visibility_of(request_idx).tiles_of(0, params.block_m, params.group_size, 1, kv_len, params.block_n);
    atomicAdd(&smem.num_read, (unsigned long long)(tiles.end - tiles.begin));
    atomicAdd(&smem.num_decoded, 1);
    return true;
  }

  __device__ __forceinline__ auto visibility_of(int32_t request_idx) const {
    return VisibilityBy<typename Config::Function>{params.mask, params.window_left >= 0, params.window_left,
                                                   request_idx, &params.extras};
  }

  // visit(item, cost) for every query tile, `item` not yet split.
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(const Visit& visit) const {
    const int32_t num_tiles = params.tile_indptr[params.batch_size];
    for (int32_t i = threadIdx.x; i < num_tiles; i += kNumThreads) {
      const int32_t request_idx = find_segment(params.tile_indptr, params.batch_size, i);
      const auto visibility = visibility_of(request_idx);
      const auto view = KvView<Config::kKvStorage>::of_request(params.kv, request_idx);
      PrefillItem item = {};
      item.request_idx = request_idx;
      item.q_tile = i - params.tile_indptr[request_idx];
      item.q_begin = qo_begin(request_idx);
      item.qo_len = qo_len(request_idx);
      item.kv_begin = view.begin;
      item.kv_len = min(max(view.len, 0), kMaxKvLen);
      const Range tiles =
          visibility.tiles_of(item.q_tile, params.block_m, params.group_size, item.qo_len, item.kv_len, params.block_n);
      item.tile_begin = tiles.begin;
      item.tile_end = tiles.end;
      visit(item, tiles.end - tiles.begin);
    }
  }

  __device__ __forceinline__ int32_t num_rows_of(const PrefillItem& item) const {
    const int64_t num_left = int64_t(item.qo_len) * params.group_size - item.q_tile * params.block_m;
    return num_left < params.block_m ? int32_t(num_left) : params.block_m;
  }

  __device__ __forceinline__ void count_costs() const {
    for_each_tile([&](const PrefillItem& item, int32_t cost) {
      atomicAdd(&smem.num_tiles_of_cost[CostBins::of(cost)], 1);
      atomicMax(&smem.max_cost, cost);
      atomicMax(&smem.max_rows, num_rows_of(item));
      if (params.fixed_split > 0) {
        const int32_t num_splits = fixed_splits_of(item, cost);
        atomicAdd(&smem.num_items_of_cost[CostBins::of(ceil_div(cost, num_splits))], num_splits);
      }
      const bool is_table = Config::kKvStorage == kKvPaged && params.kv.indptr == nullptr;
      if ((is_table || Config::kIsMixed) && item.q_tile == 0) {
        atomicAdd(&smem.num_kv_pages, ceil_div(item.kv_len, int32_t(params.kv.page_size.divisor)));
      }
    });
    __syncthreads();
    static_assert(CostBins::kNum <= kNumThreads && kNumThreads <= kMaxSplits);
    const int bin = CostBins::kNum - 1 - int(threadIdx.x);
    const bool is_occupied = bin >= 0 && smem.num_tiles_of_cost[bin] > 0;
    const auto scan = scan_block<kNumThreads>(int32_t(is_occupied), smem.warp_sums);
    if (is_occupied) smem.occupied_bins[scan.before] = bin;
    if (threadIdx.x == 0) smem.num_occupied = scan.total;
    __syncthreads();
  }

  // Of latent attention alone.
  static constexpr bool kMayFillGaps = Config::kKvStorage == kKvPagedLens && !Config::kIsMixed;
  __device__ __forceinline__ bool fills_gaps() const { return kMayFillGaps && params.costs.fills_gaps != 0; }

  // On how many blocks a mixed batch's prefill goes on: every thread estimates the time of one choice.
  __device__ __forceinline__ void choose_blocks() const {
    const float num_kv_heads = float(params.num_kv_heads);
    const float time_to_read = num_kv_heads * params.time_to_read;
    const DeviceShare share = {params.num_blocks, float(smem.num_read) * time_to_read,
                               float(smem.num_decoded) * time_to_read};
    const int32_t num_left = threadIdx.x, num_kept = params.num_blocks - num_left;
    if (num_left == 0 || (params.time_to_read > 0.f && num_kept > 0)) {
      ListEnd end = ListEnd::of(num_kept);
      for (int i = 0; i < smem.num_occupied; ++i) {
        const int bin = smem.occupied_bins[i];
        end.take(float(smem.num_tiles_of_cost[bin]) * num_kv_heads, float(bin_cost(bin)) + params.costs.of_item);
      }
      const float cost_of_split = params.costs.of_item + params.costs.of_partial + float(params.costs.min_split);
      const float time = share.time_with(num_kept, end.time_in_splits(cost_of_split));
      atomicMin(&smem.best_share, (static_cast<unsigned long long>(__float_as_uint(time)) << 32) | uint32_t(num_left));
    }
    __syncthreads();
    smem.num_blocks = params.num_blocks - int32_t(smem.best_share & 0xffffffffu);
    if (threadIdx.x == 0) params.schedule->num_blocks = smem.num_blocks;
    __syncthreads();
  }

  // How an item is cut: `num` runs of `len` KV tiles, the last of last_len. Where short items fill gaps, runs as long
  // as may be are few, and rests are short.
  struct Runs {
    int32_t num, len, last_len;
  };
  __device__ __forceinline__ Runs runs_of(int32_t cost, int32_t limit) const {
    const int32_t num = num_splits_of(cost, limit);
    if (num == 1) return {1, cost, cost};
    if (fills_gaps()) return {num, limit, cost - (num - 1) * limit};
    return {num, ceil_div(cost, num), ceil_div(cost, num)};
  }

  // In KV tiles of time.
  struct Estimate {
    float load;     // of a block on average
    float longest;  // item
    float time;     // infinite where the workspace is too small
  };

  // `time` is an upper bound when blocks take items as they come, the longest first: the average load plus one longest
  // item, or as many rounds of the longest as there are. With one KV head the list really is taken in that order, and
  // an item ends no later than the load of those before it plus itself: those that are split, which are longer than
  // half of the limit, come before all that are shorter.
  __device__ __forceinline__ Estimate estimate(int32_t limit) const {
    const bool is_in_order = params.num_kv_heads == 1;
    const float num_blocks = float(this->num_blocks());
    float num_units = 0.f, load = 0.f, longest = 0.f, num_counters = 0.f, num_slots = 0.f, time = 0.f;
    for (int i = 0; i < smem.num_occupied; ++i) {
      const int bin = smem.occupied_bins[i];
      const int32_t cost = bin_cost(bin);
      const Runs runs = runs_of(cost, limit);
      const int32_t num_splits = runs.num;
      const float count = float(smem.num_tiles_of_cost[bin]) * float(params.num_kv_heads);
      const float split_cost =
          float(runs.len) + params.costs.of_item + (num_splits > 1 ? params.costs.of_partial : 0.f);
      num_units += count * float(num_splits);
      load += count * (float(num_splits) * split_cost - float(runs.len - runs.last_len));
      longest = fmaxf(longest, split_cost);
      if (is_in_order || i + 1 == smem.num_occupied) {
        const float num_rounds = ceilf(num_units / num_blocks);
        const float last = is_in_order && 2 * cost <= limit ? split_cost : longest;
        time = fmaxf(time, fminf(load / num_blocks + last, num_rounds * longest));
      }
      if (num_splits > 1) {
        const PartialResults partial = PartialResults::of(num_splits);
        num_counters += float(smem.num_tiles_of_cost[bin]) * float(partial.num_counters());
        num_slots += float(smem.num_tiles_of_cost[bin]) * float(partial.num_slots());
      }
    }
    const bool fits = num_slots * float(smem.max_rows) <= float(params.max_partial_rows) &&
                      num_counters <= float(params.max_counters) &&
                      num_units <= float(params.max_items) * float(params.num_kv_heads);
    load /= num_blocks;
    return {load, longest, fits || num_slots == 0.f ? time : __builtin_bit_cast(float, 0x7f800000)};
  }

  // KV heads whose items are taken in turn before those of the next heads: with many heads few, so that blocks at work
  // at the same time find the KV that others have read in the L2 cache. Not so few that the last heads' longest item
  // keeps others waiting for more than kMaxIdle of the time.
  __device__ __forceinline__ int32_t num_heads_abreast(const Estimate& chosen) const {
    constexpr int32_t kEnoughReaders = 8;  // at work on one request and KV head
    constexpr float kMaxIdle = 1.f / 64.f;
    const bool has_enough_readers = num_blocks() >= int64_t(kEnoughReaders) * params.num_kv_heads * num_listed();
    const bool has_one_reader = params.tile_indptr[params.batch_size] < 2 * num_listed();  // appends, of all heads
    if (has_enough_readers || has_one_reader) return params.num_kv_heads;
    const float num_heads = (chosen.longest - kMaxIdle * chosen.load) / chosen.load * float(params.num_kv_heads);
    return min(max(int32_t(ceilf(num_heads)), 1), params.num_kv_heads);
  }

  // Splits of a query tile that do not depend on other requests. Only those of requests of one query tile: the others
  // fill the device by themselves, and their partial results would take too much room.
  __device__ __forceinline__ int32_t fixed_splits_of(const PrefillItem& item, int32_t cost) const {
    if (int64_t(item.qo_len) * params.group_size > params.block_m) return 1;
    return min(num_splits_of(cost, params.fixed_split), kMaxFixedSplits);
  }

  // Where short items fill gaps: the longest run, of choices about as long as a block's share and longer. A warp plays
  // each through (fill.cuh).
  __device__ __forceinline__ int32_t choose_filling_limit() const {
    __shared__ FillChoices choices;
    const int32_t choice = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
    if (choice < FillChoices::kNum) {
      float load = 0.f;  // of a block
      for (int i = lane_idx; i < smem.num_occupied; i += kWarpSize) {
        const int bin = smem.occupied_bins[i];
        load += float(smem.num_tiles_of_cost[bin]) * float(bin_cost(bin));
      }
      load = warp_reduce(load, Sum{}) / float(num_blocks());
      const int32_t max_cost = max(smem.max_cost, 1), step = max(int32_t(load / 32.f), 1);
      const int32_t shortest = max(max(int32_t(load * 0.97f), params.costs.min_split), ceil_div(max_cost, kMaxSplits));
      const int32_t longest = min(max(shortest, 1) + (FillChoices::kNum - 1) * step, max_cost);
      const int32_t limit = max(longest - choice * step, min(max(shortest, 1), max_cost));
      const float units = float(FillChoices::kMaxSize) / (fmaxf(load, float(longest)) + params.costs.of_item);

      choices.clear(choice);
      float num_items = 0.f, num_partial = 0.f, num_slots = 0.f, num_counters = 0.f;
      for (int i = lane_idx; i < smem.num_occupied; i += kWarpSize) {
        const int bin = smem.occupied_bins[i], num_tiles = smem.num_tiles_of_cost[bin];
        const Runs runs = runs_of(bin_cost(bin), limit);
        choices.add(choice, num_tiles * (runs.num - 1), (float(runs.len) + params.costs.of_item) * units);
        choices.add(choice, num_tiles, (float(runs.last_len) + params.costs.of_item) * units);
        num_items += float(num_tiles) * float(runs.num);
        if (runs.num == 1) continue;
        const PartialResults partial = PartialResults::of(runs.num);
        num_partial += float(num_tiles) * float(runs.num);
        num_slots += float(num_tiles) * float(partial.num_slots());
        num_counters += float(num_tiles) * float(partial.num_counters());
      }
      num_items = warp_reduce(num_items, Sum{}), num_partial = warp_reduce(num_partial, Sum{});
      num_slots = warp_reduce(num_slots, Sum{}), num_counters = warp_reduce(num_counters, Sum{});
      const bool fits =
          num_partial == 0.f || (num_slots * float(smem.max_rows) <= float(params.max_partial_rows) &&
                                 num_counters <= float(params.max_counters) && num_items <= float(params.max_items));
      const float num_merged = ceilf(num_partial / float(num_blocks()));  // by a block
      const float time = float(choices.play(choice, num_blocks())) / units + num_merged * params.costs.of_partial;
      if (lane_idx == 0) {  // a draw goes to fewer splits; where none fits, nothing is split
        const uint32_t time_bits = __float_as_uint(fits ? time : 1e30f);
        atomicMin(&smem.best_choice,
                  static_cast<unsigned long long>(time_bits) << 32 | uint32_t(-(fits ? limit : max_cost)));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) params.schedule->num_heads_abreast = params.num_kv_heads;
    return -int32_t(smem.best_choice & 0xffffffffu);
  }

  // The choices: cut the longest item into 1, 2, ..., kNumThreads splits, and the others into splits no longer.
  __device__ __forceinline__ int32_t choose_limit() const {
    const int32_t idx = threadIdx.x, max_cost = smem.max_cost;
    if constexpr (kMayFillGaps) {
      if (fills_gaps()) return choose_filling_limit();
    }
    const bool is_fixed = params.fixed_split > 0;  // the estimate then tells of KV heads abreast alone
    const int32_t limit = max(is_fixed ? max_cost : max(ceil_div(max_cost, idx + 1), params.costs.min_split), 1);
    const bool is_choice = idx == 0 || (!is_fixed && ceil_div(max_cost, limit) == idx + 1);
    Estimate estimate = {};
    if (is_choice) {
      estimate = this->estimate(limit);
      const float time = estimate.time * (idx == 0 ? 0.97f : 1.f);  // a draw goes to not splitting, or to fewer splits
      atomicMin(&smem.best_choice, (static_cast<unsigned long long>(__float_as_uint(time)) << 32) | uint32_t(idx));
    }
    __syncthreads();
    const int32_t best = int32_t(smem.best_choice & 0xffffffffu);
    if (idx == best) smem.limit = limit, params.schedule->num_heads_abreast = num_heads_abreast(estimate);
    __syncthreads();
    return smem.limit;
  }

  // Where the items of each cost start in the list, the longest first.
  __device__ __forceinline__ void place_costs(int32_t limit) const {
    for (int i = threadIdx.x; i < smem.num_occupied && params.fixed_split == 0; i += kNumThreads) {
      const int bin = smem.occupied_bins[i];
      const Runs runs = runs_of(bin_cost(bin), limit);
      atomicAdd(&smem.num_items_of_cost[CostBins::of(runs.len)], smem.num_tiles_of_cost[bin] * (runs.num - 1));
      atomicAdd(&smem.num_items_of_cost[CostBins::of(runs.last_len)], smem.num_tiles_of_cost[bin]);
    }
    __syncthreads();
    const int bin = CostBins::kNum - 1 - threadIdx.x;
    const int32_t num_items = bin >= 0 ? smem.num_items_of_cost[bin] : 0;
    const auto scan = scan_block<kNumThreads>(num_items, smem.warp_sums);
    if (bin >= 0) smem.first_item_of_cost[bin] = scan.before;
    if (bin == 0) params.schedule->num_items = min(scan.total, params.max_items);
    __syncthreads();
  }

  __device__ __forceinline__ void write_items(int32_t limit) const {
    for_each_tile([&](PrefillItem item, int32_t cost) {
      const bool is_fixed = params.fixed_split > 0;
      // Else fixed by the bin, as counted. A split may be left empty where the cost is below the bin's bound.
      const auto fixed_runs = [&] {
        const int32_t num = fixed_splits_of(item, cost), len = ceil_div(cost, num);
        return Runs{num, len, len};
      };
      const Runs runs = is_fixed ? fixed_runs() : runs_of(bin_cost(CostBins::of(cost)), limit);
      const int32_t num_splits = runs.num, first_tile = item.tile_begin, end_tile = item.tile_end;
      const int32_t split_len = is_fixed || !fills_gaps() ? ceil_div(cost, num_splits) : runs.len;
      int32_t num_alike = 1, place, last_place;
      if (is_fixed || !fills_gaps()) {
        place = atomicAdd(&smem.first_item_of_cost[CostBins::of(runs.len)], num_splits);
        last_place = place + num_splits - 1;
      } else {
        // Where the list is taken in its order, tiles that are cut alike take turns in it: those of one request are
        // then at work on the same KV at the same time, and find it in the L2 cache.
        const int32_t lane_idx = threadIdx.x % kWarpSize;
        const uint32_t alike = __match_any_sync(__activemask(), CostBins::of(cost));
        const int32_t leader = __ffs(alike) - 1, rank = __popc(alike & ((1u << lane_idx) - 1));
        num_alike = __popc(alike);
        place = last_place = 0;
        if (lane_idx == leader) {
          place = atomicAdd(&smem.first_item_of_cost[CostBins::of(runs.len)], num_alike * (num_splits - 1));
          last_place = atomicAdd(&smem.first_item_of_cost[CostBins::of(runs.last_len)], num_alike);
        }
        place = __shfl_sync(alike, place, leader) + rank;
        last_place = __shfl_sync(alike, last_place, leader) + rank;
      }
      item.num_splits = num_splits;
      if (num_splits > 1) {
        const PartialResults partial = PartialResults::of(num_splits);
        const int32_t num_rows = num_rows_of(item) * partial.num_slots();
        item.partial_row = atomicAdd(&smem.num_partial_rows, num_rows);
        item.counter = atomicAdd(&smem.num_counters, partial.num_counters());
        // The host made sure of room, unless offsets are not true. Such requests are left out.
        const bool fits = item.partial_row + num_rows <= params.max_partial_rows &&
                          item.counter + partial.num_counters() <= params.max_counters;
        if (is_fixed && !fits) item.qo_len = 0, item.num_splits = 1;
      }
#pragma unroll 1  // most are one
      for (int32_t split = 0; split < num_splits; ++split, place += num_alike) {
        item.split_idx = split;
        item.tile_begin = min(first_tile + split * split_len, end_tile);
        item.tile_end = min(item.tile_begin + split_len, end_tile);
        if (split + 1 == num_splits) place = last_place;
        if (place < params.max_items) params.items[place] = item;
      }
    });
    __syncthreads();
    const int32_t num_counters = min(smem.num_counters, params.max_counters);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_counters * params.num_kv_heads; i += kNumThreads) params.counters[i] = 0;
    if (threadIdx.x < sizeof(params.schedule->taken) / 4) params.schedule->taken[threadIdx.x] = 0;
    if (threadIdx.x != 0) return;
    params.schedule->has_splits = smem.num_counters > 0;
    params.schedule->num_kv_pages = smem.num_kv_pages;
    params.schedule->next_unit = params.schedule->num_done = 0;
  }
};

template <class Config>
__device__ void prefill_plan(const PrefillPlanParams& params) {
  __shared__ PrefillPlanSmem<Config::kIsMixed> smem;
#pragma unroll 1
  for (int i = threadIdx.x; i < int(sizeof(smem) / 4); i += Config::kNumThreads)
    reinterpret_cast<int32_t*>(&smem)[i] = 0;
  __syncthreads();
  if (threadIdx.x == 0) smem.best_choice = ~0ull;
  if constexpr (Config::kIsMixed) {
    if (threadIdx.x == 0) smem.best_share = ~0ull;
  }
  wait_for_previous_kernel();

  const PrefillPlanner<Config> planner{params, smem};
  planner.count_tiles();
  planner.count_costs();
  if constexpr (Config::kIsMixed) planner.choose_blocks();
  const int32_t limit = planner.choose_limit();
  planner.place_costs(limit);
  planner.write_items(limit);
}

}  // namespace flashinfer
