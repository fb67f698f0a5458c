// What a row weighs: from scores to weights, and from the weights of elements to those of threads, warps and the row.
#pragma once

#include "device/exp2.cuh"
#include "sampling/row.cuh"

namespace flashinfer {

// From a score to its weight. Weights of logits are relative to the largest, so that they never overflow.
template <class Config>
struct Weigh {
  float max;    // of the row
  float scale;  // log2(e) / temperature

  __device__ __forceinline__ float operator()(float score) const {
    return Config::kInput == kLogits ? exp2_approx((score - max) * scale) : score;
  }
};

// The largest score and the sum of weights, of a thread, a block or a row. The sum of logits' weights is relative to
// exp2(max * scale). A NaN, or a logit of +infinity, makes the sum NaN.
struct Stats {
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
    if constexpr (Config::kInput == kLogits) stats.sum *= exp2_approx((old_max - base) * scale);
    stats.sum += batch_sum;
  });
  return stats;
}

// Brings a sum from one maximum to another, at least as large.
template <class Config>
__device__ __forceinline__ float rebase(Stats stats, float max, float scale) {
  return Config::kInput == kLogits ? stats.sum * exp2_approx((stats.max - finite_or_zero(max)) * scale) : stats.sum;
}

// What each warp of the cluster has to say, in every block's shared memory. One barrier of the cluster spreads and
// none of the block: tables this small are cheaper to reduce in every warp than to reduce once and hand out.
template <class Config, class Entry>
struct WarpTable {
  static constexpr int kClusterSize = Config::kClusterSize, kNumWarps = Config::kNumThreads / kWarpSize;
  static constexpr int kNumEntries = kClusterSize * kNumWarps;
  static constexpr int kEntriesPerLane = ceil_div(kNumEntries, kWarpSize);

  Entry entries[kEntriesPerLane * kWarpSize];

  // Every warp of the cluster gives its entry (the same in all lanes); visible after the next cluster barrier.
  __device__ __forceinline__ void push(const Entry& mine) {
    const int lane_idx = threadIdx.x % kWarpSize;
    const int place = cluster_rank<kClusterSize>() * kNumWarps + threadIdx.x / kWarpSize;
    if (lane_idx < kClusterSize) *shared_at_rank<kClusterSize>(&entries[place], lane_idx) = mine;
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

// What there is to draw from or to normalize: the elements above a floor, at first all of them, and their weights by
// thread, by warp and in all.
template <class Config>
struct RowTotals {
  static constexpr int kClusterSize = Config::kClusterSize, kNumThreads = Config::kNumThreads;
  using Table = WarpTable<Config, Stats>;
  struct Smem {
    Table warps, warps_above;
  };

  const Table* warps;  // sums relative to the entries' own maxima
  Stats row, thread;
  float floor, scale;
  float thread_max, warp_max;
  float lowest_warp_max;  // the smallest that any warp of the cluster has

  __device__ __forceinline__ Weigh<Config> weigh() const { return {row.max, scale}; }
  // Nothing to draw from: no weight at all, or NaN.
  __device__ __forceinline__ bool is_valid() const { return row.sum > 0.f && row.sum < kInfinity; }

  // Of the whole row. Collective over the cluster; ends with its barrier. maxima_smem[kNumThreads], if not null,
  // receives the maxima of groups of kClusterSize threads, from all blocks.
  __device__ __forceinline__ static RowTotals share(Stats mine, float scale, Smem& smem, float* maxima_smem) {
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
    smem.warps.push({totals.warp_max, warp_sum});
    if (maxima_smem) {
      constexpr int kGroupsPerBlock = kNumThreads / kClusterSize;
      const int place = cluster_rank<kClusterSize>() * kGroupsPerBlock + threadIdx.x / kClusterSize;
      *shared_at_rank<kClusterSize>(&maxima_smem[place], threadIdx.x % kClusterSize) = group_max;
    }
    cluster_sync<kClusterSize>();

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

  // Of the elements above a floor. Once for a row; collective over the cluster; ends with its barrier.
  __device__ __forceinline__ RowTotals above(float new_floor, RowSlice<Config>& slice, Smem& smem) const {
    RowTotals part = *this;
    part.floor = new_floor;
    part.warps = &smem.warps_above;
    part.warp_max = part.thread.max = row.max;
    part.thread.sum = 0.f;
    if (thread_max > new_floor) {
      slice.for_each([&](float score, int, int) { part.thread.sum += score > new_floor ? weigh()(score) : 0.f; });
    }
    smem.warps_above.push({row.max, warp_reduce(part.thread.sum, Sum{})});
    cluster_sync<kClusterSize>();
    float sum = 0.f;
    smem.warps_above.for_lane([&](const Stats& warp) { sum += warp.sum; });
    part.row.sum = warp_reduce(sum, Sum{});
    return part;
  }
};

__device__ __forceinline__ float softmax_scale(const SamplingParams& params, int row) {
  constexpr float kLog2E = 1.44269504088896340736f;
  return kLog2E / (params.temperature ? params.temperature[row] : params.temperature_value);
}

}  // namespace flashinfer
