// SPDX-License-Identifier: Apache-2.0
// The next tokens through a causal convolution on the CPU: the equations and shapes of conv/causal_conv1d_update.cuh.
#pragma once

#include "cpu/conv/window.h"

namespace flashinfer::cpu {

template <class Config>
void causal_conv1d_update(const CausalConv1dUpdateParams& params) {
  using T = typename Config::T;
  using Index = typename Config::Index;
  constexpr int kHistory = ConvWindow<Config>::kHistory;
  const ConvStates& layout = params.layout;
  const int num_chunks = ceil_div(params.num_channels, kConvChannels);
#pragma omp parallel for collapse(2) if (int64_t(params.batch_size) * params.num_channels >= kMinParallelElements)
  for (int request = 0; request < params.batch_size; ++request) {
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      ConvWindow<Config> window(params.weight, params.bias, chunk * kConvChannels, params.num_channels);
      int64_t first = 0, num_tokens = params.num_tokens;
      if (params.offsets != nullptr) {
        const Index* offsets = static_cast<const Index*>(params.offsets) + request;
        first = int64_t(offsets[0]), num_tokens = int64_t(offsets[1]) - first;
      }
      if (num_tokens <= 0) continue;
      const T* x = static_cast<const T*>(params.x) + request * params.x_request_stride + first * params.x_stride;
      T* output =
          static_cast<T*>(params.output) + request * params.output_request_stride + first * params.output_stride;
      x += window.channel, output += window.channel;
      const int slot = layout.slot<Index>(params.slots, request);
      if (slot < 0) {
        for (int64_t t = 0; t < num_tokens; ++t) window.zero(output + t * params.output_stride);
        continue;
      }
      const bool is_draft = params.num_accepted != nullptr;
      int64_t start = 0;
      if (is_draft) {
        start = int64_t(static_cast<const Index*>(params.num_accepted)[request]) - 1;
        const int64_t last = layout.length - kHistory;
        start = start < 0 ? 0 : start < last ? start : last;
      }
      window.load(params.states, layout, slot, int(start));
      if (is_draft) window.store(params.states, layout, slot, 1);
      for (int64_t t = 0; t < num_tokens; ++t) {
        window.next(x + t * params.x_stride, output + t * params.output_stride);
        if (is_draft && kHistory - 1 + t < layout.length) {
          for (int i = 0; i < window.count; ++i) {
            static_cast<T*>(params.states)[layout.offset(slot, window.channel + i, int(kHistory - 1 + t))] =
                x[t * params.x_stride + i];
          }
        }
      }
      if (!is_draft) window.store(params.states, layout, slot, 0);
    }
  }
}

}  // namespace flashinfer::cpu
