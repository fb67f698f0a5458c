// SPDX-License-Identifier: Apache-2.0
// From a product of query and key to a logit:
//
//   logit = sm_scale * (q · k)
//   logit = logit + slope of the head * (position of k - position of q)   kPosEncoding: ALiBi
//   logit = cap * tanh(logit / cap)                                       kHasSoftCap
//   logit = score(logit, request, head, positions)                        Function: of a caller, instead of the above
//
// sm_scale includes the scales of quantized queries and keys, v_scale that of values. Those that only the device knows
// (kHasDeviceScales) are read where they are used: a launch, and a graph that holds it, takes what is there by then.
//
// Which of these happen is fixed at compile time by the constants of Config, so an unused one costs nothing. Which keys
// a query sees at all is visibility.cuh's.
//
// To add an option: what it does to a score here (kIsPlain, scale_log2, transform); its value in AttentionParams; its
// constant among the axes and in _config of prefill.py and decode.py in flashinfer/families/attention/; its argument in
// flashinfer/attention/variant.py. Kernels know nothing else of it.
#pragma once

#include "attention/function.cuh"

namespace flashinfer {

// RoPE, in the style of Llama, turns queries and keys before their product: element i < head_dim / 2 with element
// i + head_dim / 2 by position * theta^(-2i / head_dim) / rope_scale. See device/rotary.cuh for the angle.
enum PosEncoding : int { kPosNone = 0, kPosRope = 1, kPosAlibi = 2 };

// The running maximum that scales the probabilities of prefill may lag behind the true one by so many powers of two, so
// that most tiles need not rescale the output: probabilities then reach 2^kMaxLag, which 16 bits and the fp32 sums hold
// as well as 1.
constexpr float kMaxLag = 8.f;

template <class Config>
struct Score {
  static constexpr bool kHasAlibi = Config::kPosEncoding == kPosAlibi;
  static constexpr bool kHasRope = Config::kPosEncoding == kPosRope;
  using Function = typename Config::Function;
  static_assert(!Function::kHasScore || !(Config::kHasSoftCap || kHasAlibi));
  // A plain score leaves the raw q·k untouched, so that scaling folds into the exponent's multiply-add.
  static constexpr bool kIsPlain = !Config::kHasSoftCap && !kHasAlibi && !Function::kHasScore;

  // softmax weight = exp2(transform(q·k) * scale - max * scale)
  FLASHINFER_FN static float scale_log2(const AttentionParams& params) {
    if constexpr (kIsPlain) return sm_scale(params) * kLog2E;
    if constexpr (Config::kHasSoftCap) return params.logits_soft_cap * kLog2E;
    if constexpr (Function::kHasScore) return Function::scale(params.extras, sm_scale(params)) * kLog2E;
    return kLog2E;
  }

  // alibi_slope is read only under ALiBi.
  FLASHINFER_FN static float transform(const AttentionParams& params, float qk, float alibi_slope, const ScoreAt& at) {
    if constexpr (kIsPlain) return qk;
    if constexpr (Function::kHasScore) return Function::score(params.extras, sm_scale(params), qk, at);
    // Divided once for all scores, not each.
    const float factor = Config::kHasSoftCap ? 1.f / params.logits_soft_cap : 1.f;
    float logit = qk * (sm_scale(params) * factor);
    if constexpr (kHasAlibi) logit += alibi_slope * factor * float(at.k - at.q);
    if constexpr (Config::kHasSoftCap) logit = soft_tanh(logit);
    return logit;
  }

  FLASHINFER_FN static float alibi_slope(const AttentionParams& params, int32_t qo_head_idx) {
    if constexpr (kHasAlibi) return params.alibi_slopes[qo_head_idx];
    return 0.f;
  }

  // Of the output.
  FLASHINFER_FN static float v_scale(const AttentionParams& params) {
    return params.v_scale * value_of(params.device_v_scale);
  }

 private:
  FLASHINFER_FN static float sm_scale(const AttentionParams& params) {
    return params.sm_scale * value_of(params.device_q_scale) * value_of(params.device_k_scale);
  }
  FLASHINFER_FN static float value_of(const float* device_scale) {
    if constexpr (Config::kHasDeviceScales) return *device_scale;
    return 1.f;
  }
};

}  // namespace flashinfer
