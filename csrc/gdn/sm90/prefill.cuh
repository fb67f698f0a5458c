// SPDX-License-Identifier: Apache-2.0
// The gated delta rule over sequences on Hopper: gdn/prefill/kernel.cuh with wgmma, after the same first kernel.
//
//   Uᵀ = (Vᵀ - Sᵀ (2^G K)ᵀ) inverseᵀ        Sᵀ = 2^G_last Sᵀ + (2^(G_last - G) U)ᵀ K
//
//   q, k [num_tokens, heads of q or k, 128], v [num_tokens, heads of v, 128], states [slots, num_heads, V, K]
//   -> output [num_tokens, num_heads, 128], states
//
// A block has 64 columns of a head's state, the rows of a warpgroup's products, and a second warpgroup works on the
// chunk before; or, without an output, a warpgroup for either half of the columns.
//
//   gdn/sm90/state.cuh   carry the state, in registers, over the chunks
//   gdn/sm90/output.cuh  follow with the output
//   gdn/sm90/feed.cuh    bring in the chunks
//   gdn/sm90/tile.cuh    shared memory
//   gdn/prefill/         the unit of work, barriers, and what the first kernel leaves
#pragma once

#include "device/pdl.cuh"
#include "gdn/sm90/feed.cuh"
#include "gdn/sm90/output.cuh"
#include "gdn/sm90/state.cuh"

namespace flashinfer {

namespace sm90 {

template <class Config>
__device__ __forceinline__ void run_gdn_block(const GdnPrefillParams& params) {
  using Shape = GdnShape<Config>;
  using Smem = GdnSmem<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(Smem) <= Config::kSmemBytes && kGdnThreads<Config> == Config::kNumThreads);
  auto& smem = *reinterpret_cast<Smem*>(smem_bytes);
  // Before its waits a block reads what the caller gave, for the kernel of chunks has waited for that.
  GdnUnit unit;
  if (!unit.find<Config>(params, blockIdx.x)) {
    wait_for_previous_kernel();
    return;
  }
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane_idx = threadIdx.x % 32;
  constexpr int kFeedWarps = kGdnFeedThreads / 32, kFirstFeedWarp = Config::kNumThreads / 32 - kFeedWarps;
  const GdnFeed<Config> feed{params, smem, unit, int(threadIdx.x) - kFirstFeedWarp * 32};
  if (threadIdx.x == 0) {
    smem.full.init(kGdnFeedThreads);
    smem.empty.init(Shape::kHasOutput ? 4 : Shape::kStateWarps);
    fence_mbarrier_init();
  }
  if (warp_idx >= kFirstFeedWarp) feed.clear_values();
  __syncthreads();
  if (warp_idx < Shape::kStateWarps) {
    if constexpr (Shape::kHasOutput) grow_registers<kGdnStateRegisters>();
    wait_for_previous_kernel();
    allow_next_kernel();
    GdnState<Config>{params, smem, unit, warp_idx, lane_idx}.run();
  } else if (warp_idx >= kFirstFeedWarp) {
    if constexpr (Shape::kHasOutput) shrink_registers<kGdnFeedRegisters>();
    feed.run();
  } else if constexpr (Shape::kHasOutput) {
    grow_registers<kGdnOutputRegisters>();
    wait_for_previous_kernel();
    GdnOutput<Config>{params, smem, unit, warp_idx - Shape::kStateWarps, lane_idx}.run();
  }
}

}  // namespace sm90

// Configs and grids as of gdn/prefill/kernel.cuh.
template <class Config>
__device__ void gdn_prefill(const GdnPrefillParams& params) {
  sm90::run_gdn_block<Config>(params);
}
template <class Config>
__device__ void gdn_prefill_segments(const GdnPrefillParams& params) {
  sm90::run_gdn_block<Config>(params);
}

}  // namespace flashinfer
