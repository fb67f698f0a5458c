// SPDX-License-Identifier: Apache-2.0
// Thread-block clusters (sm_90 and later). A block launched without a cluster is a cluster of one, and every call below
// still means what it says, without an instruction. Clusters are one-dimensional: their blocks are consecutive in
// blockIdx.x. What their blocks tell each other goes through a Mailbox.
#pragma once

#include "common.h"

namespace flashinfer {

template <int kClusterSize>
__device__ __forceinline__ int cluster_rank() {
  return kClusterSize == 1 ? 0 : blockIdx.x % kClusterSize;
}

// A split barrier that says only "this block runs": the memory of a block may be touched from outside once it has
// started. Announce first thing, await before the first remote access.
template <int kClusterSize>
__device__ __forceinline__ void cluster_announce() {
  if constexpr (kClusterSize > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

template <int kClusterSize>
__device__ __forceinline__ void cluster_await() {
  if constexpr (kClusterSize > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace flashinfer
