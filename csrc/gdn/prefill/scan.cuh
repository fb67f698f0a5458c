// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule, of sequences that are split: the states at the borders of segments, one after the
// other, from what gdn_prefill_segments left of each (GdnSegment).
//
//   S_{i+1} = S_i transition_i + state_i        state_i <- S_i
//
//   segments of each sequence and head, with [128, 128] transitions and states, initial states [slots, num_heads, V, K]
//   -> [num_seqs, num_heads] chains of states, in place
//
// In fp32, for the sake of what is never forgotten. A block has kGdnScanRows rows of the state, a thread one column
// of them and half of the sums: 64 elements of the same column of the transition. These come from the L2 cache, and the
// registers that a product frees take the next ones.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

// Grid: sequences times heads times 128 / kGdnScanRows; 256 threads.
constexpr int kGdnScanRows = 8;

template <class Config>
__device__ void gdn_prefill_scan(const GdnPrefillParams& params) {
  constexpr int kOwn = kGdnScanRows / 2, kSlices = kGdnDim / kGdnScanRows, kTerms = kGdnDim / 2;
  static_assert(Config::kNumThreads == 2 * kGdnDim && kOwn % 4 == 0);
  struct Rows {
    float4 of[kOwn / 4];
  };
  __shared__ Rows state_smem[kGdnDim][2], sums_smem[kGdnDim][2];
  const int seq_head = int(blockIdx.x) / kSlices;
  const int seq_idx = seq_head / params.num_heads, head = seq_head % params.num_heads;
  const int column = threadIdx.x % kGdnDim, half = threadIdx.x / kGdnDim;
  const int first_row = int(blockIdx.x) % kSlices * kGdnScanRows + half * kOwn;  // of those whose sums it completes
  const GdnSequence tokens = GdnSequence::of(params, seq_idx);
  const int num_segments = GdnPiece::count(tokens, params.segment_tokens);
  const int64_t first_slot = GdnPiece::first_slot(tokens, seq_idx, params.segment_tokens);
  GdnSegment* segment = static_cast<GdnSegment*>(params.segments) + first_slot * params.num_heads + head;

  float state[kOwn] = {};
  const auto load_initial = [&](const auto* initial) {
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      if (initial != nullptr) state[row] = to_float(initial[(first_row + row) * kGdnDim + column]);
    }
  };
  if (params.has_bf16_states) {
    load_initial(initial_state_of<bf16>(params, seq_idx, head));
  } else {
    load_initial(initial_state_of<float>(params, seq_idx, head));
  }
  wait_for_previous_kernel();  // and not before, for the kernel of chunks has waited for what the caller gave
  allow_next_kernel();
  float transition[kTerms];
  const auto load_transition = [&](const GdnSegment* of, int i) {
    transition[i] = of->transition[(half * kTerms + i) * kGdnDim + column];
  };
  if (num_segments > 2) {
#pragma unroll
    for (int i = 0; i < kTerms; ++i) load_transition(segment + params.num_heads, i);
  }
#pragma unroll 1
  for (int i = 0; i < num_segments; ++i) {
    float* of_segment = segment->state + first_row * kGdnDim + column;
    float next[kOwn] = {};
    if (i + 1 < num_segments) {
#pragma unroll
      for (int row = 0; row < kOwn; ++row) next[row] = of_segment[row * kGdnDim];
    }
#pragma unroll
    for (int row = 0; row < kOwn; ++row) of_segment[row * kGdnDim] = state[row];
    segment += params.num_heads;
    if (i > 0 && i + 1 < num_segments) {  // the first segment began with the state itself
      float (&shared)[kOwn] = reinterpret_cast<float (&)[kOwn]>(state_smem[column][half]);
#pragma unroll
      for (int row = 0; row < kOwn; ++row) shared[row] = state[row];
      __syncthreads();
      const bool has_next = i + 2 < num_segments;  // the transition of the last segment is nobody's
      float sums[2][kOwn] = {};
#pragma unroll
      for (int j = 0; j < kTerms; ++j) {
#pragma unroll
        for (int part = 0; part < kGdnScanRows / 4; ++part) {
          const float4 x = state_smem[half * kTerms + j][part / (kOwn / 4)].of[part % (kOwn / 4)];
          float* sum = sums[part / (kOwn / 4)] + part % (kOwn / 4) * 4;
          sum[0] += x.x * transition[j], sum[1] += x.y * transition[j];
          sum[2] += x.z * transition[j], sum[3] += x.w * transition[j];
        }
        if (has_next) load_transition(segment, j);
      }
      // Those that the other thread completes.
      float (&given)[kOwn] = reinterpret_cast<float (&)[kOwn]>(sums_smem[column][half]);
#pragma unroll
      for (int row = 0; row < kOwn; ++row) given[row] = half == 0 ? sums[1][row] : sums[0][row];
      __syncthreads();
      const float (&taken)[kOwn] = reinterpret_cast<const float (&)[kOwn]>(sums_smem[column][1 - half]);
#pragma unroll
      for (int row = 0; row < kOwn; ++row) next[row] += (half == 0 ? sums[0][row] : sums[1][row]) + taken[row];
    }
#pragma unroll
    for (int row = 0; row < kOwn; ++row) state[row] = next[row];
  }
}

}  // namespace flashinfer
