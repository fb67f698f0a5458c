// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory that threads and asynchronous copies arrive at (sm_90).
#pragma once

#include "device/cp_async.cuh"

namespace flashinfer {

// A phase ends when as many arrivals have come as init() said, and all bytes announced by expect_bytes(). Waiting for
// the phase of parity 1 of a fresh barrier returns at once: "the phase before the first".
struct Mbarrier {
  uint64_t state;

  __device__ __forceinline__ void init(int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(num_arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(this)) : "memory");
  }
  // Without a branch, for between the start of products and the wait for them.
  __device__ __forceinline__ void arrive_if(bool arrives) {
    asm volatile(
        "{\n"
        ".reg .pred arrives;\n"
        "setp.ne.b32 arrives, %1, 0;\n"
        "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}\n" ::"r"(smem_address(this)),
        "r"(int(arrives))
        : "memory");
  }
  // At the barrier in the same place of another block of the cluster, as if it were a thread of that block: writes that
  // all of the cluster should see take a release of that scope, which waits for those to memory.
  __device__ __forceinline__ void arrive_at(uint32_t cluster_rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(smem_address(this)),
        "r"(cluster_rank)
        : "memory");
  }
  // One arrival, and num_bytes that copies will bring.
  __device__ __forceinline__ void arrive_expecting(int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(this)), "r"(num_bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred is_over;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%0], %1;\n"
        "@!is_over bra again_%=;\n"
        "}\n" ::"r"(smem_address(this)),
        "r"(parity)
        : "memory");
  }
  __device__ __forceinline__ bool is_over(uint32_t parity) {
    uint32_t is_over;
    asm volatile(
        "{\n"
        ".reg .pred is_over;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 is_over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, is_over;\n"
        "}\n"
        : "=r"(is_over)
        : "r"(smem_address(this)), "r"(parity)
        : "memory");
    return is_over != 0;
  }
};

// One arrival at the barrier when all copies by cp.async that this thread has made so far have landed.
__device__ __forceinline__ void cp_async_arrive(Mbarrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

// Makes initialized barriers visible to asynchronous copies; other threads see them after a block barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A barrier for each stage of a ring. The turn-th use of the ring is that of stage turn % kNumStages; nobody makes 2^32
// turns.
template <int kNumStages>
struct MbarrierRing {
  Mbarrier barriers[kNumStages];

  __device__ __forceinline__ void init(int num_arrivals) {
    for (int i = 0; i < kNumStages; ++i) barriers[i].init(num_arrivals);
  }
  __device__ __forceinline__ Mbarrier& at(uint32_t turn) { return barriers[turn % kNumStages]; }
  // Until the stage has been filled for this turn.
  __device__ __forceinline__ void wait_full(uint32_t turn) { at(turn).wait(turn / kNumStages & 1); }
  __device__ __forceinline__ bool is_full(uint32_t turn) { return at(turn).is_over(turn / kNumStages & 1); }
  // Until the stage has been emptied of the turn before that used it, if there was one.
  __device__ __forceinline__ void wait_empty(uint32_t turn) { at(turn).wait(~(turn / kNumStages) & 1); }
  __device__ __forceinline__ bool is_empty(uint32_t turn) { return at(turn).is_over(~(turn / kNumStages) & 1); }
};

}  // namespace flashinfer
