// SPDX-License-Identifier: Apache-2.0
// Eight booleans into one byte (CPU); quantization/pack_byte.cuh explains the multiplication.
#pragma once

#include <cstring>

#include "common.h"

namespace flashinfer::cpu {

// The first `count` (at most 8) booleans of `input`, each 0 or 1.
template <bool kBigEndian>
uint8_t pack_byte(const uint8_t* input, int64_t count) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first boolean must be the lowest byte of a word");
  constexpr uint64_t kSpread = kBigEndian ? 0x8040201008040201ull : 0x0102040810204080ull;
  uint64_t booleans = 0;
  if (count >= 8) {
    std::memcpy(&booleans, input, 8);  // of known size: one load, not a call
  } else {
    std::memcpy(&booleans, input, count);
  }
  return uint8_t((booleans * kSpread) >> 56);
}

}  // namespace flashinfer::cpu
