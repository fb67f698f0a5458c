// SPDX-License-Identifier: Apache-2.0
// The causal convolution on the CPU: the equations and shapes of conv/causal_conv1d.cuh. A thread has some channels of
// a sequence, from its beginning to its end.
#pragma once

#include "cpu/conv/window.h"

namespace flashinfer::cpu {

template <class Config>
void causal_conv1d(const CausalConv1dParams& params) {
  using T = typename Config::T;
  using Index = typename Config::Index;
  const Index* offsets = static_cast<const Index*>(params.offsets);
  const int num_sequences = params.num_sequences;
  const int num_chunks = ceil_div(params.num_channels, kConvChannels);
  // Before, between and behind the sequences there may be tokens of none: as if of a sequence that is padding.
#pragma omp parallel for collapse(2) if (int64_t(params.num_tokens) * params.num_channels >= kMinParallelElements)
  for (int sequence = -1; sequence <= num_sequences; ++sequence) {
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      ConvWindow<Config> window(params.weight, params.bias, chunk * kConvChannels, params.num_channels);
      const int64_t begin = sequence < 0 ? 0 : int64_t(offsets[sequence]);
      const int64_t end = sequence < num_sequences ? int64_t(offsets[sequence + 1]) : int64_t(params.num_tokens);
      const bool is_real = sequence >= 0 && sequence < num_sequences;
      const int slot = is_real ? params.layout.slot<Index>(params.slots, sequence) : -1;
      const bool has_state = params.states != nullptr && slot >= 0;
      if (has_state && params.has_initial_state != nullptr && params.has_initial_state[sequence]) {
        window.load(params.states, params.layout, slot, 0);
      }
      for (int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(params.x) + t * params.x_stride + window.channel;
        T* output = static_cast<T*>(params.output) + t * params.output_stride + window.channel;
        if (!is_real || (params.states != nullptr && slot < 0)) {
          window.zero(output);
        } else {
          window.next(x, output);
        }
      }
      if (has_state && end > begin) window.store(params.states, params.layout, slot, 0);
    }
  }
}

}  // namespace flashinfer::cpu
