// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// Division of 0 <= n < 2^31 by a run-time constant: one multiply and one shift. The host fills it in:
// shift = ceil(log2(divisor)), magic = 2^32 * (2^shift - divisor) / divisor + 1.
struct FastDivisor {
  uint32_t divisor, magic, shift;

  // As the host computes it.
  FLASHINFER_HOST_DEVICE static FastDivisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((1u << shift) < divisor) ++shift;
    return {divisor, uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor) + 1, shift};
  }
  FLASHINFER_HOST_DEVICE uint32_t divide(uint32_t n) const {
    return (uint32_t((uint64_t(n) * magic) >> 32) + n) >> shift;
  }
};

}  // namespace flashinfer
