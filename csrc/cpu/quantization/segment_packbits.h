// SPDX-License-Identifier: Apache-2.0
// The booleans of every segment packed from a byte of its own, on the CPU: the equation and shapes of
// quantization/segment_packbits.cuh. The host has checked the offsets. A segment a thread.
#pragma once

#include "cpu/quantization/pack_byte.h"
#include "quantization/params.h"

namespace flashinfer::cpu {

template <class Config>
void segment_packbits(const SegmentPackbitsParams& params) {
  using Index = typename Config::Index;
  const Index* indptr = static_cast<const Index*>(params.indptr);
  const Index* packed_indptr = static_cast<const Index*>(params.packed_indptr);
#pragma omp parallel for
  for (int i = 0; i < params.num_segments; ++i) {
    int64_t begin = indptr[i];
    for (int64_t byte_idx = packed_indptr[i]; byte_idx < int64_t(packed_indptr[i + 1]); ++byte_idx, begin += 8) {
      params.output[byte_idx] = pack_byte<Config::kBigEndian>(params.input + begin, indptr[i + 1] - begin);
    }
  }
  // Not memset: without elements there is no output, and it may not be given a null pointer, not even for nothing.
  for (int64_t i = packed_indptr[params.num_segments]; i < params.num_bytes; ++i) params.output[i] = 0;
}

}  // namespace flashinfer::cpu
