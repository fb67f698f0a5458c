#pragma once

#include "common.h"
#include "page/params.h"

namespace flashinfer {

constexpr int kMaxRotaryDim = 256;

// The rotation of every token: its position, and its angles either from frequencies or from a table of cos and sin.
struct Rotary {
  const void* positions;      // [num_tokens] PositionIndex, or null: positions follow from indptr and offsets
  const void* indptr;         // [batch_size + 1] PositionIndex or null; rows of each request
  const void* offsets;        // [batch_size] PositionIndex or null; position of each request's first row
  const void* cos_sin_cache;  // [max_position, rotary_dim] CosSinT or null; a row is rotary_dim / 2 cos, then sin
  int64_t cos_sin_stride;     // elements between rows
  int32_t batch_size;
  int32_t reserved;
  // [rotary_dim / 2] turns per position as a 64-bit binary fraction (device/rotary.cuh says why). Theta, scaling and
  // Llama 3.1's smoothing are all in here, so no kernel knows of them.
  uint64_t frequencies[kMaxRotaryDim / 2];
};

// Rows of heads with strides in elements; the last axis is dense.
struct HeadsView {
  void* data;  // [num_tokens, num_heads, head_dim]; only read where the view is an input
  int64_t token_stride, head_stride;
};

// Rotate queries and keys. Out may be the same memory as in.
struct RopeParams {
  HeadsView q, k, q_out, k_out;  // T
  int32_t num_tokens, num_qo_heads, num_kv_heads;
  int32_t reserved;
  Rotary rotary;
};

// Rotate queries and keys, and store keys and values in a paged cache.
struct RopeAppendParams {
  HeadsView q, k, v, q_out;          // T
  CacheView key_cache, value_cache;  // CacheT
  TokenSlots slots;
  const float* key_scale;                    // [1] or null: 1; an fp8 cache holds key / scale
  const float* value_scale;                  // [1] or null: 1
  float key_scale_value, value_scale_value;  // multiplied with *key_scale, *value_scale
  int32_t num_tokens, num_qo_heads, num_kv_heads;
  int32_t reserved;
  Rotary rotary;
};

// RMSNorm over the head dimension of queries and keys, then their rotation, in place.
struct QkNormRopeParams {
  HeadsView q, k;          // T; two views of one packed qkv
  const void* q_weight;    // [head_dim] T
  const void* k_weight;    // [head_dim] T
  float eps, weight_bias;  // the weight applied is weight_bias + weight (Gemma: 1)
  int32_t num_tokens, num_qo_heads, num_kv_heads;
  int32_t reserved;
  Rotary rotary;
};

}  // namespace flashinfer
