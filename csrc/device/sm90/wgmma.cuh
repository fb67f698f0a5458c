// SPDX-License-Identifier: Apache-2.0
// Tensor-core products of a warpgroup (sm_90a): 64 rows of A by kN columns of B, 32 bytes deep (16 elements of 16 bits,
// 32 of 8), accumulated in fp32 registers. The tensor cores read B, and A unless it is in registers, from shared memory
// on their own while the threads go on.
//
// The order of things:
//   pin(d); wgmma_fence();                    registers written so far are the tensor cores'
//   Wgmma<T, kN>::...(d, a, b, accumulate);   any number of products
//   wgmma_commit();
//   ...                                       neither d nor a in registers may be touched
//   wgmma_wait<kNumPending>(); pin(d);        d may be read
//
// Thread t of the warpgroup holds rows r = 16 (t / 32) + t % 32 / 4 and r + 8: d[4 j + e] is row r, column
// 8 j + 2 (t % 4) + e, and d[4 j + 2 + e] that of row r + 8. So, of 16-bit operands, the pairs of 16 neighbouring
// columns, packed, are the four registers of A of one product: P feeds P·V without a shuffle.
//
// Of 8-bit operands, register i of A holds four neighbouring elements of row r + 8 (i % 2), those from
// 16 (i / 2) + 4 (t % 4) on, and B has to be depth-major. What sums these products is not fp32: of each, no more is
// kept than about 13 bits below the largest of them and of d. Many small products added to a large d vanish.
#pragma once

#include "device/cp_async.cuh"
#include "device/types.cuh"

namespace flashinfer {

// A tile in shared memory as wgmma finds it: panels of 128-byte rows, permuted by TMA's 128-byte swizzle (16-byte
// granule c of row r is at c ^ (r % 8)), each panel aligned to 1024 bytes. A panel is as many rows high as the tile.
constexpr int kPanelBytes = 128;  // of a row

// How wgmma is told where an operand is. The upper half is the same for all: swizzle, distance between eights of rows.
struct Operand {
  uint32_t low;

  __device__ __forceinline__ uint64_t descriptor() const {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kStrideOf8Rows = uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kStrideOf8Rows | low;
  }
  // The operand that starts num_bytes later.
  __device__ __forceinline__ Operand advanced(int num_bytes) const { return {low + uint32_t(num_bytes >> 4)}; }
};

// Operand whose rows run along the depth of the product: Q, K, and values that were transposed. What the next product
// takes is 32 bytes on, up to the end of the panel.
__device__ __forceinline__ Operand depth_major_operand(uint32_t smem) {
  return {1u << 16 | smem >> 4};
}
// B whose rows, of 16-bit elements, are the steps of the depth: V. The next 16 rows are 2048 bytes on.
__device__ __forceinline__ Operand column_major_operand(uint32_t smem, int num_rows) {
  return {uint32_t(num_rows * kPanelBytes >> 4) << 16 | smem >> 4};
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until at most kNumPending of the latest groups are under way.
template <int kNumPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNumPending) : "memory");
}

// Holds the compiler to the order above: what it does to these registers before and after stays there.
template <int kNum>
__device__ __forceinline__ void pin(float (&registers)[kNum]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kNum>
__device__ __forceinline__ void pin(uint32_t (&registers)[kNum]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Wgmma<T, kN>::multiply        d (+)= A Bᵀ, both depth-major in shared memory
//               multiply<true>  d (+)= A B, of 16-bit elements, A depth-major and B column-major in shared memory
//               multiply        d (+)= A B, A in registers, B in shared memory: column-major of 16-bit elements; of
//                               8-bit ones Bᵀ is there, depth-major
//               multiply<false> d (+)= A Bᵀ, of 16-bit elements, A in registers, B depth-major in shared memory
template <class T, int kN>
struct Wgmma;

// The assembler wants every register of d by its number.
// clang-format off
#define FLASHINFER_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASHINFER_TEXT_16 FLASHINFER_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHINFER_TEXT_24 FLASHINFER_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FLASHINFER_TEXT_32 FLASHINFER_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHINFER_TEXT_40 FLASHINFER_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASHINFER_TEXT_48 FLASHINFER_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHINFER_TEXT_56 FLASHINFER_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FLASHINFER_TEXT_64 FLASHINFER_TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHINFER_TEXT_72 FLASHINFER_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FLASHINFER_TEXT_80 FLASHINFER_TEXT_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FLASHINFER_TEXT_88 FLASHINFER_TEXT_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FLASHINFER_TEXT_96 FLASHINFER_TEXT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASHINFER_TEXT_104 FLASHINFER_TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FLASHINFER_TEXT_112 FLASHINFER_TEXT_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FLASHINFER_TEXT_120 FLASHINFER_TEXT_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FLASHINFER_TEXT_128 FLASHINFER_TEXT_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHINFER_EIGHT(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLASHINFER_REGS_8(d) FLASHINFER_EIGHT(d, 0)
#define FLASHINFER_REGS_16(d) FLASHINFER_REGS_8(d), FLASHINFER_EIGHT(d, 8)
#define FLASHINFER_REGS_24(d) FLASHINFER_REGS_16(d), FLASHINFER_EIGHT(d, 16)
#define FLASHINFER_REGS_32(d) FLASHINFER_REGS_24(d), FLASHINFER_EIGHT(d, 24)
#define FLASHINFER_REGS_40(d) FLASHINFER_REGS_32(d), FLASHINFER_EIGHT(d, 32)
#define FLASHINFER_REGS_48(d) FLASHINFER_REGS_40(d), FLASHINFER_EIGHT(d, 40)
#define FLASHINFER_REGS_56(d) FLASHINFER_REGS_48(d), FLASHINFER_EIGHT(d, 48)
#define FLASHINFER_REGS_64(d) FLASHINFER_REGS_56(d), FLASHINFER_EIGHT(d, 56)
#define FLASHINFER_REGS_72(d) FLASHINFER_REGS_64(d), FLASHINFER_EIGHT(d, 64)
#define FLASHINFER_REGS_80(d) FLASHINFER_REGS_72(d), FLASHINFER_EIGHT(d, 72)
#define FLASHINFER_REGS_88(d) FLASHINFER_REGS_80(d), FLASHINFER_EIGHT(d, 80)
#define FLASHINFER_REGS_96(d) FLASHINFER_REGS_88(d), FLASHINFER_EIGHT(d, 88)
#define FLASHINFER_REGS_104(d) FLASHINFER_REGS_96(d), FLASHINFER_EIGHT(d, 96)
#define FLASHINFER_REGS_112(d) FLASHINFER_REGS_104(d), FLASHINFER_EIGHT(d, 104)
#define FLASHINFER_REGS_120(d) FLASHINFER_REGS_112(d), FLASHINFER_EIGHT(d, 112)
#define FLASHINFER_REGS_128(d) FLASHINFER_REGS_120(d), FLASHINFER_EIGHT(d, 120)
// clang-format on

// num_regs = kN / 2; a0 to a6 are the numbers of the operands after those of d. depth_type: of A and B. majors,
// b_major: how A and B lie in shared memory, which 8-bit operands have no choice of.
#define FLASHINFER_WGMMA_OF(T, depth_type, majors, b_major, kN, num_regs, a0, a1, a2, a3, a4, a5, a6)              \
  template <>                                                                                                      \
  struct Wgmma<T, kN> {                                                                                            \
    template <bool kColumnMajor = false>                                                                           \
    __device__ __forceinline__ static void multiply(float (&d)[num_regs], Operand a, Operand b, bool accumulate) { \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" a2                                       \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #kN depth_type " {" FLASHINFER_TEXT_##num_regs              \
                   "}, %" a0 ", %" a1 ", accumulate, 1, 1" majors(a3) ";\n}\n"                                     \
                   : FLASHINFER_REGS_##num_regs(d)                                                                 \
                   : "l"(a.descriptor()), "l"(b.descriptor()), "r"(int(accumulate)), "n"(int(kColumnMajor)));      \
    }                                                                                                              \
    template <bool kColumnMajor = true>                                                                            \
    __device__ __forceinline__ static void multiply(float (&d)[num_regs], const uint32_t* a, Operand b,            \
                                                    bool accumulate) {                                             \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" a5                                       \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #kN depth_type " {" FLASHINFER_TEXT_##num_regs              \
                   "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" a4 ", accumulate, 1, 1" b_major(a6) ";\n}\n"       \
                   : FLASHINFER_REGS_##num_regs(d)                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "r"(int(accumulate)),        \
                     "n"(int(kColumnMajor)));                                                                      \
    }                                                                                                              \
  };
#define FLASHINFER_MAJORS(b_major) ", 0, %" b_major
#define FLASHINFER_B_MAJOR(b_major) ", %" b_major
#define FLASHINFER_NO_MAJORS(b_major) ""
#define FLASHINFER_WGMMA(...)                                                                        \
  FLASHINFER_WGMMA_OF(bf16, "k16.f32.bf16.bf16", FLASHINFER_MAJORS, FLASHINFER_B_MAJOR, __VA_ARGS__) \
  FLASHINFER_WGMMA_OF(fp16, "k16.f32.f16.f16", FLASHINFER_MAJORS, FLASHINFER_B_MAJOR, __VA_ARGS__)   \
  FLASHINFER_WGMMA_OF(fp8_e4m3, "k32.f32.e4m3.e4m3", FLASHINFER_NO_MAJORS, FLASHINFER_NO_MAJORS, __VA_ARGS__)

FLASHINFER_WGMMA(64, 32, "32", "33", "34", "35", "36", "37", "38")
FLASHINFER_WGMMA(80, 40, "40", "41", "42", "43", "44", "45", "46")
FLASHINFER_WGMMA(96, 48, "48", "49", "50", "51", "52", "53", "54")
FLASHINFER_WGMMA(128, 64, "64", "65", "66", "67", "68", "69", "70")
FLASHINFER_WGMMA(160, 80, "80", "81", "82", "83", "84", "85", "86")
FLASHINFER_WGMMA(176, 88, "88", "89", "90", "91", "92", "93", "94")
FLASHINFER_WGMMA(192, 96, "96", "97", "98", "99", "100", "101", "102")
FLASHINFER_WGMMA(256, 128, "128", "129", "130", "131", "132", "133", "134")

// Four floats as a register of A of 8-bit elements, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return packed;
}

}  // namespace flashinfer
