// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// In elements; the last axis has stride 1.
struct GdnRowStrides {
  int64_t token, head;
};
struct GdnStateStrides {
  int64_t slot, head;  // of [slots, heads, 128, 128]; the last two axes are dense
};

// The gated delta rule over packed sequences (docs/gated_delta.md). For a head with the state S [K, V], of each token
//
//   u = beta (v - alpha Sᵀk)     S = alpha S + k uᵀ     o = scale Sᵀq
//
// Heads of q, k and v are shared by runs of consecutive heads of the output: head h reads head h / heads_per_q of q.
// States lie in memory as [V, K].
struct GdnPrefillParams {
  const void* q;                // [num_tokens, heads of q, 128]
  const void* k;                // [num_tokens, heads of k, 128]
  const void* v;                // [num_tokens, heads of v, 128]
  const float* gate;            // [num_tokens, num_heads]: alpha, or its natural logarithm; or null: 1
  const float* beta;            // [num_tokens, num_heads] or null: 1
  const void* cu_seqlens;       // [num_seqs + 1] or null: one sequence of all tokens
  const void* initial_state;    // [num_initial_slots, num_heads, V, K] or null: zero
  const void* initial_indices;  // [num_seqs] or null: slot i for sequence i
  const void* final_indices;    // the same of final_state
  void* output;                 // [num_tokens, num_heads, 128]
  void* final_state;            // [num_final_slots, num_heads, V, K] or null
  void* chunks;                 // scratch on a GPU: GdnChunk (gdn/prefill/tile.cuh) of [chunk slots, num_heads]
  void* segments;               // the same: GdnSegment of [segment slots, num_heads], or null
  GdnRowStrides q_strides, k_strides, v_strides, output_strides;
  GdnRowStrides gate_strides, beta_strides;
  GdnStateStrides initial_strides, final_strides;
  int32_t num_seqs, num_tokens, num_heads;
  int32_t heads_per_q, heads_per_k, heads_per_v;
  int32_t num_initial_slots, num_final_slots;
  int32_t has_long_seqlens, has_long_indices;  // whether these are int64
  float scale;
  int32_t segment_tokens;   // of the pieces that sequences are split into, whole chunks; 0: none is
  int32_t has_bf16_states;  // for kernels that are the same whatever states are; else they are fp32
};

FLASHINFER_HOST_DEVICE inline int64_t index_at(const void* indices, int32_t i, bool is_long) {
  return is_long ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

// The tokens of a sequence, within those that there are.
struct GdnSequence {
  int32_t begin, end;

  FLASHINFER_HOST_DEVICE static GdnSequence of(const GdnPrefillParams& params, int32_t seq_idx) {
    if (params.cu_seqlens == nullptr) return {0, params.num_tokens};
    const auto offset = [&](int32_t i) {
      const int64_t token = index_at(params.cu_seqlens, i, params.has_long_seqlens);
      return int32_t(token < 0 ? 0 : token > params.num_tokens ? params.num_tokens : token);
    };
    const GdnSequence sequence{offset(seq_idx), offset(seq_idx + 1)};
    return {sequence.begin, sequence.end < sequence.begin ? sequence.begin : sequence.end};
  }
};

// The states of a sequence's head in a pool, or null where its index is negative or past the pool.
template <class State>
FLASHINFER_HOST_DEVICE const State* initial_state_of(const GdnPrefillParams& params, int32_t seq_idx, int32_t head) {
  if (params.initial_state == nullptr) return nullptr;
  const int64_t slot =
      params.initial_indices == nullptr ? seq_idx : index_at(params.initial_indices, seq_idx, params.has_long_indices);
  if (slot < 0 || slot >= params.num_initial_slots) return nullptr;
  return static_cast<const State*>(params.initial_state) + slot * params.initial_strides.slot +
         head * params.initial_strides.head;
}
template <class State>
FLASHINFER_HOST_DEVICE State* final_state_of(const GdnPrefillParams& params, int32_t seq_idx, int32_t head) {
  if (params.final_state == nullptr) return nullptr;
  const int64_t slot =
      params.final_indices == nullptr ? seq_idx : index_at(params.final_indices, seq_idx, params.has_long_indices);
  if (slot < 0 || slot >= params.num_final_slots) return nullptr;
  return static_cast<State*>(params.final_state) + slot * params.final_strides.slot + head * params.final_strides.head;
}

}  // namespace flashinfer
