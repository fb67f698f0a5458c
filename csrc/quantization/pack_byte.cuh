// SPDX-License-Identifier: Apache-2.0
// Eight booleans x[0..8) into one byte: sum_j x[j] · 2^j, the first in the lowest bit (little), or sum_j x[j] · 2^(7 −
// j) (big).
#pragma once

#include "common.h"

namespace flashinfer {

// `booleans` holds eight bytes of value 0 or 1, the first in the lowest. One multiplication moves byte i to bit 56 + i
// (little: shift by 56 - 7i) or 63 - i (big: shift by 63 - 9i); no two of its partial products share a bit, so nothing
// carries into the top byte.
template <bool kBigEndian>
__device__ __forceinline__ uint8_t pack_byte(uint64_t booleans) {
  constexpr uint64_t kSpread = kBigEndian ? 0x8040201008040201ull : 0x0102040810204080ull;
  return uint8_t((booleans * kSpread) >> 56);
}

}  // namespace flashinfer
