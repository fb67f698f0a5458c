// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based
// generator. Four 32-bit words for each (seed, subsequence, counter), no state to keep.
#pragma once

#include "common.h"

namespace flashinfer {

struct RandomWords {
  uint32_t word[4];

  // Uniform on [0, 1) in steps of 2^-24: every value is a float, and 1 is never among them.
  __device__ __forceinline__ float uniform(int i) const { return float(word[i] >> 8) * 0x1p-24f; }
};

// The counter layout of cuRAND and PyTorch: the low 64 bits count draws, the high 64 bits select the subsequence.
__device__ __forceinline__ RandomWords philox(uint64_t seed, uint64_t subsequence, uint64_t counter) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32);
  uint32_t c2 = uint32_t(subsequence), c3 = uint32_t(subsequence >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kMul0) * c0, p1 = uint64_t(kMul1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace flashinfer
