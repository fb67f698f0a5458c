// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "page/params.h"

namespace flashinfer {

constexpr int kMaxRotaryDim = 256;

// Where each token's position is read, and its angles if they come from a table of cos and sin.
struct Rotation {
  const void* positions;      // [num_tokens] PositionIndex, or null: positions follow from indptr and offsets
  const void* indptr;         // [batch_size + 1] PositionIndex or null; rows of each request
  const void* offsets;        // [batch_size] PositionIndex or null; position of each request's first row
  const void* cos_sin_cache;  // [num_positions, rotary_dim] CosSinT or null; a row is rotary_dim / 2 cos, then sin
};

// What stays from launch to launch.
struct RotationSetup {
  int64_t cos_sin_stride;  // elements between rows
  int32_t num_positions;   // rows of the table; a position outside of it counts as 0
  int32_t batch_size;
  // [rotary_dim / 2] turns per position as a 64-bit binary fraction (device/rotary.cuh says why). Theta, scaling and
  // Llama 3.1's smoothing are all in here, so no kernel knows of them.
  uint64_t frequencies[kMaxRotaryDim / 2];
};

// Rotate queries and keys. Out may be the same memory as in.
struct RopeParams {
  const void* q;  // [num_tokens, num_qo_heads, head_dim] T
  const void* k;  // [num_tokens, num_kv_heads, head_dim] T
  void* q_out;    // shape of q
  void* k_out;    // shape of k
  Rotation rotation;
  RotationSetup setup;
  HeadStrides q_strides, k_strides, q_out_strides, k_out_strides;
  int32_t num_tokens, num_qo_heads, num_kv_heads;
};

// Rotate queries and keys, and store keys and values in a paged cache.
struct RopeAppendParams {
  const void* q;      // [num_tokens, num_qo_heads, head_dim] T
  const void* k;      // [num_tokens, num_kv_heads, head_dim] T
  const void* v;      // [num_tokens, num_kv_heads, head_dim] T
  void* q_out;        // shape of q; may be q
  void* key_cache;    // [num_pages, page_size, num_kv_heads, head_dim] CacheT
  void* value_cache;  // [num_pages, page_size, num_kv_heads, head_dim] CacheT
  TokenSlots slots;
  Rotation rotation;
  QuantScale key_scale, value_scale;  // of an fp8 cache
  SlotBounds bounds;
  RotationSetup setup;
  HeadStrides q_strides, k_strides, v_strides, q_out_strides;
  CacheStrides key_cache_strides, value_cache_strides;
  int32_t num_tokens, num_qo_heads, num_kv_heads;
};

// RMSNorm over the head dimension of queries and keys, then their rotation, in place.
struct QkNormRopeParams {
  void* q;               // [num_tokens, num_qo_heads, head_dim] T; q and k are two views of one packed qkv
  void* k;               // [num_tokens, num_kv_heads, head_dim] T
  const void* q_weight;  // [head_dim] T
  const void* k_weight;  // [head_dim] T
  Rotation rotation;
  RotationSetup setup;
  HeadStrides qkv_strides;  // of q and of k
  float eps, weight_bias;   // the weight applied is weight_bias + weight (Gemma: 1)
  int32_t num_tokens, num_qo_heads, num_kv_heads;
};

}  // namespace flashinfer
