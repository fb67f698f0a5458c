// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "quant_scale.h"

namespace flashinfer {

// Where each token of a batch lands in a paged cache: token t of request batch_indices[t] has positions[t] tokens
// before it.
struct TokenSlots {
  const void* batch_indices;  // [num_tokens] TokenIndex
  const void* positions;      // [num_tokens] TokenIndex
  const void* page_indices;   // [num_page_indices] PageIndex
  const void* page_indptr;    // [batch_size + 1] PageIndex
};

// What those indices are held against. A token that leads outside is skipped, whatever its indices say: nothing is
// read past the ends of the index arrays, and nothing is written outside of the cache.
struct SlotBounds {
  int32_t batch_size, num_page_indices, num_pages, page_size;
};

// Strides in elements of one of the two tensors of a cache; its last axis is dense. NHD and HND differ in these only.
struct CacheStrides {
  int64_t page, slot, head;
};

// Strides in elements of rows of heads [num_tokens, num_heads, head_dim]; the last axis is dense.
struct HeadStrides {
  int64_t token, head;
};

// Copy rows of keys and values (for MLA: compressed KV and its rotary part, with one head) into their pages.
struct AppendParams {
  const void* key;    // [num_tokens, num_heads, key_dim] InT
  const void* value;  // [num_tokens, num_heads, value_dim] InT
  void* key_cache;    // [num_pages, page_size, num_heads, key_dim] CacheT; null: keys are not stored
  void* value_cache;  // [num_pages, page_size, num_heads, value_dim] CacheT; null: values are not stored
  TokenSlots slots;
  QuantScale key_scale, value_scale;  // of an fp8 cache that higher precision is converted to
  SlotBounds bounds;
  HeadStrides key_strides, value_strides;
  CacheStrides key_cache_strides, value_cache_strides;
  int32_t num_tokens, num_heads;
};

// Request and position of every row of a ragged batch.
struct TokenPositionsParams {
  const void* append_indptr;  // [batch_size + 1] Index
  const void* seq_lens;       // [batch_size] Index; length of each request after the append
  int32_t* batch_indices;     // [num_tokens]; -1 for a row of no request
  int32_t* positions;         // [num_tokens]; 0 for a row of no request
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
