// SPDX-License-Identifier: Apache-2.0
// Element types of the CPU target. Storage only; arithmetic is done in float.
//
// No kernel includes <cmath> or <algorithm>: g++ takes longer to read them than to compile most kernels. Elementary
// functions are the compiler's builtins.
#pragma once

#include <cstring>

#include "common.h"

namespace flashinfer {

using fp32 = float;
struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct fp8_e4m3 {
  uint8_t bits;
};
struct fp8_e5m2 {
  uint8_t bits;
};

namespace cpu {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");

// Elements below which waking the other threads costs more than their work saves, most of all where the threads
// outnumber the free cores.
constexpr int64_t kMinParallelElements = 32768;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_float(fp32 x) {
  return x;
}
inline float to_float(bf16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}
// fp16: move exponent and mantissa into place and rebias by 2^112 (exact, subnormals included). Plain integer code
// because g++ before 13 has no half type, and so that loops over it vectorize on every ISA.
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | sign);
}
// fp8 e5m2 is the upper byte of an fp16.
inline float to_float(fp8_e5m2 x) {
  return to_float(fp16{uint16_t(uint16_t(x.bits) << 8)});
}
// fp8 e4m3 (no infinity, S.1111.111 is NaN): move exponent and mantissa into place and rebias by 2^120.
inline float to_float(fp8_e4m3 x) {
  if ((x.bits & 0x7f) == 0x7f) return kNaN;
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, magnitude = uint32_t(x.bits & 0x7f) << 20;
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p120f) | sign);
}

// Round to nearest even.
template <class T>
inline T from_float(float x);
template <>
inline fp32 from_float(float x) {
  return x;
}
template <>
inline fp16 from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding 0.5 aligns the mantissa of a subnormal result to the float's last bits, rounding on the way.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return fp16{uint16_t(sign | (magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal))};
}
template <>
inline bf16 from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return bf16{uint16_t((bits >> 16) | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// fp8 saturates to the largest finite value, as PyTorch's quantizers expect, infinity included; NaN stays NaN.
template <>
inline fp8_e4m3 from_float(float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 24) & 0x80;
  const float magnitude = __builtin_fabsf(x) > 448.f ? 448.f : __builtin_fabsf(x);
  const uint32_t bits = bit_cast<uint32_t>(magnitude);
  // As for fp16: adding 2^14 leaves units of 2^-9, the smallest subnormal, in the last bits.
  const uint32_t subnormal = bit_cast<uint32_t>(magnitude + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
  const uint32_t normal = (bits - (120u << 23) + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  return fp8_e4m3{uint8_t(sign | (x != x ? 0x7fu : magnitude < 0x1p-6f ? subnormal : normal))};
}
template <>
inline fp8_e5m2 from_float(float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 24) & 0x80;
  const float magnitude = __builtin_fabsf(x) > 57344.f ? 57344.f : __builtin_fabsf(x);
  const uint32_t bits = bit_cast<uint32_t>(magnitude);
  const uint32_t subnormal = bit_cast<uint32_t>(magnitude + 0x1p7f) - bit_cast<uint32_t>(0x1p7f);  // units of 2^-16
  const uint32_t normal = (bits - (112u << 23) + 0xfffff + ((bits >> 21) & 1)) >> 21;
  return fp8_e5m2{uint8_t(sign | (x != x ? 0x7fu : magnitude < 0x1p-14f ? subnormal : normal))};
}

}  // namespace cpu
}  // namespace flashinfer
