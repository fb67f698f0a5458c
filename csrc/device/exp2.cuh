// 2^x in one instruction.
#pragma once

#include "common.h"

namespace flashinfer {

// To 2 units in the last place; results below the smallest normal number are flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashinfer
