// SPDX-License-Identifier: Apache-2.0
// Attention sinks (GPT-OSS): a query head has a logit of its own, which takes part in the softmax as a key without a
// value would. With s_j as in decode/kernel.cuh:
//
//   lse = log2(sum_j 2^s_j + 2^(log2(e) * sink))      out = v_scale * sum_j 2^(s_j - lse) v_j
//
// One term a row, into however many parts its keys are cut: so it enters where a row is finished, and not in its parts.
// No scale and no soft cap applies to it. -inf is no sink; a row that sees no key has out = 0 and the sink as its LSE.
#pragma once

#include "attention/score.cuh"

namespace flashinfer {

// Turns the LSE of a row's keys into that with the sink; returns what the normalized output is to be multiplied by.
FLASHINFER_FN float add_sink(float sink, float& lse) {
  const float sink_log2 = sink * kLog2E, keys = lse;
  // Without a branch, so that several rows can be under way. Of both infinities the difference would be NaN.
  const float excess = sink_log2 == kMinusInfinity ? kMinusInfinity : sink_log2 - keys;
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
  lse = fmaxf(keys, sink_log2) + fast_log2(1.f + fast_exp2(-fabsf(excess)));
  return fast_rcp(1.f + fast_exp2(excess));
#else
  lse = (sink_log2 > keys ? sink_log2 : keys) + __builtin_log2f(1.f + __builtin_exp2f(-__builtin_fabsf(excess)));
  return 1.f / (1.f + __builtin_exp2f(excess));
#endif
}

}  // namespace flashinfer
