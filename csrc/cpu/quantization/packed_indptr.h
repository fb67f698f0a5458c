// SPDX-License-Identifier: Apache-2.0
// Where each segment's bytes begin once it is packed, on the CPU: the equation and shapes of
// quantization/packed_indptr.cuh. The host has checked the offsets.
#pragma once

#include "quantization/params.h"

namespace flashinfer::cpu {

template <class Config>
void packed_indptr(const PackedIndptrParams& params) {
  using Index = typename Config::Index;
  const Index* indptr = static_cast<const Index*>(params.indptr);
  Index* packed = static_cast<Index*>(params.packed_indptr);
  packed[0] = 0;
  for (int i = 0; i < params.num_segments; ++i) {
    packed[i + 1] = Index(packed[i] + ceil_div(int64_t(indptr[i + 1]) - indptr[i], 8));
  }
}

}  // namespace flashinfer::cpu
