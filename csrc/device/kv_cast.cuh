// Keys and values in a storage type, as they come out of ldmatrix, to pairs of the 16-bit type the tensor cores multiply.
#pragma once

#include "device/mma.cuh"

namespace flashinfer {

// Transpose an 8x8 matrix of 16-bit elements held by a warp, two a lane: row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

// Two of the four bytes of x, picked by the selectors below, each in the upper half of 16 bits.
enum BytePair : uint32_t { kBytes01 = 0x1404, kBytes23 = 0x3424, kBytes02 = 0x2404, kBytes13 = 0x3414 };

template <class Mma, class Fp8>
__device__ __forceinline__ uint32_t expand_fp8(uint32_t x, BytePair bytes) {
  // fp8 widens by moving its exponent and mantissa into place and multiplying by the difference of the biases: exact,
  // subnormals included. NaN and infinity of the storage type come out finite, except e5m2 to fp16.
  const uint32_t shifted = __byte_perm(x, 0, bytes);
  if constexpr (kSameType<Mma, fp16> && kSameType<Fp8, fp8_e5m2>) return shifted;
  constexpr bool kToHalf = kSameType<Mma, fp16>;
  constexpr int kShift = kToHalf ? 1 : kSameType<Fp8, fp8_e4m3> ? 4 : 3;
  const uint32_t magnitude = (shifted & 0x7f007f00u) >> kShift, sign = shifted & 0x80008000u;
  const uint32_t aligned = magnitude | sign;
  uint32_t y;
  if constexpr (kToHalf) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(aligned), "r"(0x5c005c00u));  // 2^8
  } else {
    constexpr uint32_t kFactor = kSameType<Fp8, fp8_e4m3> ? 0x7b807b80u : 0x77807780u;  // 2^120, 2^112
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(aligned), "r"(kFactor), "r"(0x80008000u));
  }
  return y;
}

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


// A pair of one 16-bit type as a pair of another.
template <class To, class From>
__device__ __forceinline__ uint32_t cast_16bit(uint32_t pair) {
  if constexpr (kSameType<To, From>) return pair;
  const float2 x = unpack_16bit<From>(pair);
  return pack_16bit<To>(x.x, x.y);
}

}  // namespace flashinfer
