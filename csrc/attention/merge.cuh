// SPDX-License-Identifier: Apache-2.0
// Attention over parts of a KV, merged into that over all of it. The state of a query over one part is its normalized
// output o over that part and s = log2 of the sum of exponentials:
//
//   s = log2(sum_i 2^s_i)      o = sum_i 2^(s_i - s) o_i
//
// (the identity that FlashAttention's online softmax rests on; Ye et al., "Cascade Inference"). A state with s = -inf
// has seen no key: it weighs nothing, whatever its o holds, and a merge of nothing but such states is o = 0, s = -inf.
//
// Kernels that cut the KV of a query into parts leave a state of each in scratch memory. No block waits for another:
// the one that is last to arrive merges. Many parts are merged in groups first, so that several blocks share the work.
#pragma once

#include "attention/merge_tree.h"
#include "attention/score.cuh"
#include "device/atomic.cuh"

namespace flashinfer {

// One running state: a short vector of the output, and the statistics every thread of the row keeps alike.
template <int kVecSize>
struct RunningState {
  float max = kMinusInfinity, sum = 0.f;
  float out[kVecSize] = {};

  // Without a branch, so that the loads of several states can be in flight together; and their weights do not wait for
  // each other.
  template <int kNum>
  __device__ __forceinline__ void merge(const float (&others)[kNum][kVecSize], const float (&lse)[kNum]) {
    float new_max = max;
#pragma unroll
    for (int j = 0; j < kNum; ++j) new_max = fmaxf(new_max, lse[j]);
    const float shift = new_max == kMinusInfinity ? 0.f : new_max, old_weight = fast_exp2(max - shift);
    max = new_max;
    sum *= old_weight;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) out[i] *= old_weight;
#pragma unroll
    for (int j = 0; j < kNum; ++j) {
      const float weight = fast_exp2(lse[j] - shift);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) {  // what weighs nothing may be anything, NaN included
        out[i] += weight == 0.f ? 0.f : others[j][i] * weight;
      }
    }
  }
  __device__ __forceinline__ void merge(const float (&other)[kVecSize], float other_lse) {
    float others[1][kVecSize];
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) others[0][i] = other[i];
    merge(others, {other_lse});
  }
  __device__ __forceinline__ void normalize() {
    const float rcp_sum = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) out[i] *= rcp_sum;
  }
  __device__ __forceinline__ float lse() const { return sum > 0.f ? max + fast_log2(sum) : kMinusInfinity; }
};

// True in every thread that calls sync() if their block is the last of `count` to come to the counter, which returns to
// zero by itself, so that a captured launch can be replayed. It then sees what all of them wrote before, where it reads
// from the L2 cache. thread_idx: among those threads.
template <class Sync>
__device__ __forceinline__ bool arrives_last(uint32_t* counter_gmem, int32_t count, uint32_t& is_last_smem,
                                             int thread_idx, const Sync& sync) {
  sync();
  if (thread_idx == 0) is_last_smem = atomic_inc_acq_rel(counter_gmem, uint32_t(count - 1)) == uint32_t(count - 1);
  sync();
  return is_last_smem;
}

}  // namespace flashinfer
