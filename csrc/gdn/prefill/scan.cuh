// Prefill of the gated delta rule, of sequences that are split: the states at the borders of segments, one after the
// other, from what gdn_prefill_segments left of each (GdnSegment).
//
//   S_{i+1} = S_i transition_i + state_i        state_i <- S_i
//
// In fp32, for the sake of what is never forgotten. A block has kRows rows of the state, a thread one column of them
// and half of the sums: 64 elements of the same column of the transition. These come from the L2 cache, and the
// registers that a product frees take the next ones.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

// Config: State. Grid: sequences times heads times 128 / kGdnScanRows; 256 threads.
constexpr int kGdnScanRows = 8;

template <class Config>
__device__ void gdn_prefill_scan(const GdnPrefillParams& params) {
  using State = typename Config::State;
  constexpr int kRows = kGdnScanRows, kSlices = kGdnDim / kRows, kTerms = kGdnDim / 2;
  static_assert(Config::kNumThreads == 2 * kGdnDim && kRows == 8);
  __shared__ float4 state_smem[kGdnDim][2], sums_smem[kGdnDim][2];  // four rows each
  wait_for_previous_kernel();
  allow_next_kernel();

  const int seq_head = int(blockIdx.x) / kSlices;
  const int seq_idx = seq_head / params.num_heads, head = seq_head % params.num_heads;
  const int column = threadIdx.x % kGdnDim, half = threadIdx.x / kGdnDim;
  const int first_row = int(blockIdx.x) % kSlices * kRows + half * 4;  // of the four whose sums the thread completes
  const GdnSequence tokens = GdnSequence::of(params, seq_idx);
  const int num_segments = GdnPiece::count(tokens, params.segment_tokens);
  const int64_t first_slot = GdnPiece::first_slot(tokens, seq_idx, params.segment_tokens);
  GdnSegment* segment = static_cast<GdnSegment*>(params.segments) + first_slot * params.num_heads + head;

  float4 state = {};
  const State* initial = initial_state_of<State>(params, seq_idx, head);
  if (initial != nullptr) {
    const State* src = initial + first_row * kGdnDim + column;
    state = {to_float(src[0]), to_float(src[kGdnDim]), to_float(src[2 * kGdnDim]), to_float(src[3 * kGdnDim])};
  }
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
    float4 next = {};
    if (i + 1 < num_segments) {
      next = {of_segment[0], of_segment[kGdnDim], of_segment[2 * kGdnDim], of_segment[3 * kGdnDim]};
    }
    of_segment[0] = state.x, of_segment[kGdnDim] = state.y;
    of_segment[2 * kGdnDim] = state.z, of_segment[3 * kGdnDim] = state.w;
    segment += params.num_heads;
    if (i > 0 && i + 1 < num_segments) {  // the first segment began with the state itself
      state_smem[column][half] = state;
      __syncthreads();
      const bool has_next = i + 2 < num_segments;  // the transition of the last segment is nobody's
      float4 sums[2] = {};
#pragma unroll
      for (int j = 0; j < kTerms; ++j) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const float4 x = state_smem[half * kTerms + j][part];
          sums[part].x += x.x * transition[j], sums[part].y += x.y * transition[j];
          sums[part].z += x.z * transition[j], sums[part].w += x.w * transition[j];
        }
        if (has_next) load_transition(segment, j);
      }
      sums_smem[column][half] = half == 0 ? sums[1] : sums[0];  // those that the other thread completes
      __syncthreads();
      const float4 mine = half == 0 ? sums[0] : sums[1], others = sums_smem[column][1 - half];
      next = {next.x + mine.x + others.x, next.y + mine.y + others.y, next.z + mine.z + others.z,
              next.w + mine.w + others.w};
    }
    state = next;
  }
}

}  // namespace flashinfer
