// Scores as integers: in their order, and counted downwards from the row's maximum.
#pragma once

#include "sampling/row.cuh"

namespace flashinfer {

// Floats as integers in the same order; -0 counts as 0.
__device__ __forceinline__ int32_t ordered_bits(float x) {
  const int32_t bits = __float_as_int(x + 0.f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered_bits(int32_t bits) {
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
}

// How far a score lies below the row's maximum, as an integer that grows as the score falls. Probabilities and bare
// orders use their own bits, so a depth names one value; logits use a linear scale, in which a bin is a factor of
// weight.
template <class Config>
struct Depth {
  static constexpr float kLinearEnd = 4194304.f;  // 2^22 units cover the range of interest
  static constexpr float kLinearMax = 8388607.f;  // whatever lies deeper; exact in a float

  float max;
  float units;        // linear: depth units per unit of logit
  float log2_weight;  // linear: log2 of the weight lost per unit

  // range: where the window of interest ends, in log2 of the weight relative to the maximum's.
  __device__ __forceinline__ Depth(float max, float scale, float range)
      : max(max), units(kLinearEnd / range * scale), log2_weight(range / kLinearEnd) {}

  __device__ __forceinline__ uint32_t operator()(float score) const {
    if constexpr (Config::kInput == kLogits) {
      // Adding 2^23 leaves the rounded integer in the low bits of the float: no conversion instruction.
      const float depth = fminf((max - score) * units, kLinearMax);
      return __float_as_uint(depth + 8388608.f) - 0x4b000000u;
    } else if constexpr (Config::kInput == kProbs) {
      return __float_as_uint(max) - __float_as_uint(score);
    } else {
      return uint32_t(ordered_bits(max)) - uint32_t(ordered_bits(score));
    }
  }

  // The weight at a depth; what is deeper weighs no more.
  __device__ __forceinline__ float weight(uint32_t depth) const {
    if constexpr (Config::kInput == kLogits) return exp2_approx(float(depth) * -log2_weight);
    const uint32_t bits = __float_as_uint(max);
    return __uint_as_float(bits - min(depth, bits));
  }
};

}  // namespace flashinfer
