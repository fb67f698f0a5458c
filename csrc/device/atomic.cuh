// Reductions in shared memory.
#pragma once

#include "common.h"

namespace flashinfer {

// Adds to a word of shared memory if the condition holds: one predicated instruction, where an if around atomicAdd
// becomes a branch. The address is one of the shared window (__cvta_generic_to_shared).
__device__ __forceinline__ void add_shared_if(bool condition, uint32_t address, uint32_t value) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.u32 p, %0, 0;\n"
      "@p red.shared.add.u32 [%1], %2;}\n" ::"r"(static_cast<uint32_t>(condition)),
      "r"(address), "r"(value)
      : "memory");
}

}  // namespace flashinfer
