// One row of the vocabulary, spread over the threads of a thread-block cluster.
//
// The row is cut into 16-byte granules of device memory. They are dealt to the warps of all blocks in turn, a granule a
// lane, so that low token ids, which carry most of the mass in practice, are spread. A thread calls its granules slots:
// slot s is its s-th. When the row is resident, the first reading leaves it in shared memory, in its own element
// type, and every later pass stays there.
#pragma once

#include "device/cluster.cuh"
#include "device/exp2.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "sampling/params.h"

namespace flashinfer {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

template <class Config>
struct RowSlice {
  using T = typename Config::T;
  static constexpr int kVecSize = 16 / sizeof(T);
  static constexpr int kThreadsPerRow = Config::kNumThreads * Config::kClusterSize;
  static constexpr bool kResident = Config::kRowSlots > 0;
  static constexpr float kPadding = Config::kInput == kProbs ? 0.f : -kInfinity;  // weight 0, and drawn never
  static constexpr int kUnroll = Config::kUnroll;
  using Granule = Vec<T, kVecSize>;
  struct Smem {
    alignas(16) T row[kResident ? Config::kRowSlots * Config::kNumThreads * kVecSize : 1];
  };

  const T* base_gmem;        // the row, rounded down to 16 bytes
  int head, end;             // the row's elements, counted from base_gmem
  int full_begin, full_end;  // granules that lie wholly inside the row
  int num_slots;
  Smem& smem;

  __device__ __forceinline__ RowSlice(const T* row_gmem, int vocab_size, Smem& smem) : smem(smem) {
    head = (reinterpret_cast<uint64_t>(row_gmem) & 15) / sizeof(T);
    base_gmem = row_gmem - head;
    end = head + vocab_size;
    full_begin = head > 0;
    full_end = end / kVecSize;
    num_slots = ceil_div(ceil_div(end, kVecSize), kThreadsPerRow);
  }

  __device__ __forceinline__ int granule_idx(int slot, int thread_idx) const {
    const int warp = thread_idx / kWarpSize * Config::kClusterSize + cluster_rank<Config::kClusterSize>();
    return slot * kThreadsPerRow + warp * kWarpSize + thread_idx % kWarpSize;
  }
  __device__ __forceinline__ int token_id(int slot, int thread_idx, int lane) const {
    return granule_idx(slot, thread_idx) * kVecSize + lane - head;
  }

  // Reads this thread's part of the row from device memory, kUnroll granules in flight, and leaves it in shared memory
  // if the row is resident. visit(batch of kUnroll granules, first slot); what lies outside
  // the row is kPadding.
  template <class Visit>
  __device__ __forceinline__ void read(Visit visit) {
    const int thread_idx = threadIdx.x;
    for (int slot = 0; slot < num_slots; slot += kUnroll) {
      Granule batch[kUnroll];
      bool all_full = true;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int g = granule_idx(slot + u, thread_idx);
        const bool is_full = g >= full_begin && g < full_end;
        batch[u] = padding();
        if (is_full) batch[u] = Granule::load(base_gmem + int64_t(g) * kVecSize);
        all_full &= is_full;
      }
      if (!all_full) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) patch_edge(batch[u], granule_idx(slot + u, thread_idx));
      }
      if constexpr (kResident) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (slot + u < num_slots)
            batch[u].store(smem.row + ((slot + u) * Config::kNumThreads + thread_idx) * kVecSize);
        }
      }
      visit(batch, slot);
    }
  }

  // visit(granule, slot) for each granule of this thread, padding included.
  template <class Visit>
  __device__ __forceinline__ void for_each_granule(Visit visit) {
    if constexpr (kResident) {
      constexpr int kSlotsAtOnce = kVecSize > 4 ? 1 : 2;
#pragma unroll kSlotsAtOnce
      for (int slot = 0; slot < num_slots; ++slot) visit(at(slot, threadIdx.x), slot);
    } else {
      read([&](const Granule* batch, int slot) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) visit(batch[u], slot + u);
      });
    }
  }

  // visit(score, slot, lane) for each element of this thread, padding included.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    for_each_granule([&](const Granule& granule, int slot) {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) visit(to_float(granule[i]), slot, i);
    });
  }

  // Any thread's granule of this block, after read().
  __device__ __forceinline__ Granule at(int slot, int thread_idx) const {
    if constexpr (kResident) {
      return Granule::load(smem.row + (slot * Config::kNumThreads + thread_idx) * kVecSize);
    } else {
      const int g = granule_idx(slot, thread_idx);
      if (g >= full_begin && g < full_end) return Granule::load(base_gmem + int64_t(g) * kVecSize);
      Granule granule = padding();
      patch_edge(granule, g);
      return granule;
    }
  }

  __device__ __forceinline__ static Granule padding() {
    Granule granule;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) granule[i] = from_float<T>(kPadding);
    return granule;
  }

 private:
  // The first and the last granule may lie partly outside the row: take their elements one by one.
  __device__ __forceinline__ void patch_edge(Granule& granule, int g) const {
    const bool is_full = g >= full_begin && g < full_end;
    if (is_full || g * kVecSize >= end) return;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      const int element = g * kVecSize + i;
      if (element >= head && element < end) granule[i] = base_gmem[element];
    }
  }
};

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

// The row's Stats from those of its threads, and a sample of its large elements.
template <class Config>
struct RowTotals {
  static constexpr int kClusterSize = Config::kClusterSize, kNumThreads = Config::kNumThreads;
  static constexpr bool kSamples = Config::kTopK || Config::kTopP;
  struct Smem {
    WarpTable<Config, Stats> warps;
  };

  Stats row;
  float warp_max;         // of this warp
  float lowest_warp_max;  // the smallest that any warp of the cluster has

  // Collective over the cluster; ends with its barrier. maxima_smem[kNumThreads], if given, receives the maxima of
  // groups of kClusterSize threads, from all blocks.
  __device__ __forceinline__ static RowTotals share(Stats mine, float scale, Smem& smem, float* maxima_smem = nullptr) {
    RowTotals totals;
    const float group_max = warp_reduce<kClusterSize>(mine.max, Max{});
    totals.warp_max = group_max;
#pragma unroll
    for (int offset = kClusterSize; offset < kWarpSize; offset *= 2) {
      totals.warp_max = fmaxf(totals.warp_max, __shfl_xor_sync(0xffffffffu, totals.warp_max, offset));
    }
    const float warp_sum = warp_reduce(rebase<Config>(mine, totals.warp_max, scale), Sum{});

    cluster_await<kClusterSize>();
    smem.warps.push({totals.warp_max, warp_sum});
    if constexpr (kSamples) {
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
    if constexpr (kSamples) totals.lowest_warp_max = -warp_reduce(-lowest, Max{});
    smem.warps.for_lane([&](const Stats& warp) { sum += rebase<Config>(warp, totals.row.max, scale); });
    totals.row.sum = warp_reduce(sum, Sum{});
    return totals;
  }

  // No weight at all, or NaN: nothing can be drawn from this row.
  __device__ __forceinline__ bool is_valid() const { return row.sum > 0.f && row.sum < kInfinity; }
};

// ids[row] of an array of either integer width.
__device__ __forceinline__ int64_t load_index(const void* ids, int are_int64, int row) {
  return are_int64 ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
}

template <class T>
__device__ __forceinline__ const T* input_row(const SamplingParams& params, int row) {
  const int64_t input_row =
      params.row_indices ? load_index(params.row_indices, params.row_indices_are_int64, row) : row;
  return static_cast<const T*>(params.input) + input_row * params.input_stride;
}

__device__ __forceinline__ float softmax_scale(const SamplingParams& params, int row) {
  constexpr float kLog2E = 1.44269504088896340736f;
  return kLog2E / (params.temperature ? params.temperature[row] : params.temperature_value);
}

}  // namespace flashinfer
