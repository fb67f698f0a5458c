// SPDX-License-Identifier: Apache-2.0
// Values that the blocks of a cluster leave in each other's shared memory (sm_90 and later).
//
// A mailbox counts the bytes that arrive with it; who waits for a number of bytes sees all of them. This takes the
// place of a barrier of the cluster, whose release makes every warp flush its writes to all of the L2 cache first:
// about a microsecond, and with thousands of blocks a good part of the cache's throughput.
//
// A block that runs alone needs no mailbox: the calls below are plain stores and a block barrier.
#pragma once

#include "device/cluster.cuh"

namespace flashinfer {

template <int kClusterSize>
struct Mailbox {
  uint64_t state;

  // Makes mailboxes ready and announces the block to the cluster. Called by all threads; cluster_await before the first
  // send.
  __device__ __forceinline__ static void open(Mailbox* mailboxes, int num) {
    if constexpr (kClusterSize == 1) return;
    if (threadIdx.x == 0) {
      for (int i = 0; i < num; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(mailboxes + i)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_announce<kClusterSize>();
  }

  // Stores value in block `rank`, where our own block has *local, and counts its bytes there: 4, 8 or 16.
  template <class T>
  __device__ __forceinline__ void send(T* local, const T& value, int rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (kClusterSize == 1) {
      *local = value;
    } else {
      const uint32_t place = address_at(local, rank), mailbox = address_at(this, rank);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&value);
      if constexpr (sizeof(T) == 4) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(place),
                     "r"(words[0]), "r"(mailbox)
                     : "memory");
      } else if constexpr (sizeof(T) == 8) {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(place),
                     "r"(words[0]), "r"(words[1]), "r"(mailbox)
                     : "memory");
      } else {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
            "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(mailbox)
            : "memory");
      }
    }
  }

  // Waits until num_bytes have arrived, for the num_before + 1st time. Called by all threads of the block. Does not
  // hold threads together that send nothing.
  __device__ __forceinline__ void receive(uint32_t num_bytes, int num_before) {
    if constexpr (kClusterSize == 1) {
      __syncthreads();
    } else {
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(this)), "r"(num_bytes)
                     : "memory");
      }
      asm volatile(
          "{.reg .pred done;\n"
          "again_%=:\n"
          "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
          "@!done bra again_%=;}\n" ::"r"(address(this)),
          "r"(num_before & 1)
          : "memory");
    }
  }

 private:
  __device__ __forceinline__ static uint32_t address(const void* local) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(local));
  }
  __device__ __forceinline__ static uint32_t address_at(const void* local, int rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address(local)), "r"(rank));
    return remote;
  }
};

}  // namespace flashinfer
