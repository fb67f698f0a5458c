// Barriers of a part of a block.
#pragma once

#include "common.h"

namespace flashinfer {

// Barriers 1 to 15 (0 is that of __syncthreads) of num_threads, whole warps: who syncs waits for all, who arrives does
// not.
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace flashinfer
