// SPDX-License-Identifier: Apache-2.0
// Copies of boxes of a tensor by the tensor memory accelerator (sm_90).
#pragma once

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/tensor_map.h"

namespace flashinfer {

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at these coordinates, the innermost axis first, and reports its bytes to `full`. What lies outside of
// the tensor arrives as zeros, and counts.
__device__ __forceinline__ void tma_load_5d(uint32_t dst_smem, const TensorMap& map, Mbarrier& full, int32_t x0,
                                            int32_t x1, int32_t x2, int32_t x3, int32_t x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst_smem),
      "l"(&map), "r"(smem_address(&full)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(uint32_t dst_smem, const TensorMap& map, Mbarrier& full, int32_t x0,
                                            int32_t x1, int32_t x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst_smem),
      "l"(&map), "r"(smem_address(&full)), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

// To the same place in every block of the cluster whose bit is set, each of which is told of its bytes.
__device__ __forceinline__ void tma_multicast_3d(uint32_t dst_smem, const TensorMap& map, Mbarrier& full, int32_t x0,
                                                 int32_t x1, int32_t x2, uint32_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst_smem),
      "l"(&map), "r"(smem_address(&full)), "r"(x0), "r"(x1), "r"(x2), "h"(uint16_t(ranks))
      : "memory");
}

// Copies a box of shared memory to these coordinates, after a fence of the proxies; what lies outside of the tensor is
// left out. What a thread has started up to its bulk_commit() is a group.
__device__ __forceinline__ void tma_store_3d(const TensorMap& map, uint32_t src_smem, int32_t x0, int32_t x1,
                                             int32_t x2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(src_smem), "r"(x0), "r"(x1), "r"(x2)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the shared memory of all but the thread's latest kNumPending groups has been read.
template <int kNumPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace flashinfer
