// SPDX-License-Identifier: Apache-2.0
// A causal convolution of each channel (Gu & Dao 2023, arXiv:2312.00752), over sequences that may continue others:
//
//   output[t, c] = silu(bias[c] + sum_j weight[c, j] · x[t − kWidth + 1 + j, c])       silu: if kSilu
//
//   x, output [num_tokens, num_channels] T      weight [num_channels, kWidth] T      offsets [num_sequences + 1]
//   states [num_slots, num_channels, kWidth − 1] T
//
// Before the first token of a sequence are the inputs in its state, or zeros; its last kWidth − 1 inputs are left
// there. A sequence whose slot is padding has an output of zeros, as have tokens of no sequence.
//
// Memory-bound. A thread has a vector of channels of kTokens tokens, and loads all of it, with the inputs before, ahead
// of looking up the sequence: what hides the latencies are the loads in flight. Where another sequence begins among the
// tokens it goes token by token. Who has the first token of a sequence has all that see its state, also where they lie
// behind its own tokens, and writes the new state, from the inputs at its end: no two threads meet in one.
#pragma once

#include "conv/window.cuh"
#include "device/pdl.cuh"
#include "device/search.cuh"

namespace flashinfer {

template <class Config>
struct ConvSequence {
  using T = typename Config::T;
  using Channels = ConvChannels<Config>;
  using V = typename Channels::V;
  using Index = typename Config::Index;
  static constexpr int kHistory = Channels::kHistory;

  const CausalConv1dParams& params;
  int channel;
  int idx, begin, end;  // tokens; none before begin or from end on
  int slot;

  __device__ __forceinline__ void go_to(int sequence_idx) {
    idx = sequence_idx;
    const Index* offsets = static_cast<const Index*>(params.offsets);
    if (idx >= params.num_sequences) {
      begin = end = params.num_tokens;
      slot = -1;
      return;
    }
    const auto inside = [&](int64_t token) {
      return token < 0 ? 0 : token < params.num_tokens ? int(token) : params.num_tokens;
    };
    begin = inside(offsets[idx]), end = inside(offsets[idx + 1]);
    slot = params.layout.slot<Index>(params.slots, idx);
  }

  __device__ __forceinline__ V input(int token_idx) const {
    return V::load(static_cast<const T*>(params.x) + int64_t(token_idx) * params.x_stride + channel);
  }

  __device__ __forceinline__ bool is_padding() const {
    return idx >= params.num_sequences || (params.states != nullptr && slot < 0);
  }

  // What is `back` tokens before the first one.
  __device__ __forceinline__ V before(int back) const {
    const bool has_state = params.states != nullptr && params.has_initial_state != nullptr && slot >= 0 &&
                           back <= kHistory && params.has_initial_state[idx] != 0;
    return has_state ? Channels::load_state(params.states, params.layout, slot, channel, kHistory - back)
                     : Channels::zeros();
  }

  // The history of a token, its state included.
  __device__ __forceinline__ V history(int token_idx, int j) const {
    const int source = token_idx - kHistory + j;
    return source >= begin ? input(source) : before(begin - source);
  }

  // The inputs before `end`, of which the oldest may be of the old state.
  __device__ __forceinline__ void store_state() const {
    if (params.states == nullptr || slot < 0) return;
    V last[kHistory];
#pragma unroll
    for (int j = 0; j < kHistory; ++j) last[j] = history(end, j);
#pragma unroll
    for (int j = 0; j < kHistory; ++j) {
      Channels::store_state(last[j], params.states, params.layout, slot, channel, j);
    }
  }
};

// What a thread computes: the outputs of its channels, token after token.
template <class Config>
struct ConvRun {
  using T = typename Config::T;
  using Channels = ConvChannels<Config>;
  using V = typename Channels::V;
  static constexpr int kHistory = Channels::kHistory;

  ConvSequence<Config> sequence;
  Channels channels;

  // Go to the sequence of a token, in ascending order. Returns whether it is the first of one.
  __device__ __forceinline__ bool advance(int token_idx) {
    while (sequence.idx < sequence.params.num_sequences && token_idx >= sequence.end) sequence.go_to(sequence.idx + 1);
    return token_idx == sequence.begin;
  }
  __device__ __forceinline__ void begin_sequence(int token_idx) {
#pragma unroll
    for (int j = 0; j < kHistory; ++j) to_floats(sequence.history(token_idx, j), channels.history[j]);
    sequence.store_state();
  }
  __device__ __forceinline__ void compute(int token_idx, const V& x) {
    const auto& params = sequence.params;
    const V y = channels.next(x);
    (token_idx < sequence.begin || sequence.is_padding() ? Channels::zeros() : y)
        .store(static_cast<T*>(params.output) + int64_t(token_idx) * params.output_stride + sequence.channel);
  }
};

// Grid: ceil(num_channels / (kNumThreads · kVecSize)) · ceil(num_tokens / kTokens), channels first.
template <class Config>
__device__ __forceinline__ void causal_conv1d(const CausalConv1dParams& params) {
  using Run = ConvRun<Config>;
  using V = typename Run::V;
  constexpr int kTokens = Config::kTokens, kAhead = Config::kAhead, kHistory = Run::kHistory;
  static_assert(kTokens >= kHistory && kTokens % kAhead == 0);
  const int blocks_per_row = ceil_div(params.num_channels, Config::kNumThreads * Config::kVecSize);
  const int tile_idx = int(blockIdx.x) / blocks_per_row;
  const int channel =
      ((int(blockIdx.x) - tile_idx * blocks_per_row) * Config::kNumThreads + int(threadIdx.x)) * Config::kVecSize;
  const int first_token = tile_idx * kTokens, end_token = min(first_token + kTokens, params.num_tokens);

  wait_for_previous_kernel();
  allow_next_kernel();
  if (channel >= params.num_channels) return;
  Run run{{params, channel}};
  auto& sequence = run.sequence;
  V x[2][kAhead], before[kHistory];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first_token + i < params.num_tokens) x[0][i] = sequence.input(first_token + i);
  }
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    if (tile_idx > 0) before[j] = sequence.input(first_token - kHistory + j);
  }
  run.channels.load_weights(params.weight, params.bias, channel);
  const auto* offsets = static_cast<const typename Config::Index*>(params.offsets);
  sequence.go_to(find_segment(offsets, params.num_sequences, first_token));

  const bool begins = first_token == sequence.begin;
  if (begins) run.begin_sequence(first_token);
  // Of a sequence that began shortly before, another thread has the first of these tokens.
  const bool is_whole = begins || first_token - sequence.begin >= kHistory;
  if (is_whole && first_token + kTokens <= sequence.end && !sequence.is_padding()) {
    if (!begins) {
#pragma unroll
      for (int j = 0; j < kHistory; ++j) to_floats(before[j], run.channels.history[j]);
    }
    using T = typename Config::T;
    const T* src = static_cast<const T*>(params.x) + (first_token + kAhead) * params.x_stride + channel;
    T* dst = static_cast<T*>(params.output) + first_token * params.output_stride + channel;
#pragma unroll
    for (int round = 0; round < kTokens / kAhead; ++round) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i, src += params.x_stride) {
        if ((round + 1) * kAhead < kTokens) x[(round + 1) % 2][i] = V::load(src);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i, dst += params.output_stride) run.channels.next(x[round % 2][i]).store(dst);
    }
    return;
  }

  int start_token = first_token;
  if (sequence.begin < first_token) start_token = max(first_token, min(sequence.begin + kHistory, sequence.end));
  if (!begins) {
#pragma unroll
    for (int j = 0; j < kHistory; ++j) to_floats(sequence.history(start_token, j), run.channels.history[j]);
  }
#pragma unroll 1
  for (int token_idx = start_token; token_idx < end_token; ++token_idx) {
    if (token_idx > first_token && run.advance(token_idx)) run.begin_sequence(token_idx);
    run.compute(token_idx, sequence.input(token_idx));
  }
  if (sequence.begin < first_token || sequence.idx >= params.num_sequences) return;
  const int last = min(sequence.begin + kHistory, sequence.end);
#pragma unroll 1
  for (int token_idx = end_token; token_idx < last; ++token_idx) run.compute(token_idx, sequence.input(token_idx));
}

}  // namespace flashinfer
