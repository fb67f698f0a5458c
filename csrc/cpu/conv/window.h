// SPDX-License-Identifier: Apache-2.0
// What the causal convolutions on the CPU share: some channels, their weights and the inputs that they still see.
#pragma once

#include "activation/gate.h"
#include "conv/params.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

constexpr int kConvChannels = 64;  // of a thread at a time

template <class Config>
struct ConvWindow {
  using T = typename Config::T;
  static constexpr int kWidth = Config::kWidth, kHistory = kWidth - 1;

  int channel, count;
  float weight[kWidth][kConvChannels], bias[kConvChannels];
  float history[kHistory][kConvChannels];  // oldest first

  ConvWindow(const void* weights, const void* biases, int first_channel, int num_channels) {
    channel = first_channel;
    count = num_channels - channel < kConvChannels ? num_channels - channel : kConvChannels;
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < kWidth; ++j) {
        weight[j][i] = to_float(static_cast<const T*>(weights)[int64_t(channel + i) * kWidth + j]);
      }
      bias[i] = biases == nullptr ? 0.f : to_float(static_cast<const T*>(biases)[channel + i]);
    }
    clear();
  }

  void clear() {
    for (auto& row : history) {
      for (float& x : row) x = 0.f;
    }
  }
  void load(const void* states, const ConvStates& layout, int slot, int start) {
    for (int j = 0; j < kHistory; ++j) {
      for (int i = 0; i < count; ++i) {
        history[j][i] = to_float(static_cast<const T*>(states)[layout.offset(slot, channel + i, start + j)]);
      }
    }
  }
  // history[first:], to the beginning of the state.
  void store(void* states, const ConvStates& layout, int slot, int first) const {
    for (int j = first; j < kHistory; ++j) {
      for (int i = 0; i < count; ++i) {
        static_cast<T*>(states)[layout.offset(slot, channel + i, j - first)] = from_float<T>(history[j][i]);
      }
    }
  }

  // The outputs at the next input.
  void next(const T* x, T* output) {
    float last[kConvChannels], sums[kConvChannels];
    for (int i = 0; i < count; ++i) {
      last[i] = to_float(x[i]);
      sums[i] = bias[i] + weight[kHistory][i] * last[i];
    }
    for (int j = 0; j < kHistory; ++j) {
      for (int i = 0; i < count; ++i) {
        sums[i] += weight[j][i] * history[j][i];
        history[j][i] = j + 1 < kHistory ? history[j + 1 < kHistory ? j + 1 : j][i] : last[i];
      }
    }
    for (int i = 0; i < count; ++i) output[i] = from_float<T>(Config::kSilu ? gate<kSilu>(sums[i]) : sums[i]);
  }

  void zero(T* output) const {
    for (int i = 0; i < count; ++i) output[i] = from_float<T>(0.f);
  }
};

}  // namespace flashinfer::cpu
