// SPDX-License-Identifier: Apache-2.0
// The gated delta rule of decode on the CPU: the equations and shapes of gdn/decode.cuh, on states of either layout. A
// thread has the state of a head as floats, V-major, in its own memory.
#pragma once

#include "cpu/types.h"
#include "gdn/decode_params.h"

namespace flashinfer::cpu {

template <class Config>
struct HeadState {
  using StateT = typename Config::StateT;
  static constexpr int kRows = Config::kKMajor ? Config::kKeyDim : Config::kValueDim;
  static constexpr int kColumns = Config::kKMajor ? Config::kValueDim : Config::kKeyDim;

  float s[Config::kValueDim][Config::kKeyDim];

  void load(const StateT* state, int64_t row_stride) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) (Config::kKMajor ? s[j][i] : s[i][j]) = to_float(state[i * row_stride + j]);
    }
  }
  void store(StateT* state, int64_t row_stride) const {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        state[i * row_stride + j] = from_float<StateT>(Config::kKMajor ? s[j][i] : s[i][j]);
      }
    }
  }
};

// A row of q or k as floats, times a factor and, if asked, normalized.
template <class T, int N>
inline void load_row(const T* src, float (&dst)[N], float factor, bool normalize) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < N; ++i) {
    dst[i] = to_float(src[i]);
    sum += dst[i] * dst[i];
  }
  if (normalize) factor /= __builtin_sqrtf(sum + 1e-6f);
#pragma omp simd
  for (int i = 0; i < N; ++i) dst[i] *= factor;
}

template <class Config>
void decode_head(const GdnDecodeParams& params, int request_idx, int head_idx) {
  using T = typename Config::T;
  using StateT = typename Config::StateT;
  using Index = typename Config::Index;
  constexpr int kKeyDim = Config::kKeyDim, kValueDim = Config::kValueDim;
  const auto offset = [&](const DecodeTokenStrides& strides, int token_idx, int head) {
    return request_idx * strides.request + token_idx * strides.token + head * strides.head;
  };
  T* output = static_cast<T*>(params.output);
  const int slot = state_slot<Index>(params.input_slots, request_idx, params.num_slots);
  if (slot < 0) {
    for (int t = 0; t < params.num_tokens; ++t) {
      for (int i = 0; i < kValueDim; ++i) output[offset(params.output_strides, t, head_idx) + i] = from_float<T>(0.f);
    }
    return;
  }
  const StateStrides &strides = params.state_strides, &token_strides = params.token_state_strides;
  StateT* states = static_cast<StateT*>(params.states) + head_idx * strides.head;
  HeadState<Config> state;
  state.load(states + slot * strides.slot, strides.row);

  const int qk_head_idx = params.v_heads_per_head.divide(head_idx);
  const float decay_rate = __builtin_expf(static_cast<const float*>(params.a_log)[head_idx]);
  const float dt_bias = to_float(static_cast<const typename Config::BiasT*>(params.dt_bias)[head_idx]);
  for (int t = 0; t < params.num_tokens; ++t) {
    float q[kKeyDim], k[kKeyDim];
    load_row(static_cast<const T*>(params.q) + offset(params.q_strides, t, qk_head_idx), q, params.scale,
             params.use_qk_l2norm);
    load_row(static_cast<const T*>(params.k) + offset(params.k_strides, t, qk_head_idx), k, 1.f, params.use_qk_l2norm);
    const float x = to_float(static_cast<const T*>(params.a)[offset(params.a_strides, t, head_idx)]) + dt_bias;
    const float softplus = (x > 0.f ? x : 0.f) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x)));
    const float alpha = __builtin_expf(-decay_rate * softplus);
    const float b = to_float(static_cast<const T*>(params.b)[offset(params.b_strides, t, head_idx)]);
    const float beta = 1.f / (1.f + __builtin_expf(-b));

    const T* v = static_cast<const T*>(params.v) + offset(params.v_strides, t, head_idx);
    T* o = output + offset(params.output_strides, t, head_idx);
    for (int i = 0; i < kValueDim; ++i) {
      float* row = state.s[i];
      float s_k = 0.f, s_q = 0.f;
#pragma omp simd reduction(+ : s_k)
      for (int j = 0; j < kKeyDim; ++j) s_k += row[j] * k[j];
      const float write = beta * (to_float(v[i]) - alpha * s_k);
#pragma omp simd reduction(+ : s_q)
      for (int j = 0; j < kKeyDim; ++j) {
        row[j] = alpha * row[j] + write * k[j];
        s_q += row[j] * q[j];
      }
      o[i] = from_float<T>(s_q);
    }

    if (params.token_states != nullptr) {
      StateT* token_state = static_cast<StateT*>(params.token_states) + head_idx * token_strides.head;
      if (params.token_slots == nullptr) {
        token_state += request_idx * params.token_state_request_stride + t * token_strides.slot;
        state.store(token_state, token_strides.row);
      } else {
        const int token_slot = params.token_slots[int64_t(request_idx) * params.num_tokens + t];
        if (token_slot >= 0 && token_slot < params.num_token_slots) {
          state.store(token_state + token_slot * token_strides.slot, token_strides.row);
        }
      }
    }
  }
  if (!params.update_state) return;
  const int output_slot =
      params.output_slots == nullptr ? slot : state_slot<Index>(params.output_slots, request_idx, params.num_slots);
  if (output_slot >= 0) state.store(states + output_slot * strides.slot, strides.row);
}

template <class Config>
void decode_heads(const GdnDecodeParams& params) {
  const int num_heads = int(params.num_v_heads.divisor);
  const int64_t num_states = int64_t(params.batch_size) * num_heads;
#pragma omp parallel for if (num_states * Config::kKeyDim * Config::kValueDim >= kMinParallelElements)
  for (int64_t i = 0; i < num_states; ++i) decode_head<Config>(params, int(i / num_heads), int(i % num_heads));
}

template <class Config>
void gdn_decode(const GdnDecodeParams& params) {
  decode_heads<Config>(params);
}
template <class Config>
void gdn_decode_k_major(const GdnDecodeParams& params) {
  decode_heads<Config>(params);
}

}  // namespace flashinfer::cpu
