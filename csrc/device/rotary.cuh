// SPDX-License-Identifier: Apache-2.0
// The angle of a rotary position embedding, exact at any position.
//
// The angle is position × frequency, of which only the fraction of a turn matters. In fp32 that product is wrong by up
// to 0.01 rad at position 131072 (half an ulp of 1e5 rad, plus the rounding of the frequency times the position): more
// than bf16 resolves. So the frequency is given in turns per position as a 64-bit binary fraction (rounded once, from
// FP64, on the host), and the product is taken in integers modulo 2^64, which *is* the reduction modulo one turn. The
// error is position × 2^-65 turns plus the one rounding to float of an angle in [-pi, pi): below 2e-7 rad at every
// position in use. The reduced range is also the one where the hardware's sine and cosine are good to 2^-21.
#pragma once

#include "common.h"

namespace flashinfer {

struct CosSin {
  float cos, sin;
};

__device__ __forceinline__ CosSin rotary_cos_sin(int64_t position, uint64_t frequency) {
  const int32_t turns = int32_t((uint64_t(position) * frequency) >> 32);  // two's complement: [-1/2, 1/2) of a turn
  constexpr float kRadiansPerUnit = 6.283185307179586f / 4294967296.f;
  const float angle = float(turns) * kRadiansPerUnit;
  return {__cosf(angle), __sinf(angle)};
}

// The frequencies of two neighbouring pairs, from the L1 cache each time: a kernel short of registers has the compiler
// keep none of them.
struct FrequencyPair {
  uint64_t first, second;
};
__device__ __forceinline__ FrequencyPair load_frequencies(const uint64_t* frequencies_gmem) {
  FrequencyPair pair;
  asm volatile("ld.global.nc.v2.u64 {%0, %1}, [%2];" : "=l"(pair.first), "=l"(pair.second) : "l"(frequencies_gmem));
  return pair;
}

}  // namespace flashinfer
