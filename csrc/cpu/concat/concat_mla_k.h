// SPDX-License-Identifier: Apache-2.0
// Keys of latent attention on the CPU: the equations and shapes of concat/concat_mla_k.cuh. A token a thread.
#pragma once

#include "concat/params.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

template <class Config>
void concat_mla_k(const ConcatParams& params) {
  using T = typename Config::T;
#pragma omp parallel for
  for (int token_idx = 0; token_idx < params.num_tokens; ++token_idx) {
    const T* rope = static_cast<const T*>(params.k_rope) + token_idx * params.k_rope_stride;
    for (int head_idx = 0; head_idx < params.num_heads; ++head_idx) {
      const T* nope = static_cast<const T*>(params.k_nope) + token_idx * params.k_nope_strides.token +
                      head_idx * params.k_nope_strides.head;
      T* k = static_cast<T*>(params.k) + token_idx * params.k_strides.token + head_idx * params.k_strides.head;
      std::memcpy(k, nope, Config::kNopeDim * sizeof(T));
      std::memcpy(k + Config::kNopeDim, rope, Config::kRopeDim * sizeof(T));
    }
  }
}

}  // namespace flashinfer::cpu
