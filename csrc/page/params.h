#pragma once

#include "common.h"

namespace flashinfer {

// Where each token of a batch lands in a paged cache: token t of request batch_indices[t] has positions[t] tokens
// before it. A token whose request lies outside [0, batch_size), or whose position has no page, is padding and is
// skipped.
struct TokenSlots {
  const void* batch_indices;  // [num_tokens] TokenIndex
  const void* positions;      // [num_tokens] TokenIndex
  const void* page_indices;   // [page_indptr[batch_size] or more] PageIndex
  const void* page_indptr;    // [batch_size + 1] PageIndex
  int32_t batch_size, page_size;
};

// One of the two tensors of a cache; NHD and HND differ in strides only. Strides in elements; the last axis is dense.
struct CacheView {
  void* data;  // [num_pages, page_size, num_heads, head_dim] in the order the strides give
  int64_t page_stride, slot_stride, head_stride;
};

// Copy rows of keys and values (for MLA: compressed KV and its rotary part, with one head) into their pages.
struct AppendParams {
  const void* key;        // [num_tokens, num_heads, key_dim] InT
  const void* value;      // [num_tokens, num_heads, value_dim] InT
  CacheView key_cache;    // CacheT; data null: keys are not stored
  CacheView value_cache;  // CacheT; data null: values are not stored
  TokenSlots slots;
  const float* key_scale;    // [1] or null: 1; an fp8 cache holds key / scale
  const float* value_scale;  // [1] or null: 1
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;  // elements
  float key_scale_value, value_scale_value;                                          // multiplied with *key_scale
  int32_t num_tokens, num_heads;
};

// Request and position of every row of a ragged batch.
struct TokenPositionsParams {
  const void* append_indptr;  // [batch_size + 1] Index
  const void* seq_lens;       // [batch_size] Index; length of each request after the append
  int32_t* batch_indices;     // [num_tokens]; -1 past the last row of the batch
  int32_t* positions;         // [num_tokens]; 0 past the last row of the batch
  int32_t num_tokens, batch_size;
};

// Length of every request of a paged cache.
struct SeqLensParams {
  const void* page_indptr;    // [batch_size + 1] Index
  const void* last_page_len;  // [batch_size] Index
  int32_t* seq_lens;          // [batch_size]
  int32_t batch_size, page_size;
};

}  // namespace flashinfer
