// One row of the vocabulary, spread over the threads of a thread-block cluster.
//
// The row is cut into 16-byte granules of device memory. Granule g belongs to thread g % (threads of the cluster), so
// that low token ids, which carry most of the mass in practice, are spread over all blocks. A thread calls its granules
// slots: slot s is its s-th. When the row is resident, the first reading leaves it in shared memory, in its own element
// type, and every later pass stays there.
#pragma once

#include "device/cluster.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "sampling/params.h"

namespace flashinfer {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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
    return slot * kThreadsPerRow + cluster_rank<Config::kClusterSize>() * Config::kNumThreads + thread_idx;
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

  // visit(score, slot, lane) for each element of this thread, padding included.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    if constexpr (kResident) {
#pragma unroll 2
      for (int slot = 0; slot < num_slots; ++slot) {
        const Granule granule = at(slot, threadIdx.x);
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) visit(to_float(granule[i]), slot, i);
      }
    } else {
      read([&](const Granule* batch, int slot) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < kVecSize; ++i) visit(to_float(batch[u][i]), slot + u, i);
        }
      });
    }
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

// The exchange of Stats through the cluster.
template <class Config>
struct RowTotals {
  static constexpr int kClusterSize = Config::kClusterSize;
  struct Smem {
    Stats blocks[kClusterSize];
    float lowest_max[kClusterSize];
    float scratch[3][Config::kNumThreads / kWarpSize];
  };

  Stats row;
  float block_max;   // of this block
  float lowest_max;  // the smallest maximum any thread of the cluster has found

  // Collective over the cluster. Ends with its barrier.
  __device__ __forceinline__ static RowTotals share(Stats mine, float scale, Smem& smem) {
    RowTotals totals;
    totals.block_max = block_reduce<Config::kNumThreads>(mine.max, Max{}, smem.scratch[0]);
    const float sum =
        block_reduce<Config::kNumThreads>(rebase<Config>(mine, totals.block_max, scale), Sum{}, smem.scratch[1]);
    const float occupied_max = mine.max > RowSlice<Config>::kPadding ? mine.max : kInfinity;
    const float lowest = -block_reduce<Config::kNumThreads>(-occupied_max, Max{}, smem.scratch[2]);

    cluster_await<kClusterSize>();
    if (threadIdx.x < kClusterSize) {
      const int rank = cluster_rank<kClusterSize>();
      *shared_at_rank<kClusterSize>(&smem.blocks[rank], threadIdx.x) = {totals.block_max, sum};
      *shared_at_rank<kClusterSize>(&smem.lowest_max[rank], threadIdx.x) = lowest;
    }
    cluster_sync<kClusterSize>();

    totals.row = {RowSlice<Config>::kPadding, 0.f};
    totals.lowest_max = kInfinity;
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      totals.row.max = fmaxf(totals.row.max, smem.blocks[rank].max);
      totals.lowest_max = fminf(totals.lowest_max, smem.lowest_max[rank]);
    }
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      totals.row.sum += rebase<Config>(smem.blocks[rank], totals.row.max, scale);
    }
    return totals;
  }

  // No weight at all, or NaN: nothing can be drawn from this row.
  __device__ __forceinline__ bool is_valid() const { return row.sum > 0.f && row.sum < kInfinity; }
};

// Sums one value per thread over the cluster, in a fixed order. Ends with a cluster barrier.
template <class Config>
__device__ __forceinline__ float cluster_sum(float x, float* blocks_smem, float* scratch_smem) {
  constexpr int kClusterSize = Config::kClusterSize;
  const float sum = block_reduce<Config::kNumThreads>(x, Sum{}, scratch_smem);
  if (threadIdx.x < kClusterSize) {
    *shared_at_rank<kClusterSize>(&blocks_smem[cluster_rank<kClusterSize>()], threadIdx.x) = sum;
  }
  cluster_sync<kClusterSize>();
  float total = 0.f;
#pragma unroll
  for (int rank = 0; rank < kClusterSize; ++rank) total += blocks_smem[rank];
  return total;
}

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
