// SPDX-License-Identifier: Apache-2.0
// How one row of hidden_size elements is spread over kThreadsPerRow threads, for all kernels of norm/: thread t holds
// the vectors t, t + kThreadsPerRow, … of kVecSize elements in registers, read once and written once; sums run over the
// threads of the row.
#pragma once

#include "device/reduce.cuh"
#include "device/vec.cuh"

namespace flashinfer {

// The part of a row that one thread holds: vectors thread_idx, thread_idx + kThreadsPerRow, …
template <class T, class Config>
struct RowFragment {
  static constexpr int kVecSize = Config::kVecSize;
  static constexpr int kVecsPerRow = Config::kHiddenSize / kVecSize;
  static constexpr int kVecsPerThread = ceil_div(kVecsPerRow, Config::kThreadsPerRow);
  static constexpr bool kIsFull = kVecsPerRow % Config::kThreadsPerRow == 0;
  static_assert(Config::kHiddenSize % kVecSize == 0);

  Vec<T, kVecSize> vecs[kVecsPerThread];

  __device__ __forceinline__ void load(const T* row_gmem, int thread_idx) {
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
      if (holds(i, thread_idx)) vecs[i] = Vec<T, kVecSize>::load(row_gmem + offset(i, thread_idx));
    }
  }

  __device__ __forceinline__ void store(T* row_gmem, int thread_idx) const {
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
      if (holds(i, thread_idx)) vecs[i].store(row_gmem + offset(i, thread_idx));
    }
  }

  // body(vector index, element index) for each element this thread holds.
  template <class Body>
  __device__ __forceinline__ static void for_each(int thread_idx, Body body) {
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
      if (!holds(i, thread_idx)) continue;
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) body(i, j);
    }
  }

 private:
  __device__ __forceinline__ static bool holds(int i, int thread_idx) {
    return kIsFull || thread_idx + i * Config::kThreadsPerRow < kVecsPerRow;
  }
  __device__ __forceinline__ static int offset(int i, int thread_idx) {
    return (thread_idx + i * Config::kThreadsPerRow) * kVecSize;
  }
};

// Sums over the threads of a row. Rows are either shared by a whole block or by at most a warp, several to a block.
// Consecutive sums use alternating scratch, so that one barrier per sum is enough.
template <class Config>
struct RowSum {
  static constexpr bool kInWarp = Config::kThreadsPerRow <= kWarpSize;
  static_assert(kInWarp || Config::kThreadsPerRow == Config::kNumThreads);
  struct Smem {
    float scratch[2][kWarpSize];
  };

  Smem& smem;
  int turn = 0;

  __device__ __forceinline__ float operator()(float x) {
    if constexpr (kInWarp) {
      return warp_reduce<Config::kThreadsPerRow>(x, Sum{});
    } else {
      turn ^= 1;
      return block_reduce<Config::kNumThreads>(x, Sum{}, smem.scratch[turn]);
    }
  }
};

struct RowOfThread {
  int row;
  int thread_idx;  // within the row
};

template <class Config>
__device__ __forceinline__ RowOfThread row_of_thread() {
  constexpr int kRowsPerBlock = Config::kNumThreads / Config::kThreadsPerRow;
  return {static_cast<int>(blockIdx.x * kRowsPerBlock + threadIdx.x / Config::kThreadsPerRow),
          static_cast<int>(threadIdx.x % Config::kThreadsPerRow)};
}

}  // namespace flashinfer
