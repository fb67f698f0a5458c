// SPDX-License-Identifier: Apache-2.0
// What a row weighs: from scores to weights, and from the weights of elements to those of threads, warps and the row.
#pragma once

#include "device/fast_math.cuh"
#include "device/mailbox.cuh"
#include "sampling/row.cuh"

namespace flashinfer {

// From a score to its weight. Weights of logits are relative to the largest, so that they never overflow.
template <class Config>
struct Weigh {
  float max;    // of the row
  float scale;  // log2(e) / temperature

  __device__ __forceinline__ float operator()(float score) const {
    return Config::kInput == kLogits ? fast_exp2((score - max) * scale) : score;
  }
};

// The largest score and the sum of weights, of a thread, a block or a row. The sum of logits' weights is relative to
// exp2(max * scale). A NaN, or a logit of +infinity, makes the sum NaN.
struct alignas(8) Stats {
  float max, sum;
};

__device__ __forceinline__ float finite_or_zero(float max) {
  return max == -kInfinity ? 0.f : max;
}

// The one reading of the row: this thread's share of it.
template <class Config>
__device__ __forceinline__ Stats read_row(RowSlice<Config>& slice, float scale) {
  using Slice = RowSlice<Config>;
  Stats stats{Slice::kPadding, 0.f};
  slice.read([&](const typename Slice::Granule* batch, int) {
    float batch_max = Slice::kPadding;
#pragma unroll
    for (int u = 0; u < Slice::kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Slice::kVecSize; ++i) batch_max = fmaxf(batch_max, to_float(batch[u][i]));
    }
    const float old_max = stats.max;
    stats.max = fmaxf(old_max, batch_max);
    if constexpr (Config::kInput == kOrderOnly) return;
    const float base = finite_or_zero(stats.max);
    float batch_sum = 0.f;
#pragma unroll
    for (int u = 0; u < Slice::kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Slice::kVecSize; ++i) {
        batch_sum += Weigh<Config>{base, scale}(to_float(batch[u][i]));
      }
    }
    if constexpr (Config::kInput == kLogits) stats.sum *= fast_exp2((old_max - base) * scale);
    stats.sum += batch_sum;
  });
  return stats;
}

// Brings a sum from one maximum to another, at least as large.
template <class Config>
__device__ __forceinline__ float rebase(Stats stats, float max, float scale) {
  return Config::kInput == kLogits ? stats.sum * fast_exp2((stats.max - finite_or_zero(max)) * scale) : stats.sum;
}

// What each warp of the cluster has to say, in every block's shared memory: tables this small are cheaper to reduce in
// every warp than to reduce once and hand out.
template <class Config, class Entry>
struct WarpTable {
  static constexpr int kClusterSize = Config::kClusterSize, kNumWarps = Config::kNumThreads / kWarpSize;
  static constexpr int kNumEntries = kClusterSize * kNumWarps;
  static constexpr int kEntriesPerLane = ceil_div(kNumEntries, kWarpSize);

  Entry entries[kEntriesPerLane * kWarpSize];

  // Every warp of the cluster gives its entry (the same in all lanes) and receives the table, for the num_before + 1st
  // time. Other bytes may come with it. Returning, a warp knows that all others of the cluster came so far as to call.
  // A table is written again only after another exchange of this kind: so nobody still reads it.
  __device__ __forceinline__ void exchange(const Entry& mine, Mailbox<kClusterSize>& mailbox, int num_before = 0,
                                           int other_bytes = 0) {
    const int lane_idx = threadIdx.x % kWarpSize;
    const int place = cluster_rank<kClusterSize>() * kNumWarps + threadIdx.x / kWarpSize;
    if (lane_idx < kClusterSize) mailbox.send(&entries[place], mine, lane_idx);
    mailbox.receive(kNumEntries * sizeof(Entry) + other_bytes, num_before);
  }
  // visit(entry) for this lane's part of the table.
  template <class Visit>
  __device__ __forceinline__ void for_lane(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kEntriesPerLane; ++i) {
      const int place = (threadIdx.x % kWarpSize) * kEntriesPerLane + i;
      if (place < kNumEntries) visit(entries[place]);
    }
  }
};

// All exchanges between the blocks of a row. A mailbox is used again only after an exchange between all warps.
template <int kClusterSize>
struct RowMail {
  Mailbox<kClusterSize> totals, above;                    // tables of weights
  Mailbox<kClusterSize> pivots[2];                        // tables of a search, in turn
  Mailbox<kClusterSize> sent, list, floor;                // of a search: what blocks sent to the leader, its answer
  Mailbox<kClusterSize> candidates, candidate_masses[2];  // of top-p

  __device__ __forceinline__ void open() { Mailbox<kClusterSize>::open(&totals, sizeof(*this) / sizeof(totals)); }
};

// What there is to draw from or to normalize: the elements above a floor, at first all of them, and their weights by
// thread, by warp and in all.
template <class Config>
struct RowTotals {
  static constexpr int kClusterSize = Config::kClusterSize, kNumThreads = Config::kNumThreads;
  using Table = WarpTable<Config, Stats>;
  struct Smem {
    Table warps, warps_above;
  };
  using Mail = RowMail<kClusterSize>;

  const Table* warps;  // sums relative to the entries' own maxima
  Stats row, thread;
  float floor, scale;
  float thread_max, warp_max;
  float lowest_warp_max;  // the smallest that any warp of the cluster has

  __device__ __forceinline__ Weigh<Config> weigh() const { return {row.max, scale}; }
  // Nothing to draw from: no weight at all, or NaN.
  __device__ __forceinline__ bool is_valid() const { return row.sum > 0.f && row.sum < kInfinity; }

  // Of the whole row. Collective over the cluster. maxima_smem[kNumThreads], if not null, receives the maxima of groups
  // of kClusterSize threads, from all blocks.
  __device__ __forceinline__ static RowTotals share(Stats mine, float scale, Smem& smem, Mail& mail,
                                                    float* maxima_smem) {
    RowTotals totals;
    totals.warps = &smem.warps;
    totals.thread = mine;
    totals.thread_max = mine.max;
    totals.floor = -kInfinity;
    totals.scale = scale;
    const float group_max = warp_reduce<kClusterSize>(mine.max, Max{});
    totals.warp_max = group_max;
#pragma unroll
    for (int offset = kClusterSize; offset < kWarpSize; offset *= 2) {
      totals.warp_max = fmaxf(totals.warp_max, __shfl_xor_sync(0xffffffffu, totals.warp_max, offset));
    }
    const float warp_sum = warp_reduce(rebase<Config>(mine, totals.warp_max, scale), Sum{});

    cluster_await<kClusterSize>();
    if (maxima_smem) {
      constexpr int kGroupsPerBlock = kNumThreads / kClusterSize;
      const int place = cluster_rank<kClusterSize>() * kGroupsPerBlock + threadIdx.x / kClusterSize;
      mail.totals.send(&maxima_smem[place], group_max, threadIdx.x % kClusterSize);
    }
    smem.warps.exchange({totals.warp_max, warp_sum}, mail.totals, 0, maxima_smem ? kNumThreads * sizeof(float) : 0);

    float max = RowSlice<Config>::kPadding, lowest = kInfinity, sum = 0.f;
    smem.warps.for_lane([&](const Stats& warp) {
      max = fmaxf(max, warp.max);
      if (warp.max > RowSlice<Config>::kPadding) lowest = fminf(lowest, warp.max);
    });
    totals.row.max = warp_reduce(max, Max{});
    totals.lowest_warp_max = -warp_reduce(-lowest, Max{});
    smem.warps.for_lane([&](const Stats& warp) { sum += rebase<Config>(warp, totals.row.max, scale); });
    totals.row.sum = warp_reduce(sum, Sum{});
    return totals;
  }

  // Of the elements above a floor. Once for a row; collective over the cluster.
  __device__ __forceinline__ RowTotals above(float new_floor, RowSlice<Config>& slice, Smem& smem, Mail& mail) const {
    RowTotals part = *this;
    part.floor = new_floor;
    part.warps = &smem.warps_above;
    part.warp_max = part.thread.max = row.max;
    part.thread.sum = 0.f;
    if (thread_max > new_floor) {
      slice.for_each([&](float score, int, int) {
        if (score > new_floor) part.thread.sum += weigh()(score);
      });
    }
    smem.warps_above.exchange({row.max, warp_reduce(part.thread.sum, Sum{})}, mail.above);
    float sum = 0.f;
    smem.warps_above.for_lane([&](const Stats& warp) { sum += warp.sum; });
    part.row.sum = warp_reduce(sum, Sum{});
    return part;
  }
};

constexpr float kLog2E = 1.44269504088896340736f;

}  // namespace flashinfer
