// SPDX-License-Identifier: Apache-2.0
// The operators that merge attention states by the equations of merge.cuh: a pair, or for every row a list, of equal or
// of varying length.
//
//   pair:  v, v_other [num_rows, num_heads, head_dim], s, s_other [num_rows, num_heads]
//   list:  v [states, num_heads, head_dim], s [states, num_heads]; row r has states [indptr[r], indptr[r + 1]), or
//          num_states of them from r times a stride on
//   ->     v_out [num_rows, num_heads, head_dim], s_out [num_rows, num_heads]
#pragma once

#include "attention/merge.cuh"
#include "attention/merge_params.h"
#include "device/cast.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// Merges num_states states of a head, kBatch of them in flight at a time, then what is left in batches half as large:
// no load is sent for a state that is not there. v, s: of the first; they move on.
template <int kBatch, class Config>
__device__ __forceinline__ void merge_list(const MergeParams& params, const typename Config::T*& v, const float*& s,
                                           int32_t num_states, RunningState<Config::kVecSize>& state) {
  using Vector = Vec<typename Config::T, Config::kVecSize>;
#pragma unroll 1
  for (; num_states >= kBatch; num_states -= kBatch) {
    Vector vecs[kBatch];
    float lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, v += params.v_state_stride, s += params.s_state_stride) {
      vecs[i] = Vector::load(v);
      lse[i] = *s;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float other[Config::kVecSize];
      to_floats(vecs[i], other);
      state.merge(other, lse[i]);
    }
  }
  if constexpr (kBatch > 1) merge_list<kBatch / 2, Config>(params, v, s, num_states, state);
}

// Config: T, kHeadDim, kVecSize, kNumThreads (a multiple of kHeadDim / kVecSize), and kPair: merge v with v_other, else
// the states of a list. A block takes kNumThreads vectors of the output, whole rows of them.
template <class Config>
__device__ void merge_states(const MergeParams& params) {
  using T = typename Config::T;
  using Vector = Vec<T, Config::kVecSize>;
  constexpr int kThreadsPerRow = Config::kHeadDim / Config::kVecSize;
  constexpr int kRowsPerBlock = Config::kNumThreads / kThreadsPerRow;
  static_assert(Config::kNumThreads % kThreadsPerRow == 0);
  wait_for_previous_kernel();
  allow_next_kernel();

  const int64_t head_row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;  // row x head
  const int column = threadIdx.x % kThreadsPerRow * Config::kVecSize;
  const int64_t row = head_row / params.num_heads;
  const bool is_in_range = row < params.num_rows;

  RunningState<Config::kVecSize> state;
  const auto merge_state = [&](const void* states_gmem, const float* lse_gmem, int64_t index) {
    float other[Config::kVecSize];
    to_floats(Vector::load(static_cast<const T*>(states_gmem) + index * Config::kHeadDim + column), other);
    state.merge(other, lse_gmem[index]);
  };
  if constexpr (Config::kPair) {
    if (is_in_range) merge_state(params.v, params.s, head_row);
    if (is_in_range && (params.mask == nullptr || params.mask[row])) {
      merge_state(params.v_other, params.s_other, head_row);
    }
  } else if (is_in_range) {
    const int64_t head_idx = head_row - row * params.num_heads;
    const T* v = static_cast<const T*>(params.v) + head_idx * Config::kHeadDim + column;
    const float* s = params.s + head_idx;
    const int32_t begin = params.indptr ? params.indptr[row] : 0;
    const int32_t num_states = params.indptr ? params.indptr[row + 1] - begin : params.num_states;
    v += params.indptr ? begin * params.v_state_stride : row * params.v_row_stride;
    s += params.indptr ? begin * params.s_state_stride : row * params.s_row_stride;
    merge_list<8, Config>(params, v, s, num_states, state);
  }

  if constexpr (Config::kPair) __syncthreads();  // in place: every thread of a row reads s before one overwrites it
  if (!is_in_range) return;
  state.normalize();
  cast_vec<T>(state.out).store(static_cast<T*>(params.v_out) + head_row * Config::kHeadDim + column);
  if (params.s_out != nullptr && column == 0) params.s_out[head_row] = state.lse();
}

}  // namespace flashinfer
