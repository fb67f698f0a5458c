// SPDX-License-Identifier: Apache-2.0
// What four warps do together on sm_90: registers moved between warpgroups, named barriers, the order of proxies.
#pragma once

#include "device/cp_async.cuh"
#include "device/named_barrier.cuh"

namespace flashinfer {

constexpr int kWarpgroupSize = 128;

// The registers that a thread of this warpgroup may use from here on, a multiple of 8. A kernel starts with as many for
// all; those who give some away must do so before others can get them.
template <int kNumRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kNumRegisters));
}
template <int kNumRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kNumRegisters));
}

// True in one lane of the warp, all of whose lanes call it.
__device__ __forceinline__ bool elect_lane() {
  uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred is_elected;\n"
      "elect.sync _|is_elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, is_elected;\n"
      "}\n"
      : "=r"(is_elected));
  return is_elected != 0;
}

// What this thread wrote to shared memory by ordinary stores and cp.async that have completed is visible to wgmma and
// to TMA, once a barrier has told them.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements from accumulator registers to shared memory, the inverse of ldmatrix_x4.
__device__ __forceinline__ void stmatrix_x4(uint32_t row_smem, const uint32_t (&regs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_smem), "r"(regs[0]),
               "r"(regs[1]), "r"(regs[2]), "r"(regs[3])
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&regs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_smem), "r"(regs[0]),
               "r"(regs[1]), "r"(regs[2]), "r"(regs[3])
               : "memory");
}

}  // namespace flashinfer
