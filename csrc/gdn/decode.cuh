// SPDX-License-Identifier: Apache-2.0
// The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464), one token after the other, on states that
// lie V-major. Of each value head, with S its state, α = exp(−exp(a_log) · softplus(a + dt_bias)) and β = sigmoid(b):
//
//   S ← α S + β (v − α S k) kᵀ          o = scale · S q          q, k ← x / sqrt(sum x² + 1e-6), if use_qk_l2norm
//
//   q, k [batch, num_tokens, num_heads, kKeyDim] T          v, o [batch, num_tokens, num_v_heads, kValueDim] T
//   S [num_slots, num_v_heads, kValueDim, kKeyDim] StateT    a, b [batch, num_tokens, num_v_heads] T
//
// A head of q and k is shared by v_heads_per_head value heads. Computed in fp32; the state is rounded where it is
// stored, and not between the tokens of a call.
//
// Bound by the state, which is read and written once, 16 bytes a lane. Rows of S do not depend on each other, so a warp
// has some of them to itself, all of whose loads are in flight at once, and no block waits for anything. S k and S q of
// the old state are one sweep, because S_new q = α S q + β (v − α S k) · (k·q). A 16-bit state stays as it was loaded
// until it is overwritten, in half the registers; of several tokens, it is held as fp32.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "device/reduce.cuh"
#include "gdn/decode_params.h"

namespace flashinfer {

// N elements as floats, in as few loads as 16 bytes allow.
template <class T, int N>
__device__ __forceinline__ void load_floats(const T* src, float (&dst)[N]) {
  constexpr int kVec = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += kVec) {
    const auto vec = Vec<T, kVec>::load(src + i);
#pragma unroll
    for (int j = 0; j < kVec; ++j) dst[i + j] = to_float(vec[j]);
  }
}
template <class T, int N>
__device__ __forceinline__ void store_floats(const float (&src)[N], T* dst) {
  constexpr int kVec = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += kVec) {
    float part[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) part[j] = src[i + j];
    cast_vec<T>(part).store(dst + i);
  }
}

// α and β of one token of one head.
struct DeltaGates {
  float alpha, beta;

  template <class Config>
  __device__ __forceinline__ static DeltaGates load(const GdnDecodeParams& params, int request_idx, int token_idx,
                                                    int head_idx) {
    using T = typename Config::T;
    const DecodeTokenStrides &a_strides = params.a_strides, &b_strides = params.b_strides;
    const float a = to_float(static_cast<const T*>(
        params.a)[request_idx * a_strides.request + token_idx * a_strides.token + head_idx * a_strides.head]);
    const float b = to_float(static_cast<const T*>(
        params.b)[request_idx * b_strides.request + token_idx * b_strides.token + head_idx * b_strides.head]);
    const float x = a + to_float(static_cast<const typename Config::BiasT*>(params.dt_bias)[head_idx]);
    // log(1 + exp(x)) without its overflow.
    const float softplus = fmaxf(x, 0.f) + log1pf(expf(-fabsf(x)));
    const float a_log = static_cast<const float*>(params.a_log)[head_idx];
    return {expf(-expf(a_log) * softplus), 1.f / (1.f + expf(-b))};
  }
};

// What a lane has of the state: kRows consecutive rows, kElems of each.
template <class Config>
struct DecodeRows {
  using StateT = typename Config::StateT;
  static constexpr int kElems = 16 / sizeof(StateT);
  static constexpr int kLanesPerRow = Config::kKeyDim / kElems;
  static constexpr int kRows = Config::kRowsPerLane;
  static constexpr int kRowsPerWarp = kRows * (kWarpSize / kLanesPerRow);
  static_assert(kLanesPerRow <= kWarpSize && Config::kValueDim % kRowsPerWarp == 0);
  using V = Vec<StateT, kElems>;

  V stored[kRows];         // of one token
  float s[kRows][kElems];  // of several

  __device__ __forceinline__ float at(int i, int j) const {
    return Config::kOneToken ? to_float(stored[i][j]) : s[i][j];
  }
  __device__ __forceinline__ void load(const StateT* state_gmem, int64_t row_stride) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) stored[i] = V::load(state_gmem + i * row_stride);
    if constexpr (!Config::kOneToken) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) to_floats(stored[i], s[i]);
    }
  }
  __device__ __forceinline__ void store(StateT* state_gmem, int64_t row_stride) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const V row = Config::kOneToken ? stored[i] : cast_vec<StateT>(s[i]);
      row.store(state_gmem + i * row_stride);
    }
  }
  __device__ __forceinline__ void decay_and_write(float alpha, const float (&writes)[kRows], const float (&k)[kElems]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float row[kElems];
#pragma unroll
      for (int j = 0; j < kElems; ++j) row[j] = alpha * at(i, j) + writes[i] * k[j];
      if constexpr (Config::kOneToken) {
        stored[i] = cast_vec<StateT>(row);
      } else {
#pragma unroll
        for (int j = 0; j < kElems; ++j) s[i][j] = row[j];
      }
    }
  }
};

// Grid: batch · num_v_heads · kValueDim / rows of a block.
template <class Config>
__device__ __forceinline__ void gdn_decode(const GdnDecodeParams& params) {
  using T = typename Config::T;
  using StateT = typename Config::StateT;
  using Index = typename Config::Index;
  using Rows = DecodeRows<Config>;
  constexpr int kElems = Rows::kElems, kRows = Rows::kRows, kLanesPerRow = Rows::kLanesPerRow;
  constexpr int kWarpsPerHead = Config::kValueDim / Rows::kRowsPerWarp;

  // Which rows of which state.
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  const uint32_t tile_idx = blockIdx.x * (Config::kNumThreads / kWarpSize) + warp_idx;
  const int request_head = tile_idx / kWarpsPerHead;
  const int request_idx = params.num_v_heads.divide(request_head);
  const int head_idx = request_head - request_idx * int(params.num_v_heads.divisor);
  const int qk_head_idx = params.v_heads_per_head.divide(head_idx);
  const int row = (tile_idx % kWarpsPerHead) * Rows::kRowsPerWarp + lane_idx / kLanesPerRow * kRows;
  const int lane_in_row = lane_idx % kLanesPerRow, column = lane_in_row * kElems;
  // Of the sums over a row's lanes, S k and S q of each row in turn, a lane receives one.
  constexpr int kLanesPerSum = kLanesPerRow / (2 * kRows);
  const int own_row = lane_in_row / kLanesPerSum / 2;
  const bool has_output = lane_in_row % (2 * kLanesPerSum) == kLanesPerSum;

  wait_for_previous_kernel();
  allow_next_kernel();
  if (request_idx >= params.batch_size) return;  // whole warps

  T* output_gmem = static_cast<T*>(params.output) + request_idx * params.output_strides.request +
                   head_idx * params.output_strides.head + row + own_row;
  const int slot = state_slot<Index>(params.input_slots, request_idx, params.num_slots);
  if (slot < 0) {
    for (int t = 0; t < params.num_tokens; ++t) {
      if (has_output) output_gmem[t * params.output_strides.token] = from_float<T>(0.f);
    }
    return;
  }
  const StateStrides& strides = params.state_strides;
  StateT* states_gmem = static_cast<StateT*>(params.states) + head_idx * strides.head + row * strides.row + column;
  Rows state;
  state.load(states_gmem + slot * strides.slot, strides.row);

  const T* q_gmem = static_cast<const T*>(params.q) + request_idx * params.q_strides.request +
                    qk_head_idx * params.q_strides.head + column;
  const T* k_gmem = static_cast<const T*>(params.k) + request_idx * params.k_strides.request +
                    qk_head_idx * params.k_strides.head + column;
  const T* v_gmem = static_cast<const T*>(params.v) + request_idx * params.v_strides.request +
                    head_idx * params.v_strides.head + row + own_row;
  const int num_tokens = Config::kOneToken ? 1 : params.num_tokens;
  for (int t = 0; t < num_tokens; ++t) {
    float q[kElems], k[kElems];
    load_floats(q_gmem + t * params.q_strides.token, q);
    load_floats(k_gmem + t * params.k_strides.token, k);
    const float v = to_float(v_gmem[t * params.v_strides.token]);
    const DeltaGates gates = DeltaGates::load<Config>(params, request_idx, t, head_idx);

    float q_dot_q = 0.f, k_dot_k = 0.f, k_dot_q = 0.f;
#pragma unroll
    for (int j = 0; j < kElems; ++j) {
      q_dot_q += q[j] * q[j];
      k_dot_k += k[j] * k[j];
      k_dot_q += k[j] * q[j];
    }
    k_dot_q = warp_reduce<kLanesPerRow>(k_dot_q, Sum{});
    float q_scale = params.scale, k_scale = 1.f;
    if (params.use_qk_l2norm) {
      q_scale *= rsqrtf(warp_reduce<kLanesPerRow>(q_dot_q, Sum{}) + 1e-6f);
      k_scale = rsqrtf(warp_reduce<kLanesPerRow>(k_dot_k, Sum{}) + 1e-6f);
    }
    k_dot_q *= k_scale * q_scale;
#pragma unroll
    for (int j = 0; j < kElems; ++j) {
      q[j] *= q_scale;
      k[j] *= k_scale;
    }

    float sums[2 * kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kElems; ++j) {
        sums[2 * i] += state.at(i, j) * k[j];
        sums[2 * i + 1] += state.at(i, j) * q[j];
      }
    }
    const float sum = warp_sums<kLanesPerRow>(sums);
    const float write = gates.beta * (v - gates.alpha * sum);  // in lanes of S k
    const float write_of_row = __shfl_xor_sync(0xffffffffu, write, kLanesPerSum);
    const float o = gates.alpha * sum + write_of_row * k_dot_q;  // in lanes of S q
    if (has_output) output_gmem[t * params.output_strides.token] = from_float<T>(o);
    float writes[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      writes[i] = __shfl_sync(0xffffffffu, write, 2 * i * kLanesPerSum, kLanesPerRow);
    }
    state.decay_and_write(gates.alpha, writes, k);

    if (!Config::kOneToken && params.token_states != nullptr) {
      const StateStrides& token_strides = params.token_state_strides;
      StateT* token_gmem =
          static_cast<StateT*>(params.token_states) + head_idx * token_strides.head + row * token_strides.row + column;
      if (params.token_slots == nullptr) {
        token_gmem += request_idx * params.token_state_request_stride + t * token_strides.slot;
        state.store(token_gmem, token_strides.row);
      } else {
        const int token_slot = params.token_slots[request_idx * params.num_tokens + t];
        if (token_slot >= 0 && token_slot < params.num_token_slots) {
          state.store(token_gmem + token_slot * token_strides.slot, token_strides.row);
        }
      }
    }
  }

  if (!params.update_state) return;
  int output_slot = slot;
  if (params.output_slots != nullptr) {
    output_slot = state_slot<Index>(params.output_slots, request_idx, params.num_slots);
  }
  if (output_slot >= 0) state.store(states_gmem + output_slot * strides.slot, strides.row);
}

}  // namespace flashinfer
