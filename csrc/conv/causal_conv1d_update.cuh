// SPDX-License-Identifier: Apache-2.0
// The next tokens of each request through a causal convolution of each channel (Gu & Dao 2023, arXiv:2312.00752):
//
//   output[b, t, c] = silu(bias[c] + sum_j weight[c, j] · h[t + j])       h = kWidth − 1 inputs of the state, x[b, 0,
//   c], … states[b, c] <- the last kWidth − 1 of h
//
//   x, output [batch_size, num_tokens, num_channels] T      states [num_slots, num_channels, length] T
//
// Of a draft (num_accepted), how many of its tokens stay is not known yet: all of h but its oldest is kept, and the
// next call says how many of the tokens were accepted, which is where the history in the state begins, plus 1.
//
// Memory-bound, and short: a thread has a vector of channels of one request.
#pragma once

#include "conv/window.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// Grid: ceil(num_channels / (kNumThreads · kVecSize)) · batch_size, channels first.
template <class Config>
__device__ __forceinline__ void causal_conv1d_update(const CausalConv1dUpdateParams& params) {
  using T = typename Config::T;
  using Index = typename Config::Index;
  using Channels = ConvChannels<Config>;
  using V = typename Channels::V;
  constexpr int kHistory = Channels::kHistory;
  const int blocks_per_row = ceil_div(params.num_channels, Config::kNumThreads * Config::kVecSize);
  const int request_idx = int(blockIdx.x) / blocks_per_row;
  const int channel =
      ((int(blockIdx.x) - request_idx * blocks_per_row) * Config::kNumThreads + int(threadIdx.x)) * Config::kVecSize;

  wait_for_previous_kernel();
  allow_next_kernel();
  if (channel >= params.num_channels) return;
  int64_t first = 0, num_tokens = params.num_tokens;
  const T* x_gmem = static_cast<const T*>(params.x) + channel + request_idx * params.x_request_stride;
  T* output_gmem = static_cast<T*>(params.output) + channel + request_idx * params.output_request_stride;
  if (params.offsets != nullptr) {
    const Index* offsets = static_cast<const Index*>(params.offsets) + request_idx;
    first = offsets[0] > 0 ? int64_t(offsets[0]) : 0;
    num_tokens = (offsets[1] < params.num_tokens ? int64_t(offsets[1]) : int64_t(params.num_tokens)) - first;
  }
  if (num_tokens <= 0) return;
  x_gmem += first * params.x_stride;
  output_gmem += first * params.output_stride;
  const int slot = params.layout.slot<Index>(params.slots, request_idx);
  if (slot < 0) {
    for (int t = 0; t < num_tokens; ++t) Channels::zeros().store(output_gmem + t * params.output_stride);
    return;
  }

  int start = 0;  // of the history in the state
  if (params.num_accepted != nullptr) {
    const int64_t accepted = static_cast<const Index*>(params.num_accepted)[request_idx];
    const int last = params.layout.length - kHistory;
    start = accepted - 1 < 0 ? 0 : accepted - 1 < last ? int(accepted - 1) : last;
  }
  V x = V::load(x_gmem);
  Channels channels;
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    to_floats(Channels::load_state(params.states, params.layout, slot, channel, start + j), channels.history[j]);
  }
  channels.load_weights(params.weight, params.bias, channel);
  if (params.num_accepted != nullptr) {
#pragma unroll
    for (int j = 1; j < kHistory; ++j) {
      Channels::store_state(cast_vec<T>(channels.history[j]), params.states, params.layout, slot, channel, j - 1);
    }
  }
  for (int t = 0; t < num_tokens; ++t) {
    const V current = x;
    if (t + 1 < num_tokens) x = V::load(x_gmem + (t + 1) * params.x_stride);
    channels.next(current).store(output_gmem + t * params.output_stride);
    if (params.num_accepted != nullptr && kHistory - 1 + t < params.layout.length) {
      Channels::store_state(current, params.states, params.layout, slot, channel, kHistory - 1 + t);
    }
  }
  if (params.num_accepted == nullptr) {
#pragma unroll
    for (int j = 0; j < kHistory; ++j) {
      Channels::store_state(cast_vec<T>(channels.history[j]), params.states, params.layout, slot, channel, j);
    }
  }
}

}  // namespace flashinfer
