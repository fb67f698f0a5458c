// SPDX-License-Identifier: Apache-2.0
// Scores as integers, and scores between two others: what a search over floats needs.
#pragma once

#include "sampling/totals.cuh"

namespace flashinfer {

// Floats as integers in the same order, neighbours as neighbours; -0 counts as 0.
__device__ __forceinline__ int32_t ordered_bits(float x) {
  const int32_t bits = __float_as_int(x);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}
__device__ __forceinline__ float from_ordered_bits(int32_t ordered) {
  return __int_as_float(ordered < 0 ? -ordered | (-0x7fffffff - 1) : ordered);
}

// The next float down; -infinity has none.
__device__ __forceinline__ float next_below(float x) {
  return x == -kInfinity ? x : from_ordered_bits(ordered_bits(x) - 1);
}

// Whether (low, high] has room for no more than one value of type T, each of which is a float whose last bits are zero.
template <class T>
__device__ __forceinline__ bool holds_one_value(float low, float high) {
  constexpr int kZeroBits = sizeof(T) == 4 ? 0 : 13;  // of fp16; bf16 has 16
  return (ordered_bits(high) >> kZeroBits) - int64_t(ordered_bits(low) >> kZeroBits) <= 1;
}

// The score at `part` of the way from low to high, in steps that suit what the rows hold: probabilities lie evenly in
// their logarithm, of which their bits are a piecewise linear image, logits as they are.
template <class Config>
__device__ __forceinline__ float between(float low, float high, float part) {
  if constexpr (Config::kInput == kProbs) {
    const uint32_t low_bits = __float_as_uint(low);
    return __uint_as_float(low_bits + __float2uint_rz((__float_as_uint(high) - low_bits) * part));
  }
  return fminf(fmaxf(low * (1.f - part) + high * part, low), high);
}

// The score that lies `times` as far below high as low does.
template <class Config>
__device__ __forceinline__ float beyond(float high, float low, float times) {
  if constexpr (Config::kInput == kProbs) {
    const uint32_t high_bits = __float_as_uint(high), distance = high_bits - __float_as_uint(low);
    return __uint_as_float(high_bits - min(high_bits, __float2uint_rz(distance * times)));
  }
  return high - (high - low) * times;
}

// Half of all floats between low and high lie on either side: however scores are spread, this gets nearer.
__device__ __forceinline__ float middle_float(float low, float high) {
  return from_ordered_bits(static_cast<int32_t>((int64_t(ordered_bits(low)) + ordered_bits(high)) >> 1));
}

}  // namespace flashinfer
