// SPDX-License-Identifier: Apache-2.0
// One row of the vocabulary, spread over the threads of a thread-block cluster.
//
// The row is cut into 16-byte granules of device memory. They are dealt to the warps of all blocks in turn, a granule a
// lane, so that low token ids, which carry most of the mass in practice, are spread. A thread calls its granules slots:
// slot s is its s-th. When the row is resident, the first reading leaves it in shared memory, in its own element
// type, and every later pass stays there.
#pragma once

#include "device/cluster.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "sampling/params.h"

namespace flashinfer {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
constexpr float kNaN = __builtin_bit_cast(float, 0x7fffffff);

template <class Config>
struct RowSlice {
  using T = typename Config::T;
  static constexpr int kVecSize = 16 / sizeof(T);
  static constexpr int kThreadsPerRow = Config::kNumThreads * Config::kClusterSize;
  static constexpr bool kResident = Config::kRowSlots > 0;
  static constexpr bool kMayBeNegative = Config::kInput == kProbs;                // weights, where a caller errs
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

  // One element of a granule of this block, which must lie inside the row.
  __device__ __forceinline__ float score(int slot, int thread_idx, int lane) const {
    if constexpr (kResident) return to_float(smem.row[(slot * Config::kNumThreads + thread_idx) * kVecSize + lane]);
    return to_float(base_gmem[int64_t(granule_idx(slot, thread_idx)) * kVecSize + lane]);
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

// ids[i] of an array of either integer width.
__device__ __forceinline__ int64_t load_index(const void* ids, int are_int64, int64_t i) {
  return are_int64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

}  // namespace flashinfer
