// SPDX-License-Identifier: Apache-2.0
// Warp-wide loads of 8x8 matrices of 16-bit elements from shared memory into mma fragments. They stay in order with
// barriers and with each other; data written by ordinary stores needs a barrier (__syncwarp at least) in between.
#pragma once

#include "common.h"

namespace flashinfer {

// Four 8x8 matrices. Lane l passes the address of row l % 8 of matrix l / 8 (16 bytes, aligned); register i of lane l
// receives row l / 4, elements 2 (l % 4) and the next, of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&regs)[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(row_smem));
}

// The same, each matrix transposed: lane l receives column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&regs)[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(row_smem));
}

// Transpose an 8x8 matrix of 16-bit elements held by a warp, two a lane: row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace flashinfer
