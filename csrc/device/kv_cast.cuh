// Keys and values in a storage type, as they come out of ldmatrix, to pairs of the 16-bit type the tensor cores
// multiply.
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

template <bool kFirst, class A, class B>
struct Conditional {
  using Type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using Type = B;
};

// Which two of four bytes; as selectors of __byte_perm(x, 0, …): side by side in the low half of a register, and each
// in the upper byte of 16 bits.
struct BytePair {
  uint32_t adjacent, spread;
};
constexpr BytePair kBytes01{0x4410, 0x1404}, kBytes23{0x4432, 0x3424}, kBytes02{0x4420, 0x2404},
    kBytes13{0x4431, 0x3414};

// Two fp8 values, picked from the four of x, as fp16: exact. Before sm_89, NaN of e4m3 comes out as 480.
template <class Fp8>
__device__ __forceinline__ uint32_t expand_fp8(uint32_t x, BytePair bytes) {
  const uint32_t spread = __byte_perm(x, 0, bytes.spread);
  if constexpr (kSameType<Fp8, fp8_e5m2>) {
    return spread;  // e5m2 is the upper byte of an fp16
  } else {
    uint32_t y;
#if __CUDA_ARCH__ >= 890
    const uint16_t pair = uint16_t(__byte_perm(x, 0, bytes.adjacent));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(pair));
#else
    // Exponent and mantissa move into place; the difference of the biases is a factor of 2^8.
    const uint32_t aligned = ((spread & 0x7f007f00u) >> 1) | (spread & 0x80008000u);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(aligned), "r"(0x5c005c00u));
#endif
    return y;
  }
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

}  // namespace flashinfer
