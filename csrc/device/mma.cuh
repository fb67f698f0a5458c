// SPDX-License-Identifier: Apache-2.0
// Warp-wide tensor-core products of 16-bit operands with an fp32 accumulator (sm_80 and later).
//
// m16n8k16 fragments of lane l, with g = l / 4 and q = l % 4:
//   A (16x16, row-major):  a[0] = A[g][2q, 2q+1], a[1] = A[g+8][..], a[2] = A[g][2q+8, 2q+9], a[3] = A[g+8][..]
//   B (16x8, k by n):      b[0] = B[2q, 2q+1][g], b[1] = B[2q+8, 2q+9][g]
//   C (16x8):              c[0, 1] = C[g][2q, 2q+1], c[2, 3] = C[g+8][2q, 2q+1]
// so two neighbouring C tiles, packed to 16 bits, are one A fragment: that is how P feeds P·V without a shuffle.
#pragma once

#include "device/types.cuh"

namespace flashinfer {

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as one register of 16-bit elements, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_16bit(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_16bit<fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack_16bit<bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace flashinfer
