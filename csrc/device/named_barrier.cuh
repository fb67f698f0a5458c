// SPDX-License-Identifier: Apache-2.0
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
// Whether x is true of any thread that syncs.
__device__ __forceinline__ bool named_barrier_any(int barrier, int num_threads, bool x) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred x, any;\n"
      "setp.ne.b32 x, %1, 0;\n"
      "bar.red.or.pred any, %2, %3, x;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(int(x)), "r"(barrier), "r"(num_threads)
      : "memory");
  return any != 0;
}
// Without a branch, for between the start of products and the wait for them.
__device__ __forceinline__ void named_barrier_arrive_if(bool arrives, int barrier, int num_threads) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.b32 arrives, %0, 0;\n"
      "@arrives bar.arrive %1, %2;\n"
      "}\n" ::"r"(int(arrives)),
      "r"(barrier), "r"(num_threads)
      : "memory");
}

}  // namespace flashinfer
