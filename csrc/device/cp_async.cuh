// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from device memory to shared memory (sm_80 and later).
#pragma once

#include "common.h"

namespace flashinfer {

__device__ __forceinline__ uint32_t smem_address(const void* smem_ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem_ptr));
}

// Copy 16 bytes past L1, or write 16 zero bytes when `valid` is false: the source is then not read, so it may point
// anywhere. Both addresses are 16-byte aligned. Not a fence for the compiler: other reads of shared memory may move
// past it, as they must for address tables to be read in one go; commit, wait and barriers are.
__device__ __forceinline__ void cp_async_16(uint32_t dst_smem, const void* src_gmem, bool valid) {
  const int num_source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst_smem), "l"(src_gmem),
               "r"(num_source_bytes));
}

// The same of 4 bytes, through L1: rows of a few of them share its lines.
__device__ __forceinline__ void cp_async_4(uint32_t dst_smem, const void* src_gmem, bool valid) {
  const int num_source_bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst_smem), "l"(src_gmem), "r"(num_source_bytes));
}

// For data that is read once: L2 gives its place away first, to what others will come back to.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_16(uint32_t dst_smem, const void* src_gmem, bool valid, uint64_t l2_policy) {
  const int num_source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(dst_smem),
               "l"(src_gmem), "r"(num_source_bytes), "l"(l2_policy));
}

// Close the group of copies this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Wait until at most kNumPending of this thread's latest groups are still in flight. Other threads' copies are visible
// only after a barrier.
template <int kNumPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNumPending) : "memory");
}

// Wait for all copies of this thread, whether in a group or not.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

}  // namespace flashinfer
