// From a product of query and key to a logit:
//
//   logit = sm_scale * (q · k)
//   logit = logit + slope of the head * (position of k - position of q)   kPosEncoding: ALiBi
//   logit = cap * tanh(logit / cap)                                       kHasSoftCap
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

#include "attention/params.h"
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "device/fast_math.cuh"
#endif

namespace flashinfer {

// RoPE, in the style of Llama, turns queries and keys before their product: element i < head_dim / 2 with element
// i + head_dim / 2 by position * theta^(-2i / head_dim) / rope_scale. See device/rotary.cuh for the angle.
enum PosEncoding : int { kPosNone = 0, kPosRope = 1, kPosAlibi = 2 };

constexpr float kLog2E = 1.4426950408889634f;
// The running maximum that scales the probabilities of prefill may lag behind the true one by so many powers of two, so
// that most tiles need not rescale the output: probabilities then reach 2^kMaxLag, which 16 bits and the fp32 sums hold
// as well as 1.
constexpr float kMaxLag = 8.f;
constexpr float kMinusInfinity = __builtin_bit_cast(float, 0xff800000u);  // the LSE of no key

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// From exp2: tanh.approx is off by up to 5e-4, which a soft cap of 50 turns into 2.5% of a probability.
FLASHINFER_FN float soft_tanh(float x) {
  return fmaf(-2.f, fast_rcp(1.f + fast_exp2(2.f * kLog2E * x)), 1.f);
}
#else
FLASHINFER_FN float soft_tanh(float x) {
  return __builtin_tanhf(x);
}
#endif

template <class Config>
struct Score {
  static constexpr bool kHasAlibi = Config::kPosEncoding == kPosAlibi;
  static constexpr bool kHasRope = Config::kPosEncoding == kPosRope;
  // A plain score leaves the raw q·k untouched, so that scaling folds into the exponent's multiply-add.
  static constexpr bool kIsPlain = !Config::kHasSoftCap && !kHasAlibi;

  // softmax weight = exp2(transform(q·k) * scale - max * scale)
  FLASHINFER_FN static float scale_log2(const AttentionParams& params) {
    if constexpr (kIsPlain) return sm_scale(params) * kLog2E;
    if constexpr (Config::kHasSoftCap) return params.logits_soft_cap * kLog2E;
    return kLog2E;
  }

  // distance = key position - query position; alibi_slope is read only under ALiBi.
  FLASHINFER_FN static float transform(const AttentionParams& params, float qk, float alibi_slope, int32_t distance) {
    if constexpr (kIsPlain) return qk;
    // Divided once for all scores, not each.
    const float factor = Config::kHasSoftCap ? 1.f / params.logits_soft_cap : 1.f;
    float logit = qk * (sm_scale(params) * factor);
    if constexpr (kHasAlibi) logit += alibi_slope * factor * float(distance);
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
