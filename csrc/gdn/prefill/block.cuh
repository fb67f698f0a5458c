// Prefill of the gated delta rule, its second kernel: what the warps of a block share.
#pragma once

#include "device/named_barrier.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

// Warps of a block, in this order: one for every 16 columns of the state, and four that bring in the chunks and write
// the output, of 16 tokens each.
template <class Config>
struct GdnShape {
  static constexpr int kBlockV = Config::kBlockV, kNumStages = Config::kNumStages, kNumSlices = kGdnDim / kBlockV;
  static constexpr int kStateWarps = kBlockV / 16, kStateThreads = kStateWarps * 32, kOutputThreads = 128;
  static constexpr int kNumThreads = kStateThreads + kOutputThreads;
  using ValueRows = SwizzledRows<kBlockV * 2>;
};

template <class Config>
struct GdnSmem {
  using Shape = GdnShape<Config>;
  struct Stage {
    alignas(128) uint8_t k[kGdnChunk * kGdnDim * 2];
    alignas(128) uint8_t v[kGdnChunk * Shape::kBlockV * 2];
    GdnChunk chunk;
  };
  // Fragments of the state at the start of a chunk, and of its U, as columns of B.
  struct HandedOver {
    uint4 state[kGdnDimBlocks][32];
    uint4 u[kGdnBlocks][32];
  };
  Stage stages[Shape::kNumStages];
  alignas(128) uint8_t q[kGdnChunk * kGdnDim * 2];
  HandedOver handed_over[2][Shape::kStateWarps];
};

// Two of each, for chunks in turns.
enum class GdnBarrier : int {
  kLoaded = 1,       // the chunk is in its stage                                 output -> state
  kState = 3,        // handed over; and the state has left the chunk before      state -> output
  kU = 5,            // handed over                                               state -> output
  kTaken = 7,        // what was handed over                                      output -> state
  kOutput = 9,       // one alone, among the warps that write the output
  kStateWarps = 10,  // and among those that have the state
};

template <class Config>
struct GdnBarriers {
  using Shape = GdnShape<Config>;

  __device__ __forceinline__ static void sync(GdnBarrier barrier, int chunk) {
    named_barrier_sync(int(barrier) + (chunk & 1), Shape::kNumThreads);
  }
  __device__ __forceinline__ static void arrive(GdnBarrier barrier, int chunk) {
    named_barrier_arrive(int(barrier) + (chunk & 1), Shape::kNumThreads);
  }
  __device__ __forceinline__ static void sync_output() {
    named_barrier_sync(int(GdnBarrier::kOutput), Shape::kOutputThreads);
  }
  __device__ __forceinline__ static void sync_state() {
    named_barrier_sync(int(GdnBarrier::kStateWarps), Shape::kStateThreads);
  }
};

// The chunks of a sequence's head, in what the first kernel left.
__device__ __forceinline__ const GdnChunk* chunks_of(const GdnPrefillParams& params, const GdnSequence& tokens,
                                                     int32_t seq_idx, int32_t head) {
  return static_cast<const GdnChunk*>(params.chunks) + first_chunk_slot(tokens.begin, seq_idx) * params.num_heads +
         head;
}

template <int kNumThreads>
__device__ __forceinline__ void load_chunk_async(GdnChunk& dst, const GdnChunk* src, int thread_idx) {
  constexpr int kNumGranules = sizeof(GdnChunk) / 16;
  const uint32_t dst_smem = smem_address(&dst) + thread_idx * 16;
  const uint8_t* src_gmem = reinterpret_cast<const uint8_t*>(src) + thread_idx * 16;
#pragma unroll
  for (int i = 0; i < ceil_div(kNumGranules, kNumThreads); ++i) {
    if ((i + 1) * kNumThreads <= kNumGranules || i * kNumThreads + thread_idx < kNumGranules) {
      cp_async_16(dst_smem + i * kNumThreads * 16, src_gmem + i * kNumThreads * 16, true);
    }
  }
}

// A block's work: the tokens of a sequence, for one head and kBlockV columns of its state.
struct GdnUnit {
  int32_t seq_idx, head, first_v;
  GdnSequence tokens;
  int32_t num_chunks;

  template <class Config>
  __device__ __forceinline__ static GdnUnit of(const GdnPrefillParams& params, int block_idx) {
    using Shape = GdnShape<Config>;
    const int seq_head = block_idx / Shape::kNumSlices;
    GdnUnit unit;
    unit.first_v = block_idx % Shape::kNumSlices * Shape::kBlockV;
    unit.seq_idx = seq_head / params.num_heads;
    unit.head = seq_head % params.num_heads;
    unit.tokens = GdnSequence::of(params, unit.seq_idx);
    unit.num_chunks = ceil_div(unit.tokens.end - unit.tokens.begin, kGdnChunk);
    return unit;
  }
};

}  // namespace flashinfer
