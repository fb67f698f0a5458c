// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"
#include "fast_divisor.h"

namespace flashinfer {

// Strides in elements of [batch, num_tokens, num_heads] and what follows, whose last axis is dense.
struct DecodeTokenStrides {
  int64_t request, token, head;
};

// Strides in elements of states [slots, num_v_heads, rows, columns], whose last axis is dense: rows are values and
// columns keys (V-major), or the other way round.
struct StateStrides {
  int64_t slot, head, row;
};

// The next tokens of each request through the gated delta rule (gdn/decode.cuh), its state read and written once.
struct GdnDecodeParams {
  const void* q;               // [batch, num_tokens, num_heads, key_dim] T
  const void* k;               // [batch, num_tokens, num_heads, key_dim] T
  const void* v;               // [batch, num_tokens, num_v_heads, value_dim] T
  const void* a_log;           // [num_v_heads] fp32
  const void* a;               // [batch, num_tokens, num_v_heads] T
  const void* dt_bias;         // [num_v_heads] BiasT
  const void* b;               // [batch, num_tokens, num_v_heads] T
  void* states;                // [num_slots, num_v_heads, …] StateT
  const void* input_slots;     // [batch] Index, or null: request i has slot i
  const void* output_slots;    // [batch] Index, or null: the slot that was read
  void* token_states;          // the state after each token, StateT; or null
  const int32_t* token_slots;  // [batch, num_tokens], slots of token_states; null: it is [batch, num_tokens, …]
  void* output;                // [batch, num_tokens, num_v_heads, value_dim] T
  DecodeTokenStrides q_strides, k_strides, v_strides, output_strides;
  DecodeTokenStrides a_strides, b_strides;
  StateStrides state_strides;
  StateStrides token_state_strides;
  int64_t token_state_request_stride;  // of token_states without token_slots, whose slots are a request's tokens
  FastDivisor num_v_heads;
  FastDivisor v_heads_per_head;
  int32_t batch_size, num_tokens;
  int32_t num_slots, num_token_slots;  // what indices are held against; one outside of it is padding
  int32_t update_state;                // whether the state after the last token goes to its slot
  int32_t use_qk_l2norm;
  float scale;
};

// The slot of a request, −1 for one that is padding.
template <class Index>
FLASHINFER_HOST_DEVICE inline int32_t state_slot(const void* slots, int32_t request_idx, int32_t num_slots) {
  const int64_t slot = slots == nullptr ? request_idx : static_cast<const Index*>(slots)[request_idx];
  return slot >= 0 && slot < num_slots ? int32_t(slot) : -1;
}

}  // namespace flashinfer
