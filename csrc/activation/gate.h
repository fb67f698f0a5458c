// SPDX-License-Identifier: Apache-2.0
// The gating functions, for both targets:
//
//   silu(x)      = x / (1 + exp(−x))
//   gelu(x)      = x / 2 · (1 + erf(x / sqrt(2)))
//   gelu_tanh(x) = x / 2 · (1 + tanh(sqrt(2 / pi) · (x + 0.044715 x³)))
//
// Config::kGate selects one by the numbers of flashinfer/families/activation.py.
#pragma once

#include "common.h"

#if defined(__CUDACC__)
#include "device/fast_math.cuh"
#else
#include "cpu/math.h"
#endif

namespace flashinfer {

enum Gate : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

template <int kGate>
FLASHINFER_HOST_DEVICE inline float gate(float x) {
#if defined(__CUDA_ARCH__)
  const auto exp = [](float y) { return fast_exp2(y * 1.44269504f); };
  const auto erf = [](float y) { return erff(y); };
#else
  const auto exp = [](float y) { return cpu::fast_exp(y); };
  const auto erf = [](float y) { return __builtin_erff(y); };
#endif
  if constexpr (kGate == kSilu) {
#if defined(__CUDA_ARCH__)
    return x * fast_rcp(1.f + exp(-x));  // a division takes as long as all the rest
#else
    return x / (1.f + exp(-x));
#endif
  } else if constexpr (kGate == kGelu) {
    constexpr float kSqrtHalf = 0.70710678118654752f;
    return 0.5f * x * (1.f + erf(x * kSqrtHalf));
  } else {
    // 0.5·(1 + tanh(u)) = 1 / (1 + exp(−2u)): one exponential, and exact at both ends.
    constexpr float kTwoSqrtTwoOverPi = 1.5957691216057308f;
    return x / (1.f + exp(-kTwoSqrtTwoOverPi * (x + 0.044715f * x * x * x)));
  }
}

}  // namespace flashinfer
