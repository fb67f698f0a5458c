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
#include "device/cp_async.cuh"
#include "device/kv_codec.cuh"
#include "device/reduce.cuh"

namespace flashinfer {

// Where the splits of a tile count: those that have left their partial results, then the shares that know.
struct SplitCounter {
  uint32_t* counter_gmem;
  uint32_t num_splits;

  // By one thread, after a barrier with those that wrote the partial results.
  __device__ __forceinline__ void arrive() const { atomic_add_release(counter_gmem, 1); }
  // By one thread, before a barrier with those that read them.
  __device__ __forceinline__ void await_all() const {
    while (load_acquire(counter_gmem) < num_splits) {
    }
  }
  // By that thread. Leaves zero for the next launch.
  __device__ __forceinline__ void leave() const {
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

// How a block merges its share of a query tile, the split_idx-th of num_splits: vectors [first, end) of the tile's
// rows.
//
// The vectors of a place, one of each split, are added up by a thread, or by several lanes of a warp that have every
// num_parts-th of them. They come to shared memory, all that a thread takes at once, and meanwhile the statistics of
// the splits become factors. To have as many on their way to registers, loops would be written out: a quarter of the
// kernel's machine code, and as much of the time to compile it.
//
// Pairs of a vector are kPairDistance columns apart: 8, or 2 and, of the two later, 16.
template <class Config, int kNumThreads, int kPairDistance>
struct ShareMerger {
  using T = typename Config::Out;
  using Row = PartialRow<Config>;
  static constexpr uint32_t kNumVecs = Row::kNumVecs, kNumSlots = Config::kBlockM < 64 ? 8 : 16;  // of a thread
  static constexpr uint32_t kUnroll = 4;                                                          // of copies
  static_assert(kNumSlots % kUnroll == 0);
  // What a split of a row counts: its LSE, the unit, which becomes the factor of its elements, and nothing.
  struct alignas(16) Stats {
    float lse, factor, unused[2];
  };
  struct Scratch {
    uint4 vecs[kNumSlots][kNumThreads];
    Stats stats[Config::kBlockM + 2 * kMaxSplits];  // of the share's rows, and of each all splits
  };
  static_assert(kPairDistance == 8 || kPairDistance == 2);

  const MlaParams& params;
  const PrefillUnit& unit;
  const FastDivisor& group_size;
  Scratch& scratch;
  uint32_t num_splits = unit.item.num_splits;
  uint32_t num_rows = max(unit.num_rows(group_size.divisor, Config::kBlockM), 0);
  uint32_t first = num_rows * kNumVecs * unit.item.split_idx / num_splits;
  uint32_t end = num_rows * kNumVecs * (unit.item.split_idx + 1) / num_splits;
  uint32_t first_row = first / kNumVecs, end_row = (end + kNumVecs - 1) / kNumVecs;
  Row first_partial = Row::at(params, unit.item.partial_row);

  __device__ __forceinline__ static uint32_t thread_idx() { return fresh_thread_idx(); }
  __device__ __forceinline__ Row partial(uint32_t split, uint32_t row) const {  // within 2^32 bytes
    return {first_partial.row_gmem + (split * num_rows + row) * Row::kNumBytes};
  }

  // A vector of a place; the next is of that place too, or of another.
  struct Cursor {
    uint32_t place, split;
    __device__ __forceinline__ void advance(uint32_t num_splits, uint32_t num_parts) {
      split += num_parts;
      if (split < num_splits) return;
      split -= num_splits;
      place += kNumThreads / num_parts;
    }
  };

  // By all threads. sync(): their barrier.
  template <class Sync>
  __device__ __forceinline__ void run(const Sync& sync) const {
    uint32_t log2_parts = 0;  // of threads that share a place, of which each has its splits
    while (1u << log2_parts < min(num_splits, uint32_t(kWarpSize)) &&
           (end - first) << (log2_parts + 1) <= kNumThreads) {
      ++log2_parts;
    }
    const uint32_t num_parts = 1u << log2_parts, lanes_of_part = kWarpSize >> log2_parts;
    const uint32_t num_steps = ((num_splits + num_parts - 1) >> log2_parts) + 1 & ~1u;  // two at once
    const uint32_t num_splits_padded = num_steps << log2_parts;
    const uint32_t num_passes = (((end - first) << log2_parts) + kNumThreads - 1) / kNumThreads;
    const uint32_t lane_idx = thread_idx() % kWarpSize, part = lane_idx >> (5 - log2_parts);
    const Cursor begin = {first + thread_idx() / kWarpSize * lanes_of_part + (lane_idx & (lanes_of_part - 1)), part};
    Cursor to_load = begin, to_add = begin;
    float out[8] = {};
    copy_stats();
    // As many as a thread has vectors; some are of places behind the last, or of no split, and zeros.
#pragma unroll 1
    for (uint32_t num_left = (num_steps * num_passes + kUnroll - 1) / kUnroll * kUnroll, is_first = 1; num_left > 0;
         is_first = 0) {
      const uint32_t num = min(num_left, kNumSlots);
      num_left -= num;
      uint32_t slot_smem = smem_address(&scratch.vecs[0][thread_idx()]);
#pragma unroll 1
      for (uint32_t i = 0; i < num; i += kUnroll) {
#pragma unroll
        for (uint32_t j = 0; j < kUnroll; ++j) {
          const bool exists = to_load.place < end && to_load.split < num_splits;
          const Row row = partial(to_load.split, to_load.place / kNumVecs);
          cp_async_16(slot_smem, row.vec(to_load.place % kNumVecs), exists);
          slot_smem += sizeof(scratch.vecs[0]);
          to_load.advance(num_splits_padded, num_parts);
        }
      }
      cp_async_commit();
      if (is_first) {
        cp_async_wait<1>();
        sync();
        weigh();
        sync();
      }
      cp_async_wait<0>();
#pragma unroll 1
      for (uint32_t i = 0; i < num; i += 2) {
        const uint32_t place = to_add.place;
        uint4 vecs[2];
        float factors[2];
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
          vecs[j] = scratch.vecs[i + j][thread_idx()];
          factors[j] = factor_of(to_add);
          to_add.advance(num_splits_padded, num_parts);
        }
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) add(out, vecs[j], factors[j]);
        if (to_add.place == place) continue;
#pragma unroll 1
        for (uint32_t step = lanes_of_part; step < kWarpSize; step *= 2) {
#pragma unroll
          for (float& x : out) x += __shfl_xor_sync(0xffffffffu, x, step);
        }
        if (part == 0 && place < end) store(out, place);
#pragma unroll
        for (float& x : out) x = 0.f;
      }
    }
  }

 private:
  __device__ __forceinline__ void copy_stats() const {
#pragma unroll 1
    for (uint32_t i = thread_idx(); i < (end_row - first_row) * num_splits; i += kNumThreads) {
      const uint32_t row = i / num_splits, split = i - row * num_splits;
      cp_async_16(smem_address(&scratch.stats[i]), partial(split, first_row + row).stats(), true);
    }
    cp_async_commit();
  }

  // Units become factors. A row is of as many lanes as it has splits, or of a warp.
  __device__ __forceinline__ void weigh() const {
    uint32_t log2_lanes = 0;
    while (1u << log2_lanes < min(num_splits, uint32_t(kWarpSize))) ++log2_lanes;
    const uint32_t num_lanes = 1u << log2_lanes, lane_idx = thread_idx() & (num_lanes - 1);
#pragma unroll 1
    for (uint32_t idx = thread_idx(); idx / kWarpSize * kWarpSize < (end_row - first_row) << log2_lanes;
         idx += kNumThreads) {
      const uint32_t row = first_row + (idx >> log2_lanes), first_split = row < end_row ? lane_idx : num_splits;
      Stats* stats = scratch.stats + (row - first_row) * num_splits;
      float max = kMinusInfinity, sum = 0.f;
#pragma unroll 1
      for (uint32_t i = first_split; i < num_splits; i += num_lanes) max = fmaxf(max, stats[i].lse);
#pragma unroll 1
      for (uint32_t step = 1; step < num_lanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
      const float shift = max == kMinusInfinity ? 0.f : max;
#pragma unroll 1
      for (uint32_t i = first_split; i < num_splits; i += num_lanes) {
        const float weight = fast_exp2(stats[i].lse - shift);
        sum += weight;
        stats[i].factor *= weight;
      }
#pragma unroll 1
      for (uint32_t step = 1; step < num_lanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float inverse = sum > 0.f ? __fdividef(1.f, sum) : 0.f;
#pragma unroll 1
      for (uint32_t i = first_split; i < num_splits; i += num_lanes) stats[i].factor *= inverse;
      if (first_split == 0 && row * kNumVecs >= first && params.lse != nullptr) {
        const QueryRow query = query_of(row);
        params.lse[int64_t(unit.item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] =
            sum > 0.f ? max + fast_log2(sum) : kMinusInfinity;
      }
    }
  }
  __device__ __forceinline__ QueryRow query_of(uint32_t row) const {
    return unit.query_row(group_size, unit.item.q_tile * Config::kBlockM + row);
  }

  __device__ __forceinline__ float factor_of(const Cursor& vec) const {
    if (vec.place >= end || vec.split >= num_splits) return 0.f;
    return scratch.stats[(vec.place / kNumVecs - first_row) * num_splits + vec.split].factor;
  }
  __device__ __forceinline__ static void add(float (&out)[8], const uint4& vec, float factor) {
    const uint32_t pairs[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_16bit<fp16>(factor == 0.f ? 0u : pairs[i]);  // it may be anything, NaN included
      out[2 * i] += pair.x * factor;
      out[2 * i + 1] += pair.y * factor;
    }
  }
  __device__ __forceinline__ void store(const float (&out)[8], uint32_t place) const {
    const uint32_t vec = place % kNumVecs, column = vec / 4 * 32 + vec % 4 * (kPairDistance == 2 ? 4 : 2);
    T* row_gmem = static_cast<T*>(params.out) +
                  unit.offset(query_of(place / kNumVecs), params.out_token_stride, params.out_head_stride);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int distance = kPairDistance == 2 ? i / 2 * 16 + i % 2 * 2 : i * 8;
      *reinterpret_cast<uint32_t*>(row_gmem + column + distance) = pack_16bit<T>(out[2 * i], out[2 * i + 1]);
    }
  }
};

// The shares of this block, after all of its units. By kNumThreads threads; sync(): their barrier. Overwrites queries
// and keys.
template <class Config, int kNumThreads, int kPairDistance, class Smem, class Sync>
__device__ __forceinline__ void merge_shares(const MlaParams& params, Smem& smem, const Sync& sync) {
  using Merger = ShareMerger<Config, kNumThreads, kPairDistance>;
  static_assert(sizeof(typename Merger::Scratch) <= sizeof(smem.q) + sizeof(smem.kv));
  auto& scratch = *reinterpret_cast<typename Merger::Scratch*>(&smem.q);
  constexpr int kWaiter = kNumThreads - 1;  // thread 0 may still be at the fence of the last unit
  const PrefillItem* item_gmem = params.items + blockIdx.x;
  PrefillItem next = *item_gmem;  // in the same trip to memory, if it exists or not
  const int32_t num_items = params.schedule->has_splits ? params.schedule->num_items : 0;
#pragma unroll 1
  for (int32_t i = blockIdx.x; i < num_items; i += gridDim.x) {
    PrefillUnit unit = {next, 0};
    item_gmem += gridDim.x;
    if (i + int32_t(gridDim.x) < num_items) next = *item_gmem;
    if (unit.item.num_splits == 1) continue;
    unit.item.confine_to(params.num_tokens);
    const SplitCounter counter = {params.counters + unit.item.counter, uint32_t(unit.item.num_splits)};
    if (fresh_thread_idx() == kWaiter) counter.await_all();
    sync();
    Merger{params, unit, smem.group_size, scratch}.run(sync);
    if (fresh_thread_idx() == kWaiter) counter.leave();
  }
}

}  // namespace flashinfer
