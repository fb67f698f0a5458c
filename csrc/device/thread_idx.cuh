// SPDX-License-Identifier: Apache-2.0
// The index of a thread, anew.
#pragma once

#include "common.h"

namespace flashinfer {

// threadIdx.x as the compiler has not seen it before: addresses made from it are computed where they are used. Made
// from threadIdx.x itself they would be hoisted out of a loop, a dozen registers that the loop may not have.
__device__ __forceinline__ uint32_t fresh_thread_idx() {
  uint32_t thread_idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_idx));
  return thread_idx;
}

}  // namespace flashinfer
