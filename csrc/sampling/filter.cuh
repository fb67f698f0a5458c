// SPDX-License-Identifier: Apache-2.0
// Top-k and top-p of one row, as the caller gave them.
#pragma once

#include "sampling/row.cuh"

namespace flashinfer {

struct Filter {
  float top_k = kInfinity;  // a whole number below the vocabulary's size, or infinity: no limit
  float top_p = kInfinity;  // below 1, or infinity: no limit

  template <class Config, class Params>
  __device__ __forceinline__ static Filter load(const Params& params, int row) {
    Filter filter;
    if constexpr (Config::kTopK) {
      const int64_t k = params.top_k ? load_index(params.top_k, params.top_k_is_int64, row) : params.top_k_value;
      if (k < params.vocab_size) filter.top_k = k > 1 ? k : 1;
    }
    if constexpr (Config::kTopP) {
      const float p = params.top_p ? params.top_p[row] : params.top_p_value;
      if (p < 1.f) filter.top_p = fmaxf(p, 0.f);
    }
    return filter;
  }
};

}  // namespace flashinfer
