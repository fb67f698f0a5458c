// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// What the rows hold (Config::kInput): the weight of an element is exp(logit / temperature), or the probability
// itself; kOrderOnly asks for nothing but the order.
constexpr int kLogits = 0, kProbs = 1, kOrderOnly = 2;

// Where the Philox words of a launch begin: row + 2^32 * attempt is the subsequence, an offset counts 32-bit words as
// in PyTorch and is a multiple of four. Addresses and numbers mix freely; each is read when the kernel runs, so that a
// captured launch draws anew whenever its caller has written there.
struct RandomState {
  const uint64_t* seeds;    // one, or one a row; or null: seed for all
  const uint64_t* offsets;  // one, or one a row; or null: offset for all
  uint64_t seed, offset;
};

// Drawing a token from each row of a matrix of logits or probabilities.
struct SampleParams {
  const void* input;        // [num_inputs, vocab_size]
  int32_t* token_ids;       // [num_rows]
  uint8_t* valid;           // [num_rows] or null: 0 where a row holds no token to draw
  const void* row_indices;  // [num_rows] int32 or int64, or null: the input row of each output row
  const void* top_k;        // [num_rows] int32 or int64, or null: top_k_value for all
  const float* top_p;       // [num_rows] or null: top_p_value for all
  const float* min_p;       // [num_rows] or null: min_p_value for all
  RandomState random;
  int32_t top_k_value;
  float top_p_value, min_p_value;
  // What stays the same from call to call.
  int32_t row_indices_are_int64;
  int64_t num_inputs, input_stride;  // elements between rows
  int32_t num_rows, vocab_size;
  int32_t top_k_is_int64;
  int32_t top_k_first;                     // 1: top-p acts on the renormalized top-k set; 0: both on what was given
  int32_t seeds_per_row, offsets_per_row;  // 1: an entry for each row; 0: one for all
};

// Writing whole rows: softmax, renormalized top-k or top-p, logits masked to their top-k.
struct NormalizeParams {
  const void* input;         // [num_rows, vocab_size]
  void* output;              // [num_rows, vocab_size], contiguous
  const void* top_k;         // [num_rows] int32 or int64, or null: top_k_value for all
  const float* top_p;        // [num_rows] or null: top_p_value for all
  const float* temperature;  // [num_rows] or null: temperature_value for all
  int32_t top_k_value;
  float top_p_value, temperature_value;
  // What stays the same from call to call.
  int32_t top_k_is_int64;
  int64_t input_stride;  // elements between rows
  int32_t num_rows, vocab_size;
};

// Chain speculative sampling: accept a prefix of the draft, then draw one token more.
struct SpeculativeParams {
  const void* draft_probs;   // [num_rows, num_draft, vocab_size]
  const void* target_probs;  // [num_rows, num_draft + 1, vocab_size]
  const void* draft_ids;     // [num_rows, num_draft] int32 or int64, contiguous
  int32_t* output_ids;       // [num_rows, num_draft + 1], contiguous; -1 behind the last token
  int32_t* num_accepted;     // [num_rows]: drafts that pass their own test
  int32_t* num_emitted;      // [num_rows]: drafts before the first that fails
  RandomState random;
  // What stays the same from call to call.
  int64_t draft_row_stride, draft_step_stride;    // elements
  int64_t target_row_stride, target_step_stride;  // elements
  int32_t num_rows, num_draft, vocab_size;
  int32_t draft_ids_are_int64;
  int32_t adds_accepted, adds_emitted;     // 1: the count is added to what is there; 0: it replaces it
  int32_t seeds_per_row, offsets_per_row;  // as above
};

}  // namespace flashinfer
