// SPDX-License-Identifier: Apache-2.0
// Shared-memory tiles whose rows are permuted by 16-byte granules, so that the eight rows an ldmatrix touches at one
// column fall into eight different groups of banks.
#pragma once

#include "common.h"

namespace flashinfer {

// A row-major tile of kRowBytes per row. Granule c of row r lives at granule c ^ f(r) of that row. A row of 2^k x odd
// granules starts at one of 8 / 2^k places of the 128 bytes that the banks serve in a cycle; f spreads the rows that
// start at the same place over the 2^k granules there.
template <int kRowBytes>
struct SwizzledRows {
  static_assert(kRowBytes % 32 == 0, "a row is an even number of 16-byte granules");
  static constexpr int kNumBytes = kRowBytes, kNumGranules = kRowBytes / 16;
  static constexpr int kLog2 = kNumGranules % 8 == 0 ? 3 : kNumGranules % 4 == 0 ? 2 : 1;

  __device__ __forceinline__ static constexpr int permutation(int row) {
    return (row >> (3 - kLog2)) & ((1 << kLog2) - 1);
  }
  // Byte offset of a 16-byte granule from the start of the tile.
  __device__ __forceinline__ static constexpr int offset(int row, int granule) {
    return row * kRowBytes + ((granule ^ permutation(row)) << 4);
  }
  // The address of granule `granule + num_granules` of a row from that of `granule`, where the two numbers have no bit
  // in common and the tile is aligned to 128 bytes: one exclusive or, and an addition that folds into the load.
  __device__ __forceinline__ static constexpr uint32_t advance(uint32_t address, int num_granules) {
    constexpr int kMask = (1 << kLog2) - 1;
    return (address ^ uint32_t((num_granules & kMask) << 4)) + uint32_t((num_granules & ~kMask) << 4);
  }
};

}  // namespace flashinfer
