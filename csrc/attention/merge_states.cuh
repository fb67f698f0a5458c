// Merging attention states: o = sum_i 2^(s_i - s) o_i with s = log2(sum_i 2^s_i) (the identity that FlashAttention's
// online softmax rests on; Ye et al., "Cascade Inference"). A state with s = -inf has seen no key: it weighs nothing,
// whatever its o holds, and a merge of nothing but such states is o = 0, s = -inf.
#pragma once

#include "attention/merge_params.h"
#include "attention/score.cuh"
#include "device/cast.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// One running state: a short vector of the output, and the statistics every thread of the row keeps alike.
template <int kVecSize>
struct RunningState {
  float max = kMinusInfinity, sum = 0.f;
  float out[kVecSize] = {};

  // Without a branch, so that the loads of several states can be in flight together.
  __device__ __forceinline__ void merge(const float (&other)[kVecSize], float lse) {
    const float new_max = fmaxf(max, lse), shift = new_max == kMinusInfinity ? 0.f : new_max;
    const float old_weight = fast_exp2(max - shift), weight = fast_exp2(lse - shift);
    max = new_max;
    sum = sum * old_weight + weight;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {  // what weighs nothing may be anything, NaN included
      out[i] = out[i] * old_weight + (weight == 0.f ? 0.f : other[i] * weight);
    }
  }
  __device__ __forceinline__ void normalize() {
    const float rcp_sum = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) out[i] *= rcp_sum;
  }
  __device__ __forceinline__ float lse() const { return sum > 0.f ? max + fast_log2(sum) : kMinusInfinity; }
};

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
    const int64_t begin = params.indptr ? params.indptr[row] : row * params.num_states;
    const int64_t end = params.indptr ? params.indptr[row + 1] : begin + params.num_states;
    const int64_t head_idx = head_row - row * params.num_heads;
    constexpr int kBatch = 8;  // states in flight at a time
    for (int64_t first = begin; first < end; first += kBatch) {
      Vector vecs[kBatch];
      float lse[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t index = (first + i < end ? first + i : first) * params.num_heads + head_idx;
        vecs[i] = Vector::load(static_cast<const T*>(params.v) + index * Config::kHeadDim + column);
        lse[i] = first + i < end ? params.s[index] : kMinusInfinity;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float other[Config::kVecSize];
        to_floats(vecs[i], other);
        state.merge(other, lse[i]);
      }
    }
  }

  if constexpr (Config::kPair) __syncthreads();  // in place: every thread of a row reads s before one overwrites it
  if (!is_in_range) return;
  state.normalize();
  cast_vec<T>(state.out).store(static_cast<T*>(params.v_out) + head_row * Config::kHeadDim + column);
  if (params.s_out != nullptr && column == 0) params.s_out[head_row] = state.lse();
}

}  // namespace flashinfer
