// Prefill of the gated delta rule, of sequences that are split: the states at the borders of segments, one after the
// other, from what gdn_prefill_segments left of each (GdnSegment).
//
//   S_{i+1} = S_i transition_i + state_i        state_i <- S_i
//
// In fp32, for the sake of what is never forgotten. A thread has a column of kRows rows of the state, and of the
// transition the same column: that comes from the L2 cache, and the registers that a product frees take the next one.
#pragma once

#include "device/cast.cuh"
#include "device/pdl.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

// Config: State, kRows. Grid: sequences times heads times 128 / kRows; 128 threads.
template <class Config>
__device__ void gdn_prefill_scan(const GdnPrefillParams& params) {
  using State = typename Config::State;
  constexpr int kRows = Config::kRows, kSlices = kGdnDim / kRows;
  static_assert(Config::kNumThreads == kGdnDim && kRows % 4 == 0);
  __shared__ float4 rows_smem[2][kGdnDim][kRows / 4];
  wait_for_previous_kernel();
  allow_next_kernel();

  const int seq_head = int(blockIdx.x) / kSlices, first_row = int(blockIdx.x) % kSlices * kRows;
  const int seq_idx = seq_head / params.num_heads, head = seq_head % params.num_heads, column = threadIdx.x;
  const GdnSequence tokens = GdnSequence::of(params, seq_idx);
  const int num_segments = GdnPiece::count(tokens, params.segment_tokens);
  const int64_t first_slot = GdnPiece::first_slot(tokens, seq_idx, params.segment_tokens);
  GdnSegment* segment = static_cast<GdnSegment*>(params.segments) + first_slot * params.num_heads + head;

  float state[kRows];
  const State* initial = initial_state_of<State>(params, seq_idx, head);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    state[i] = initial == nullptr ? 0.f : to_float(initial[(first_row + i) * kGdnDim + column]);
  }
  float transition[kGdnDim];
  const auto load_transition = [&](const GdnSegment* of, int i) {
    transition[i] = of->transition[i * kGdnDim + column];
  };
  if (num_segments > 2) {
#pragma unroll
    for (int i = 0; i < kGdnDim; ++i) load_transition(segment + params.num_heads, i);
  }
#pragma unroll 1
  for (int i = 0; i < num_segments; ++i) {
    float added[kRows];
    float* of_segment = segment->state + first_row * kGdnDim + column;
    if (i + 1 < num_segments) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) added[row] = of_segment[row * kGdnDim];
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) of_segment[row * kGdnDim] = state[row];
    if (i + 1 == num_segments) return;
    segment += params.num_heads;
    if (i > 0) {
      float4(&rows)[kGdnDim][kRows / 4] = rows_smem[i % 2];
#pragma unroll
      for (int j = 0; j < kRows / 4; ++j) {
        rows[column][j] = {state[4 * j], state[4 * j + 1], state[4 * j + 2], state[4 * j + 3]};
      }
      __syncthreads();
      const bool has_next = i + 2 < num_segments;  // the transition of the last segment is nobody's
#pragma unroll
      for (int j = 0; j < kGdnDim; ++j) {
#pragma unroll
        for (int part = 0; part < kRows / 4; ++part) {
          const float4 x = rows[j][part];
          added[4 * part] += x.x * transition[j], added[4 * part + 1] += x.y * transition[j];
          added[4 * part + 2] += x.z * transition[j], added[4 * part + 3] += x.w * transition[j];
        }
        if (has_next) load_transition(segment, j);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) state[row] = added[row];
  }
}

}  // namespace flashinfer
