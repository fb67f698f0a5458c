// Thread-block clusters and distributed shared memory (sm_90 and later). A block launched without a cluster is a
// cluster of one, and every call below still means what it says: no instruction for it, or a block barrier.
// Clusters are one-dimensional: their blocks are consecutive in blockIdx.x.
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

// Barrier over all threads of the cluster; shared memory written before it, own or remote, is visible after it.
template <int kClusterSize>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (kClusterSize > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}

// The address, in the shared memory of block `rank` of the cluster, of what `local` names in our own.
template <int kClusterSize, class T>
__device__ __forceinline__ T* shared_at_rank(T* local, int rank) {
  if constexpr (kClusterSize == 1) return local;
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return remote;
}

// Loads one word of another block's shared memory. The address is made anew each time: kept for all ranks at once, such
// addresses fill the registers.
template <int kClusterSize>
__device__ __forceinline__ uint32_t load_shared_at_rank(const uint32_t* local, int rank) {
  if constexpr (kClusterSize == 1) return *local;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t word;
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote];}\n"
      : "=r"(word)
      : "r"(address), "r"(rank)
      : "memory");
  return word;
}

}  // namespace flashinfer
