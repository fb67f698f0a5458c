// SPDX-License-Identifier: Apache-2.0
// The gated delta rule over sequences, in chunks of 64 tokens by the WY representation (Yang, Kautz & Hatamizadeh 2024,
// arXiv:2412.06464), on mma.sync and cp.async, for every GPU from sm_80 up. Of a chunk, with the state S [K, V] before
// it and G the sums of log2 alpha from its first token on:
//
//   U = (I + A)⁻¹ diag(beta) (V - 2^G K S)           A[i, j] = beta_i 2^(G_i - G_j) k_i·k_j  for j < i
//   O = scale (2^G Q S + P U)                        P[i, j] = 2^(G_i - G_j) q_i·k_j         for j <= i
//   S = 2^G_last S + Kᵀ (2^(G_last - G) U)
//
//   q, k [num_tokens, heads of q or k, 128], v [num_tokens, heads of v, 128], states [slots, num_heads, V, K]
//   -> output [num_tokens, num_heads, 128], states
//
// Kernels, in this order:
//
//   gdn/prefill/chunks.cuh  inverts the triangular systems between the tokens of chunks, of all chunks at once
//   gdn_prefill_segments    carries states over the segments of sequences that are split; without the output
//   gdn/prefill/scan.cuh    follows with the states at the segments' borders
//   gdn_prefill             carries the state from chunk to chunk, and computes the output
//
// A block has one head of a sequence or segment, and of its state kBlockV columns, which do not depend on the others.
// Its warps are of two kinds, and work on neighbouring chunks at the same time:
//
//   gdn/prefill/state.cuh   carry the state, in registers, over the chunks
//   gdn/prefill/output.cuh  bring in the chunks, and follow with the output
//   gdn/prefill/block.cuh   what they share: memory, barriers, the unit of work; and bringing in chunks alone
//
// Decays are differences of sums of log2 alpha, so that no factor exceeds 1
// where alpha does not. Products are of 16-bit operands into fp32, the state is fp32; keys and queries are brought to
// length 1 by the factors of products, not in memory.
#pragma once

#include "device/pdl.cuh"
#include "gdn/prefill/output.cuh"
#include "gdn/prefill/state.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void run_gdn_block(const GdnPrefillParams& params) {
  using Shape = GdnShape<Config>;
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  static_assert(sizeof(GdnSmem<Config>) <= Config::kSmemBytes && Shape::kNumThreads == Config::kNumThreads);
  GdnSmem<Config>& smem = *reinterpret_cast<GdnSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();
  allow_next_kernel();

  GdnUnit unit;
  if (!unit.find<Config>(params, blockIdx.x)) return;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  if (warp_idx < Shape::kStateWarps) {
    GdnState<Config>{params, smem, unit, warp_idx, lane_idx}.run();
  } else if constexpr (Shape::kHasOutput) {
    GdnOutput<Config>{params, smem, unit, Shape::kNumThreads / 32 - 1 - warp_idx, lane_idx}.run();
  } else {
    feed_state<Config>(params, smem, unit, lane_idx);
  }
}

// Config: T, State, kNormalize, kHasOutput, kBlockV, kNumStages. Grid: sequences, or where any is split slots of
// segments, times heads times 128 / kBlockV.
template <class Config>
__device__ void gdn_prefill(const GdnPrefillParams& params) {
  run_gdn_block<Config>(params);
}
// Config: T, kHasOutput, kBlockV, kNumStages. Grid: slots of segments times heads times 256 / kBlockV.
template <class Config>
__device__ void gdn_prefill_segments(const GdnPrefillParams& params) {
  run_gdn_block<Config>(params);
}

}  // namespace flashinfer
