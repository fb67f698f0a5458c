// SPDX-License-Identifier: Apache-2.0
// The angle of a rotary position embedding on the CPU; device/rotary.cuh says why it is a 64-bit fraction of a turn.
#pragma once

#include "common.h"

namespace flashinfer::cpu {

// cos and sin of a 32-bit fraction of a turn. The nearest quarter turn is taken off in integers, exactly; what is left
// is within pi/4 of zero, where the Taylor polynomials below are good to 3e-8. Plain arithmetic, so that loops
// vectorize.
inline void cos_sin_of_turns(uint32_t turns, float& cos, float& sin) {
  const uint32_t quarter = (turns + 0x20000000u) >> 30;
  const float x = float(int32_t(turns - (quarter << 30))) * float(6.283185307179586 / 4294967296.);
  const float z = x * x;
  const float s = x + x * z * (-1.f / 6 + z * (1.f / 120 + z * (-1.f / 5040 + z * (1.f / 362880))));
  const float c = 1.f + z * (-1.f / 2 + z * (1.f / 24 + z * (-1.f / 720 + z * (1.f / 40320))));
  const bool swap = quarter & 1;
  cos = (swap ? s : c) * ((quarter + 1) & 2 ? -1.f : 1.f);
  sin = (swap ? c : s) * (quarter & 2 ? -1.f : 1.f);
}

inline void rotary_cos_sin(int64_t position, uint64_t frequency, float& cos, float& sin) {
  cos_sin_of_turns(uint32_t((uint64_t(position) * frequency) >> 32), cos, sin);
}

}  // namespace flashinfer::cpu
