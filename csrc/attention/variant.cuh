// What a kernel does to a score besides scaling it, and which keys a query sees. All of it is fixed at compile time by
// the constants of Config, so an unused option costs nothing.
//
//   kMask         MaskKind: none, causal (aligned to the end of the KV), or a custom bit mask
//   kHasWindow    sees only keys at most window_left before the query's position
//   kHasSoftCap   logits = cap * tanh(logits / cap)
//   kPosEncoding  PosEncoding: none, ALiBi bias, or rotation of q and k on the fly
//
// Positions: key j is at j, query i of a request is at kv_len - qo_len + i.
//
// To add an option: what it does to a score here, in Variant (kIsPlain, scale_log2, transform) or as a new condition of
// visibility; its value in AttentionParams; its constant among the axes and in _config of prefill.py and decode.py in
// flashinfer/families/attention/; its argument in flashinfer/attention/variant.py. Kernels know nothing else of it.
#pragma once

#include "attention/params.h"
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "device/fast_math.cuh"
#endif

namespace flashinfer {

enum MaskKind : int { kMaskNone = 0, kMaskCausal = 1, kMaskCustom = 2 };
enum PosEncoding : int { kPosNone = 0, kPosRope = 1, kPosAlibi = 2 };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = __builtin_bit_cast(float, 0xff800000u);  // the LSE of no key

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// From exp2: tanh.approx is off by up to 5e-4, which a soft cap of 50 turns into 2.5% of a probability.
FLASHINFER_FN float soft_tanh(float x) {
  return 1.f - __fdividef(2.f, 1.f + fast_exp2(2.f * kLog2E * x));
}
#else
FLASHINFER_FN float soft_tanh(float x) {
  return __builtin_tanhf(x);
}
#endif

template <class Config>
struct Variant {
  static constexpr bool kHasAlibi = Config::kPosEncoding == kPosAlibi;
  static constexpr bool kHasRope = Config::kPosEncoding == kPosRope;
  // A plain variant leaves the raw q·k untouched, so that scaling folds into the exponent's multiply-add.
  static constexpr bool kIsPlain = !Config::kHasSoftCap && !kHasAlibi;
  static constexpr bool kHasMask = Config::kMask != kMaskNone || Config::kHasWindow;

  // softmax weight = exp2(transform(q·k) * scale - max * scale)
  FLASHINFER_FN static float scale_log2(const AttentionParams& params) {
    if constexpr (kIsPlain) return params.sm_scale * kLog2E;
    if constexpr (Config::kHasSoftCap) return params.logits_soft_cap * kLog2E;
    return kLog2E;
  }

  // distance = key position - query position; alibi_slope is read only under ALiBi.
  FLASHINFER_FN static float transform(const AttentionParams& params, float qk, float alibi_slope, int32_t distance) {
    if constexpr (kIsPlain) return qk;
    float logit = qk * params.sm_scale;
    if constexpr (kHasAlibi) logit += alibi_slope * float(distance);
    if constexpr (Config::kHasSoftCap) logit = soft_tanh(logit / params.logits_soft_cap);
    return logit;
  }

  FLASHINFER_FN static float alibi_slope(const AttentionParams& params, int32_t qo_head_idx) {
    if constexpr (kHasAlibi) return params.alibi_slopes[qo_head_idx];
    return 0.f;
  }

  // Start of a request's bits in the custom mask; query i, key j is bit i * kv_len + j.
  template <class Params>
  FLASHINFER_FN static const uint8_t* mask_of(const Params& params, int32_t request_idx) {
    if constexpr (Config::kMask != kMaskCustom) return nullptr;
    return params.mask_indptr == nullptr ? params.mask : params.mask + params.mask_indptr[request_idx];
  }

  // kv_idx < kv_len is the caller's business. The window counts back from the query's position.
  FLASHINFER_FN static bool is_visible(const AttentionParams& params, const uint8_t* mask, int32_t qo_idx,
                                       int32_t kv_idx, int32_t qo_len, int32_t kv_len) {
    const int32_t position = kv_len - qo_len + qo_idx;
    bool visible = true;
    if constexpr (Config::kMask == kMaskCausal) visible = kv_idx <= position;
    if constexpr (Config::kMask == kMaskCustom) {
      const int64_t bit = int64_t(qo_idx) * kv_len + kv_idx;
      visible = (mask[bit >> 3] >> (bit & 7)) & 1;
    }
    if constexpr (Config::kHasWindow) visible = visible && kv_idx + int64_t(params.window_left) >= position;
    return visible;
  }
};

// Rotary embedding in the Llama style: element i < head_dim / 2 is rotated with element i + head_dim / 2 by the angle
// position * theta^(-2i / head_dim) / rope_scale. Frequencies are kept in turns per position: reducing the angle is
// then one rounding, and what the fp32 product loses at long contexts is added back before it.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
template <int kHeadDim>
FLASHINFER_FN float rope_turns(const AttentionParams& params, int32_t pair_idx) {
  constexpr float kRcpTwoPi = 0.15915494309189535f;
  return exp2f(float(pair_idx) * (-2.f / kHeadDim) * params.rope_log2_theta) * params.rope_rcp_scale * kRcpTwoPi;
}

FLASHINFER_FN void rope_cos_sin(float turns, int32_t position, float& cos, float& sin) {
  constexpr float kTwoPi = 6.283185307179586f;
  const float product = turns * float(position);
  const float lost = fmaf(turns, float(position), -product);
  const float angle = ((product - rintf(product)) + lost) * kTwoPi;  // in [-pi, pi], where the fast functions are exact
  cos = __cosf(angle);
  sin = __sinf(angle);
}
#endif

}  // namespace flashinfer
