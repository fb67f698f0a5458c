// SPDX-License-Identifier: Apache-2.0
// Elementary functions that vectorize. The C library's are calls, one element at a time, which cost more than the loops
// around them.
#pragma once

#include "cpu/types.h"

namespace flashinfer::cpu {

// 2^x to 2e-7 of its value; 0 below the normal numbers, 2^127 above. Splits off the integer part by adding 1.5 * 2^23
// and puts it into the exponent of a polynomial in the rest.
inline float fast_exp2(float x) {
  constexpr float kRound = 12582912.f;
  const float at_least = x < -126.f ? -126.f : x, clamped = at_least > 127.f ? 127.f : at_least;
  const float shifted = clamped + kRound, f = clamped - (shifted - kRound);
  float y = 1.5403530e-4f;
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound);
  const float power = bit_cast<float>(bit_cast<uint32_t>(y) + (exponent << 23));
  return x < -126.f ? 0.f : power;
}

inline float fast_exp(float x) {
  return fast_exp2(x * 1.44269504f);
}

}  // namespace flashinfer::cpu
