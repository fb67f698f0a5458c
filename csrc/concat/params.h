// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "page/params.h"

namespace flashinfer {

// Keys of many heads from a part of each head and one that all share (of latent attention, where it is not absorbed).
struct ConcatParams {
  const void* k_nope;  // [num_tokens, num_heads, nope_dim]
  const void* k_rope;  // [num_tokens, rope_dim]
  void* k;             // [num_tokens, num_heads, nope_dim + rope_dim]
  HeadStrides k_nope_strides, k_strides;
  int64_t k_rope_stride;  // elements between tokens
  int32_t num_tokens, num_heads;
};

}  // namespace flashinfer
