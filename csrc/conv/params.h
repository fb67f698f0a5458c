// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// States of convolutions, [num_slots, num_channels, length]: the last inputs of each request, oldest first. Strides in
// elements.
struct ConvStates {
  int64_t slot_stride, channel_stride, time_stride;
  int32_t num_slots, length;
  int32_t pad_slot;  // marks padding, as any negative slot does
  int32_t reserved;

  // Of a request, −1 for one that is padding.
  template <class Index>
  FLASHINFER_HOST_DEVICE int32_t slot(const void* slots, int32_t request_idx) const {
    const int64_t slot = slots == nullptr ? request_idx : int64_t(static_cast<const Index*>(slots)[request_idx]);
    return slot >= 0 && slot < num_slots && slot != pad_slot ? int32_t(slot) : -1;
  }
  FLASHINFER_HOST_DEVICE int64_t offset(int32_t slot, int32_t channel, int32_t time) const {
    return slot * slot_stride + channel * channel_stride + time * time_stride;
  }
};

// A causal convolution over each of a batch of sequences, one behind the other.
struct CausalConv1dParams {
  const void* x;                     // [num_tokens, num_channels] T
  const void* weight;                // [num_channels, width] T
  const void* bias;                  // [num_channels] T, or null
  void* states;                      // T, or null: sequences begin with zeros, and leave nothing
  const void* offsets;               // [num_sequences + 1] Index: where sequences begin and end
  const void* slots;                 // [num_sequences] Index, or null: sequence i has slot i
  const uint8_t* has_initial_state;  // [num_sequences] or null: 0, none of them continues one
  void* output;                      // [num_tokens, num_channels] T
  ConvStates layout;
  int64_t x_stride, output_stride;  // elements between tokens
  int32_t num_tokens, num_sequences, num_channels;
};

// The next tokens of each request, whose state is moved on.
struct CausalConv1dUpdateParams {
  const void* x;             // [batch, num_tokens, num_channels] T, or by offsets [all tokens, num_channels]
  const void* weight;        // [num_channels, width] T
  const void* bias;          // [num_channels] T, or null
  void* states;              // T
  const void* offsets;       // [batch + 1] Index, or null: each request has num_tokens
  const void* slots;         // [batch] Index, or null: request i has slot i
  const void* num_accepted;  // [batch] Index, or null: the state is the last width − 1 inputs, and no more
  void* output;              // as x
  ConvStates layout;
  int64_t x_request_stride, x_stride, output_request_stride, output_stride;  // elements
  int32_t batch_size, num_tokens, num_channels;  // num_tokens: of a request, or by offsets of all
};

}  // namespace flashinfer
