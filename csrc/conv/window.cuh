// SPDX-License-Identifier: Apache-2.0
// What a thread of the causal convolutions has: kVecSize channels, their weights, and the last kWidth − 1 inputs.
#pragma once

#include "activation/gate.h"
#include "conv/params.h"
#include "device/cast.cuh"

namespace flashinfer {

template <class Config>
struct ConvChannels {
  using T = typename Config::T;
  using V = Vec<T, Config::kVecSize>;
  static constexpr int kVecSize = Config::kVecSize, kWidth = Config::kWidth, kHistory = kWidth - 1;

  float history[kHistory][kVecSize];  // oldest first
  float weight[kWidth][kVecSize];
  float bias[kVecSize];

  __device__ __forceinline__ void load_weights(const void* weight_gmem, const void* bias_gmem, int channel) {
    // [channels, width]: vectors of it, whichever channel and tap an element is of.
    constexpr int kVec = kVecSize;
    const T* src = static_cast<const T*>(weight_gmem) + int64_t(channel) * kWidth;
#pragma unroll
    for (int i = 0; i < kVecSize * kWidth; i += kVec) {
      const auto vec = Vec<T, kVec>::load(src + i);
#pragma unroll
      for (int j = 0; j < kVec; ++j) weight[(i + j) % kWidth][(i + j) / kWidth] = to_float(vec[j]);
    }
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) bias[i] = 0.f;
    if (bias_gmem != nullptr) to_floats(V::load(static_cast<const T*>(bias_gmem) + channel), bias);
  }

  __device__ __forceinline__ static V load_state(const void* states, const ConvStates& layout, int slot, int channel,
                                                 int time) {
    const T* src = static_cast<const T*>(states) + layout.offset(slot, channel, time);
    V vec;
    if constexpr (Config::kChannelsLast) {
      vec = V::load(src);
    } else {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) vec[i] = src[i * layout.channel_stride];
    }
    return vec;
  }
  __device__ __forceinline__ static void store_state(const V& vec, void* states, const ConvStates& layout, int slot,
                                                     int channel, int time) {
    T* dst = static_cast<T*>(states) + layout.offset(slot, channel, time);
    if constexpr (Config::kChannelsLast) {
      vec.store(dst);
    } else {
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) dst[i * layout.channel_stride] = vec[i];
    }
  }

  __device__ __forceinline__ static V zeros() {
    V vec;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) vec[i] = from_float<T>(0.f);
    return vec;
  }

  // The output at the next input, which becomes the last of the history.
  __device__ __forceinline__ V next(const V& x) {
    float last[kVecSize], sums[kVecSize];
    to_floats(x, last);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      float sum = bias[i];
#pragma unroll
      for (int j = 0; j < kHistory; ++j) sum += weight[j][i] * history[j][i];
      sum += weight[kHistory][i] * last[i];
      sums[i] = Config::kSilu ? gate<kSilu>(sum) : sum;
#pragma unroll
      for (int j = 0; j + 1 < kHistory; ++j) history[j][i] = history[j + 1][i];
      history[kHistory - 1][i] = last[i];
    }
    return cast_vec<T>(sums);
  }
};

}  // namespace flashinfer
