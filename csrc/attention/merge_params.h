// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// Attention states over disjoint parts of a KV, merged into the state over their union. A state of one (row, head) is
// the normalized output v and s = log2 of the sum of exponentials.
struct MergeParams {
  const void* v;        // [num_states_in, num_heads, head_dim]; of lists with the strides below, heads side by side
  const float* s;       // [num_states_in, num_heads]
  const void* v_other;  // the second operand of a pair, shaped like v; null unless kPair
  const float* s_other;
  const uint8_t* mask;    // [num_rows] rows to merge, or null for all; the others keep v and s. Only kPair
  const int32_t* indptr;  // [num_rows + 1] the states of each row; null: num_states of each, in order. Not of a pair
  void* v_out;            // [num_rows, num_heads, head_dim]; may be v of a pair
  float* s_out;           // [num_rows, num_heads]; may be s of a pair; null if not wanted
  int64_t num_rows;
  int64_t v_row_stride, v_state_stride;  // elements from a row's first state to the next row's, and between states
  int64_t s_row_stride, s_state_stride;  // with indptr states alone have a stride
  int32_t num_heads;
  int32_t num_states;  // states of every row when indptr is null
};

}  // namespace flashinfer
