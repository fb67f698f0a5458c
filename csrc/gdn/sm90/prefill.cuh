// The gated delta rule over sequences on Hopper: gdn/prefill/kernel.cuh with wgmma, after the same first kernel.
//
//   Uᵀ = (Vᵀ - Sᵀ (2^G K)ᵀ) inverseᵀ        Sᵀ = 2^G_last Sᵀ + (2^(G_last - G) U)ᵀ K
//
//   q, k [num_tokens, heads of q or k, 128], v [num_tokens, heads of v, 128], states [slots, num_heads, V, K]
//   -> output [num_tokens, num_heads, 128], states
//
// A block has 64 columns of a head's state, the rows of a warpgroup's products; two warpgroups work on neighbouring
// chunks.
//
//   gdn/sm90/state.cuh   carry the state, in registers, over the chunks
//   gdn/sm90/output.cuh  bring in the chunks, and follow with the output
//   gdn/sm90/tile.cuh    shared memory
//   gdn/prefill/         the unit of work, barriers, and what the first kernel leaves
#pragma once

#include "device/pdl.cuh"
#include "gdn/sm90/output.cuh"
#include "gdn/sm90/state.cuh"

namespace flashinfer {

// Config and grids as of gdn/prefill/kernel.cuh.
template <class Config>
__device__ void gdn_prefill(const GdnPrefillParams& params) {
  using Shape = GdnShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(sm90::GdnSmem<Config>) <= Config::kSmemBytes && Shape::kNumThreads == Config::kNumThreads);
  auto& smem = *reinterpret_cast<sm90::GdnSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();
  allow_next_kernel();

  GdnUnit unit;
  if (!unit.find<Config>(params, blockIdx.x)) return;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane_idx = threadIdx.x % 32;
  if (warp_idx < Shape::kStateWarps) {
    sm90::GdnState<Config>{params, smem, unit, warp_idx, lane_idx}.run();
  } else {
    sm90::GdnOutput<Config>{params, smem, unit, warp_idx - Shape::kStateWarps, lane_idx}.run();
  }
}

template <class Config>
__device__ void gdn_prefill_segments(const GdnPrefillParams& params) {
  using Shape = GdnShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(sm90::GdnSmem<Config>) <= Config::kSmemBytes && Shape::kNumThreads == Config::kNumThreads);
  auto& smem = *reinterpret_cast<sm90::GdnSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();
  allow_next_kernel();

  GdnUnit unit;
  if (!unit.find<Config>(params, blockIdx.x)) return;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane_idx = threadIdx.x % 32;
  if (warp_idx < Shape::kStateWarps) {
    sm90::GdnState<Config>{params, smem, unit, warp_idx, lane_idx}.run();
  } else {
    feed_state<Config, sm90::GdnFeed<Config>>(params, smem, unit, lane_idx);
  }
}

}  // namespace flashinfer
