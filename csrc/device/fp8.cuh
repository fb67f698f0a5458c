// fp8 to 16 bits without leaving the integer and packed-multiply units: an fp8 value is moved to where its exponent and
// mantissa belong in the wider type, and a power of two makes up for the exponent bias. Exact, subnormals included, on
// every architecture; e4m3's NaN (S.1111.111) becomes 480, e5m2's infinities and NaN survive in fp16 only.
#pragma once

#include "device/types.cuh"

namespace flashinfer {

// Two 16-bit registers from the four bytes of one: elements 0 and 2, elements 1 and 3.
template <class T>
struct Pair16 {
  uint32_t even, odd;
};

template <class T, class Fp8>
__device__ __forceinline__ uint32_t widen_upper_bytes(uint32_t bytes);

template <>
__device__ __forceinline__ uint32_t widen_upper_bytes<fp16, fp8_e4m3>(uint32_t bytes) {
  const uint32_t moved = (bytes & 0x80008000u) | ((bytes >> 1) & 0x3f803f80u);
  uint32_t scaled;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(moved), "r"(0x5c005c00u));  // 2^8
  return scaled;
}
template <>
__device__ __forceinline__ uint32_t widen_upper_bytes<fp16, fp8_e5m2>(uint32_t bytes) {
  return bytes & 0xff00ff00u;
}
template <>
__device__ __forceinline__ uint32_t widen_upper_bytes<bf16, fp8_e4m3>(uint32_t bytes) {
  const uint32_t moved = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
  uint32_t scaled;  // sm_80 has no bf16 multiply, only the fused one; -0 keeps the sign of zeros
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(moved), "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120
  return scaled;
}
template <>
__device__ __forceinline__ uint32_t widen_upper_bytes<bf16, fp8_e5m2>(uint32_t bytes) {
  const uint32_t moved = (bytes & 0x80008000u) | ((bytes >> 3) & 0x0fe00fe0u);
  uint32_t scaled;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(moved), "r"(0x77807780u), "r"(0x80008000u));  // 2^112
  return scaled;
}

template <class T, class Fp8>
__device__ __forceinline__ Pair16<T> unpack_fp8(uint32_t bytes) {
  return {widen_upper_bytes<T, Fp8>(bytes << 8), widen_upper_bytes<T, Fp8>(bytes)};
}

}  // namespace flashinfer
