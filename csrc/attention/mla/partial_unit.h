// SPDX-License-Identifier: Apache-2.0
// In what a row of a partial result of latent attention counts (PartialRow in mla/merge.cuh). Shared by kernels and a
// test on the host.
#pragma once

#include "attention/params.h"
#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace flashinfer {

// The unit of a row, a power of two by its largest element: that is 2^14 units or more, and below 2^15. Of a row of
// less than 2^-80 that of 2^-80, so that what is multiplied with its inverse stays finite.
struct PartialUnit {
  uint32_t exponent;  // biased, of the largest element

  FLASHINFER_FN static PartialUnit of(float largest) { return at_least(kLowest, largest); }
  // Of a row that is yet to be multiplied with factor, which is done with the product of factor and inverse(): that is
  // below 2^(exponent_of(factor) - 126) * 2^(141 - exponent), and has to be below 2^128.
  FLASHINFER_FN static PartialUnit of(float largest, float factor) {
    const int32_t lowest = int32_t(exponent_of(factor)) - 113;
    return at_least(lowest > int32_t(kLowest) ? lowest : kLowest, largest);
  }
  FLASHINFER_FN float value() const { return __builtin_bit_cast(float, (exponent - 14) << 23); }
  FLASHINFER_FN float inverse() const { return __builtin_bit_cast(float, (268 - exponent) << 23); }

 private:
  static constexpr uint32_t kLowest = 127 - 80, kHighest = 254;

  FLASHINFER_FN static uint32_t exponent_of(float x) { return __builtin_bit_cast(uint32_t, fabsf(x)) >> 23; }
  FLASHINFER_FN static PartialUnit at_least(uint32_t lowest, float largest) {
    const uint32_t exponent = exponent_of(largest), raised = exponent < lowest ? lowest : exponent;
    return {raised < kHighest ? raised : kHighest};
  }
};

}  // namespace flashinfer
