// SPDX-License-Identifier: Apache-2.0
// The gated delta rule over sequences on the CPU, token by token as gdn/prefill/params.h writes it. A row of the state
// as [V, K] depends on no other row: a thread takes a few of them, as floats, through a whole sequence.
#pragma once

#include "cpu/math.h"
#include "cpu/types.h"
#include "gdn/prefill/params.h"

namespace flashinfer::cpu {

constexpr int kGdnHeadDim = 128, kGdnRows = 16;

// 128 elements as floats, of length 1 if so wanted.
template <bool kNormalize, class T>
inline void load_gdn_row(const T* src, float (&dst)[kGdnHeadDim]) {
  float sum_of_squares = 0.f;
#pragma omp simd reduction(+ : sum_of_squares)
  for (int i = 0; i < kGdnHeadDim; ++i) {
    dst[i] = to_float(src[i]);
    sum_of_squares += dst[i] * dst[i];
  }
  if constexpr (kNormalize) {
    const float scale = 1.f / __builtin_sqrtf(sum_of_squares + 1e-6f);
#pragma omp simd
    for (int i = 0; i < kGdnHeadDim; ++i) dst[i] *= scale;
  }
}

template <class Config>
inline void gdn_prefill_rows(const GdnPrefillParams& params, int32_t seq_idx, int32_t head, int32_t first_row) {
  using T = typename Config::T;
  using State = typename Config::State;
  constexpr int kDim = kGdnHeadDim;
  float state[kGdnRows][kDim], k[kDim], q[kDim];

  const State* initial = initial_state_of<State>(params, seq_idx, head);
  for (int row = 0; row < kGdnRows; ++row) {
    for (int i = 0; i < kDim; ++i) {
      state[row][i] = initial != nullptr ? to_float(initial[(first_row + row) * kDim + i]) : 0.f;
    }
  }
  const GdnSequence sequence = GdnSequence::of(params, seq_idx);
  const auto row_of = [&](const void* base, const GdnRowStrides& strides, int64_t token, int32_t row_head) {
    return static_cast<const T*>(base) + token * strides.token + row_head * strides.head;
  };
  for (int64_t token = sequence.begin; token < sequence.end; ++token) {
    load_gdn_row<Config::kNormalize>(row_of(params.q, params.q_strides, token, head / params.heads_per_q), q);
    load_gdn_row<Config::kNormalize>(row_of(params.k, params.k_strides, token, head / params.heads_per_k), k);
    const T* v = row_of(params.v, params.v_strides, token, head / params.heads_per_v);
    const GdnRowStrides &of_gate = params.gate_strides, &of_beta = params.beta_strides;
    float alpha = 1.f, beta = 1.f;
    if (params.gate != nullptr) alpha = params.gate[token * of_gate.token + head * of_gate.head];
    if (params.gate != nullptr && Config::kLogGate) alpha = __builtin_expf(alpha);
    if (params.beta != nullptr) beta = params.beta[token * of_beta.token + head * of_beta.head];
    T* output =
        static_cast<T*>(params.output) + token * params.output_strides.token + head * params.output_strides.head;
    for (int row = 0; row < kGdnRows; ++row) {
      float* s = state[row];
      float recalled = 0.f, o = 0.f;
#pragma omp simd reduction(+ : recalled)
      for (int i = 0; i < kDim; ++i) recalled += s[i] * k[i];
      const float u = beta * (to_float(v[first_row + row]) - alpha * recalled);
#pragma omp simd reduction(+ : o)
      for (int i = 0; i < kDim; ++i) {
        s[i] = alpha * s[i] + u * k[i];
        o += s[i] * q[i];
      }
      output[first_row + row] = from_float<T>(params.scale * o);
    }
  }
  State* final_state = final_state_of<State>(params, seq_idx, head);
  if (final_state == nullptr) return;
  for (int row = 0; row < kGdnRows; ++row) {
    for (int i = 0; i < kDim; ++i) final_state[(first_row + row) * kDim + i] = from_float<State>(state[row][i]);
  }
}

template <class Config>
void gdn_prefill(const GdnPrefillParams& params) {
  constexpr int kParts = kGdnHeadDim / kGdnRows;
  const int64_t num_units = int64_t(params.num_seqs) * params.num_heads * kParts;
#pragma omp parallel for schedule(dynamic)
  for (int64_t unit = 0; unit < num_units; ++unit) {
    const int32_t seq_head = int32_t(unit / kParts), part = int32_t(unit % kParts);
    gdn_prefill_rows<Config>(params, seq_head / params.num_heads, seq_head % params.num_heads, part * kGdnRows);
  }
}

}  // namespace flashinfer::cpu
