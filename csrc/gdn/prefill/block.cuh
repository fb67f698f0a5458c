// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule, its second kernel: what the warps of a block share.
#pragma once

#include "device/named_barrier.cuh"
#include "device/vec.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

// Warps of a block, in this order: one for every 16 columns of the state, and those that bring in the chunks. These are
// four that write the output as well, of 16 tokens each, or one where states are all that is wanted.
template <class Config>
struct GdnShape {
  static constexpr int kBlockV = Config::kBlockV, kNumStages = Config::kNumStages;
  static constexpr bool kHasOutput = Config::kHasOutput;
  static constexpr int kNumSlices = (kHasOutput ? 1 : 2) * kGdnDim / kBlockV;  // of a head: GdnUnit
  static constexpr int kStateWarps = kBlockV / 16, kStateThreads = kStateWarps * 32;
  static constexpr int kFeedThreads = kHasOutput ? 128 : 32, kNumThreads = kStateThreads + kFeedThreads;
  static constexpr int kThreadsPerKey = kFeedThreads / 8;
  static constexpr int kThreadsPerValue = kBlockV < kFeedThreads ? kBlockV / 8 : kFeedThreads / 8;
  using ValueRows = SwizzledRows<kBlockV * 2>;
};

template <class Config>
struct GdnStages {
  using Shape = GdnShape<Config>;
  struct Stage {
    alignas(128) uint8_t k[kGdnChunk * kGdnDim * 2];
    alignas(128) uint8_t v[kGdnChunk * Shape::kBlockV * 2];
    GdnChunk chunk;
  };
  Stage stages[Shape::kNumStages];
};
template <class Config, bool kHasOutput = Config::kHasOutput>
struct GdnSmem : GdnStages<Config> {};
template <class Config>
struct GdnSmem<Config, true> : GdnStages<Config> {
  // Fragments of the state at the start of a chunk, and of its U, as columns of B.
  struct HandedOver {
    uint4 state[kGdnDimBlocks][32];
    uint4 u[kGdnBlocks][32];
  };
  alignas(128) uint8_t q[kGdnChunk * kGdnDim * 2];
  HandedOver handed_over[2][GdnShape<Config>::kStateWarps];
};

// Two of each, for chunks in turns. Without an output there are the first two.
enum class GdnBarrier : int {
  kLoaded = 1,  // the chunk is in its stage                                 feed -> state
  kState = 3,   // handed over; and the state has left the chunk before      state -> feed
  kU = 5,       // handed over                                               state -> output
  kTaken = 7,   // what was handed over                                      output -> state
  kOutput = 9,  // one alone, among the warps that write the output
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
    named_barrier_sync(int(GdnBarrier::kOutput), Shape::kFeedThreads);
  }
};

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

// A block's work: the tokens of a sequence, or of a segment of one, for one head and kBlockV columns of its state.
//
// Without an output it is what a segment does to any state before it (GdnSegment). The state is a recurrence of each of
// its columns, as [V, K] of each row, and linear: from zero it yields what the segment adds, and from the rows of the
// identity, where values are zero, the transition. Of the first segment the state before it is known, and of the last
// nobody asks.
struct GdnUnit {
  int32_t seq_idx, head, first_v;
  GdnSequence tokens;
  int32_t num_chunks;
  GdnSegment* segment;  // or null: a whole sequence
  bool is_first, is_last, is_transition;

  // Whether there is one for this block.
  template <class Config>
  __device__ __forceinline__ bool find(const GdnPrefillParams& params, int block_idx) {
    using Shape = GdnShape<Config>;
    const int slot_head = block_idx / Shape::kNumSlices, slot = slot_head / params.num_heads;
    head = slot_head % params.num_heads;
    first_v = block_idx % Shape::kNumSlices * Shape::kBlockV;
    is_transition = first_v >= kGdnDim;
    first_v %= kGdnDim;
    if (params.segment_tokens == 0) {
      seq_idx = slot;
      tokens = GdnSequence::of(params, slot);
      segment = nullptr;
      is_first = is_last = true;
    } else {
      GdnPiece piece;
      if (!piece.find(params, slot, params.segment_tokens)) return false;
      seq_idx = piece.seq_idx;
      tokens = piece.tokens;
      segment = static_cast<GdnSegment*>(params.segments) + slot_head;
      is_first = piece.num_before == 0, is_last = piece.is_last;
    }
    num_chunks = ceil_div(tokens.end - tokens.begin, kGdnChunk);
    return Shape::kHasOutput || !(is_last || (is_transition && is_first));
  }

  // Calls `load` with a function that yields two neighbours in a row of the state before the tokens, as [V, K] from row
  // first_v on.
  template <class Config, class Load>
  __device__ __forceinline__ void load_state(const GdnPrefillParams& params, const Load& load) const {
    if constexpr (Config::kHasOutput) {
      using State = typename Config::State;
      if (segment != nullptr) {
        load_from<float>(segment->state, load);
      } else {
        load_from<State>(initial_state_of<State>(params, seq_idx, head), load);
      }
    } else {
      const bool is_known = is_first && !is_transition;
      if (is_known && params.has_bf16_states) {
        load_from<bf16>(initial_state_of<bf16>(params, seq_idx, head), load);
      } else {
        load_from<float>(is_known ? initial_state_of<float>(params, seq_idx, head) : nullptr, load);
      }
    }
  }

  // Calls `store` with a function that takes such a pair of the state behind the tokens, if anybody wants it.
  template <class Config, class Store>
  __device__ __forceinline__ void store_state(const GdnPrefillParams& params, const Store& store) const {
    if constexpr (Config::kHasOutput) {
      using State = typename Config::State;
      State* final_state = is_last ? final_state_of<State>(params, seq_idx, head) : nullptr;
      if (final_state != nullptr) store_to<State>(final_state, store);
    } else {
      store_to<float>(is_transition ? segment->transition : segment->state, store);
    }
  }

 private:
  template <class From, class Load>
  __device__ __forceinline__ void load_from(const From* src, const Load& load) const {
    load([&](int row, int column) -> float2 {
      row += first_v;
      if (src == nullptr) {
        return {is_transition && row == column ? 1.f : 0.f, is_transition && row == column + 1 ? 1.f : 0.f};
      }
      const auto pair = Vec<From, 2>::load(src + row * kGdnDim + column);
      return {to_float(pair[0]), to_float(pair[1])};
    });
  }
  template <class To, class Store>
  __device__ __forceinline__ void store_to(To* dst, const Store& store) const {
    store([&](int row, int column, float x, float y) {
      Vec<To, 2> pair;
      pair[0] = from_float<To>(x), pair[1] = from_float<To>(y);
      pair.store(dst + (first_v + row) * kGdnDim + column);
    });
  }
};

// What the first kernel left of a unit's chunks. That of a segment begins with one.
__device__ __forceinline__ const GdnChunk* chunks_of(const GdnPrefillParams& params, const GdnUnit& unit) {
  const int64_t first_slot = GdnPiece::first_slot(unit.tokens, unit.seq_idx, kGdnChunk);
  return static_cast<const GdnChunk*>(params.chunks) + first_slot * params.num_heads + unit.head;
}

// Keys, values and what is known of the chunks, into the stages, one chunk after the other.
template <class Config>
struct GdnFeed {
  using Shape = GdnShape<Config>;
  using Stage = typename GdnStages<Config>::Stage;
  using T = typename Config::T;
  GdnRowStream<T, GdnRows, kGdnChunk, Shape::kFeedThreads, Shape::kThreadsPerKey> keys;
  GdnRowStream<T, typename Shape::ValueRows, kGdnChunk, Shape::kFeedThreads, Shape::kThreadsPerValue> values;
  const GdnChunk* chunks;
  const GdnPrefillParams& params;
  const bool has_values;
  const int thread_idx;

  __device__ __forceinline__ GdnFeed(const GdnPrefillParams& params, const GdnUnit& unit, int thread_idx)
      : keys(params.k, params.k_strides, unit.head / params.heads_per_k, 0, unit.tokens, 0, thread_idx),
        values(params.v, params.v_strides, unit.head / params.heads_per_v, unit.first_v, unit.tokens, 0, thread_idx),
        chunks(chunks_of(params, unit)),
        params(params),
        has_values(Shape::kHasOutput || !unit.is_transition),
        thread_idx(thread_idx) {}

  __device__ __forceinline__ void load_async(Stage& stage) {
    keys.load_async(smem_address(stage.k));
    if (has_values) values.load_async(smem_address(stage.v));
    load_chunk_async<Shape::kFeedThreads>(stage.chunk, chunks, thread_idx);
    chunks += params.num_heads;
  }
};

// The warp that brings in chunks where there is no output.
template <class Config>
__device__ __forceinline__ void feed_state(const GdnPrefillParams& params, GdnSmem<Config>& smem, const GdnUnit& unit,
                                           int lane_idx) {
  using Shape = GdnShape<Config>;
  using Barriers = GdnBarriers<Config>;
  constexpr int kNumAhead = Shape::kNumStages - 1;
  GdnFeed<Config> feed(params, unit, lane_idx);
  if (!feed.has_values) {
    for (auto& stage : smem.stages) {
      for (int i = lane_idx; i < int(sizeof(stage.v) / 16); i += 32) reinterpret_cast<uint4*>(stage.v)[i] = uint4{};
    }
  }
  const auto load_async = [&](int chunk) {
    if (chunk < unit.num_chunks) feed.load_async(smem.stages[chunk % Shape::kNumStages]);
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kNumAhead; ++i) load_async(i);
#pragma unroll 1
  for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
    cp_async_wait<kNumAhead - 1>();
    Barriers::arrive(GdnBarrier::kLoaded, chunk);
    Barriers::sync(GdnBarrier::kState, chunk);
    load_async(chunk + kNumAhead);  // in place of the last chunk
  }
  cp_async_wait_all();
}

}  // namespace flashinfer
