// SPDX-License-Identifier: Apache-2.0
// How keys and values, and queries of 8 bits, come from their storage type to the 16-bit type T that the tensor cores
// multiply.
//
// ldmatrix deals out registers of four bytes: two elements of 16 bits, or four of one byte. A codec makes pairs of T of
// them. A storage type without a codec does not compile: nothing is taken for fp8 because it is one byte wide.
//
// fp8 is exact, subnormals included, on every architecture. NaN and infinities of e5m2 survive in fp16; e4m3's NaN
// (S.1111.111) does where the hardware converts (fp16 from sm_89 on) and becomes 480 elsewhere.
#pragma once

#include "device/mma.cuh"

namespace flashinfer {

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

template <class T>
__device__ __forceinline__ float2 unpack_16bit(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_16bit<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_16bit<fp16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// A pair of one 16-bit type as a pair of another. bf16 saturates at the largest fp16; NaN stays.
template <class To, class From>
__device__ __forceinline__ uint32_t cast_16bit(uint32_t pair) {
  if constexpr (kSameType<To, From>) return pair;
  float2 x = unpack_16bit<From>(pair);
  if constexpr (kSameType<To, fp16>) {
    constexpr float kMaxHalf = 65504.f;
    x.x = x.x > kMaxHalf ? kMaxHalf : x.x < -kMaxHalf ? -kMaxHalf : x.x;
    x.y = x.y > kMaxHalf ? kMaxHalf : x.y < -kMaxHalf ? -kMaxHalf : x.y;
  }
  return pack_16bit<To>(x.x, x.y);
}

// Two of a register's four bytes, and where to have them: side by side in the lower half, or each in the upper byte of
// a half, above zeros. That is where an fp8 value has the sign of a 16-bit one.
struct BytePair {
  uint32_t first, second;

  __device__ __forceinline__ uint16_t adjacent_in(uint32_t x) const {
    if (second == first + 1 && first % 2 == 0) return uint16_t(x >> 8 * first);  // an operand as it is
    return uint16_t(__byte_perm(x, 0, 0x4400 | second << 4 | first));
  }
  __device__ __forceinline__ uint32_t spread_from(uint32_t x) const {
    return __byte_perm(x, 0, second << 12 | 0x0404 | first << 4);
  }
  // The same, above bits that may be anything.
  __device__ __forceinline__ uint32_t upper_of(uint32_t x) const {
    if (first == 1 && second == 3) return x;
    if (first == 0 && second == 2) return x << 8;
    return spread_from(x);
  }
};
constexpr BytePair kBytes01{0, 1}, kBytes23{2, 3}, kBytes02{0, 2}, kBytes13{1, 3};

// kPerRegister elements lie in a register. Where it is two, pair(x) is both; where it is four, pair(x, bytes) is two of
// them.
template <class T, class Kv>
struct KvCodec;

template <class T>
struct KvCodec<T, fp16> {
  static constexpr int kPerRegister = 2;
  __device__ __forceinline__ static uint32_t pair(uint32_t x) { return cast_16bit<T, fp16>(x); }
};
template <class T>
struct KvCodec<T, bf16> {
  static constexpr int kPerRegister = 2;
  __device__ __forceinline__ static uint32_t pair(uint32_t x) { return cast_16bit<T, bf16>(x); }
};

// e5m2 is the upper byte of an fp16. Otherwise exponent and mantissa move to where they belong in the wider type, and a
// power of two makes up for the difference of the exponents' biases.
template <>
struct KvCodec<fp16, fp8_e5m2> {
  static constexpr int kPerRegister = 4;
  __device__ __forceinline__ static uint32_t pair(uint32_t x, BytePair bytes) { return bytes.spread_from(x); }
};
template <>
struct KvCodec<fp16, fp8_e4m3> {
  static constexpr int kPerRegister = 4;
  __device__ __forceinline__ static uint32_t pair(uint32_t x, BytePair bytes) {
    uint32_t y;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(bytes.adjacent_in(x)));
#else
    const uint32_t upper = bytes.upper_of(x), moved = (upper & 0x80008000u) | ((upper >> 1) & 0x3f803f80u);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(moved), "r"(0x5c005c00u));  // 2^8
#endif
    return y;
  }
};
// In the upper bytes of a register's halves: exponent and mantissa move down by kShift, to those of a bf16 (kMask), and
// are scaled. sm_80 has no bf16 multiply, only the fused one; -0 keeps the sign of zeros.
template <int kShift, uint32_t kMask, uint32_t kFactor>
__device__ __forceinline__ uint32_t widen_to_bf16(uint32_t upper) {
  const uint32_t moved = (upper & 0x80008000u) | ((upper >> kShift) & kMask);
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(moved), "r"(kFactor), "r"(0x80008000u));
  return y;
}
template <>
struct KvCodec<bf16, fp8_e4m3> {
  static constexpr int kPerRegister = 4;
  __device__ __forceinline__ static uint32_t pair(uint32_t x, BytePair bytes) {
    return widen_to_bf16<4, 0x07f007f0u, 0x7b807b80u>(bytes.upper_of(x));  // 2^120
  }
};
template <>
struct KvCodec<bf16, fp8_e5m2> {
  static constexpr int kPerRegister = 4;
  __device__ __forceinline__ static uint32_t pair(uint32_t x, BytePair bytes) {
    return widen_to_bf16<3, 0x0fe00fe0u, 0x77807780u>(bytes.upper_of(x));  // 2^112
  }
};

// What to multiply queries of type Q and keys of type Kv in, where only instructions count. fp8 widens to fp16 in one,
// to bf16 in five; q in bf16 then narrows to fp16, which is exact but for magnitudes no query has (it saturates at
// 65504 and loses bits below 6e-5).
template <class Q, class Kv>
struct CheapestOperand {
  using Type = Q;
};
template <class Q>
struct CheapestOperand<Q, fp8_e4m3> {
  using Type = fp16;
};
template <class Q>
struct CheapestOperand<Q, fp8_e5m2> {
  using Type = fp16;
};
// Where 16-bit queries stay as they are.
template <class Q, class Kv>
struct QueryOperand {
  using Type = Q;
};
template <class Kv>
struct QueryOperand<fp8_e4m3, Kv> : CheapestOperand<fp8_e4m3, Kv> {};

}  // namespace flashinfer
