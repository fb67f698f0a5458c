// SPDX-License-Identifier: Apache-2.0
// The loop of prefill on Hopper: S = Q Kᵀ, softmax, O += P V for the 64 rows of a consumer, tile after tile of KV.
//
// Tensor cores and exponentials take about as long, and are to run at the same time. Two consumers, or one, have
// registers for their own products of one tile and the softmax of the next; two take turns at the tensor cores. Three
// have not; while one is at its softmax, the others have theirs multiplied, and the products of half a tile's values
// run during the exponentials of the other half. For their scores they take turns as well.
//
// No branch may lie between the start of products and the wait for them: the compiler would wait at the branch.
#pragma once

#include "attention/sm90/softmax.cuh"

namespace flashinfer::sm90 {

// While one consumer has the tensor cores, the others are at their softmax.
template <class Shape>
struct TurnsAtTensorCores {
  __device__ __forceinline__ static void await() {
    if constexpr (Shape::kTakesTurns) named_barrier_sync(kTurnOfConsumer + consumer_idx(), 2 * kWarpgroupSize);
  }
  __device__ __forceinline__ static void pass_on() {
    if constexpr (Shape::kTakesTurns) {
      const int idx = consumer_idx(), next_idx = idx == Shape::kNumConsumers - 1 ? 0 : idx + 1;
      named_barrier_arrive(kTurnOfConsumer + next_idx, 2 * kWarpgroupSize);
    }
  }
  // The first turn is the first consumer's; the last one is handed back to it.
  __device__ __forceinline__ static void open() {
    if (consumer_idx() == Shape::kNumConsumers - 1) pass_on();
  }
  __device__ __forceinline__ static void close() {
    if (consumer_idx() == 0) await();
  }
};

template <class Config>
struct TileWalk {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  using Turns = TurnsAtTensorCores<Shape>;
  using Scores = float[Shape::kNumScores];
  using Output = float[Shape::kNumOutputs];
  using Probabilities = uint32_t[Shape::kNumProbabilityRegisters];

  static constexpr int kColumnsAtOnce = 64;
  // Masks of bits take so much code that there is one copy of it: the first tile is a step like the others, beside the
  // products of its own values with zeros. Where a function proves tiles, a step without it is for those seen whole.
  static constexpr bool kHasHoles =
      VisibilityBy<typename Config::Function>{Config::kMask, Config::kHasWindow, 0}.has_holes();
  const Sm90PrefillParams& params;
  Smem<Config>& smem;
  const Work& work;
  Range whole;  // tiles that all of the rows see whole; the others need masking
  Operand q;
  float scale_log2;
  Output& out;  // yet to be normalized
  Softmax<Config>& softmax;
  uint32_t unit_turn;

  __device__ __forceinline__ static TileWalk of(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work,
                                                uint32_t unit_turn, Output& out, Softmax<Config>& softmax) {
    const int first_row = work.item.q_tile * Shape::kBlockM + consumer_idx() * Shape::kRowsPerConsumer;
    const int last_row = first_row + Shape::kRowsPerConsumer - 1;
    const auto position_of_row = [&](int row) {
      return position_of(int32_t(smem.group_size.divide(row)), work.item.qo_len, work.item.kv_len);
    };
    return {
        params,
        smem,
        work,
        smem.gap_of(unit_turn).numbers_of(visibility_of<Config>(params, work.item.request_idx)
                                              .tiles_seen_whole(position_of_row(first_row), position_of_row(last_row),
                                                                work.item.kv_len, Shape::kBlockN)),
        depth_major_operand(common_address(smem.q_of(unit_turn, consumer_idx()))),
        Score<Config>::scale_log2(params),
        out,
        softmax,
        unit_turn};
  }

  // Where the keys of a tile are; looked up where it is needed, which takes no register.
  __device__ __forceinline__ int key_tile(int tile) const { return smem.gap_of(unit_turn).key_tile(tile); }

  // From the last tile to the first; kv_turn counts on.
  __device__ __forceinline__ void run(uint32_t& kv_turn) {
    const auto visibility = visibility_of<Config>(params, work.item.request_idx);
    const uint32_t first_turn = kv_turn, turn_plus_tile = kv_turn + work.item.tile_end - 1;
    Probabilities p = {};
    const auto walk_down_to = [&](int end_tile, auto needs_mask) {
      const uint32_t end_turn = turn_plus_tile + 1 - max(end_tile, work.item.tile_begin);
#pragma unroll 1
      for (; int32_t(end_turn - kv_turn) > 0; ++kv_turn) {
        const bool is_first = kHasHoles && kv_turn == first_turn;
        step_of_shape(p, kv_turn, int(turn_plus_tile - kv_turn), needs_mask, is_first);
      }
    };
    if constexpr (Shape::kOverlaps && !kHasHoles) {
      begin_overlapped(p, kv_turn, work.item.tile_end - 1);
      ++kv_turn;
    }
    if constexpr (Smem<Config>::kProvesTiles) {
#pragma unroll 1
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; ++kv_turn) {
        const bool is_first = kv_turn == first_turn;
        const bool is_whole = visibility.contains(smem.proofs.range[unit_turn % kNumWorkSlots], key_tile(tile));
        // Beside a score that is computed for each key, a step more would find no registers.
        if (!smem.shows_all(unit_turn, tile) || (!Score<Config>::kIsPlain && !is_whole)) {
          step_of_shape(p, kv_turn, tile, Constant<true>{}, is_first);
        } else if (!is_whole) {
          step_of_shape(p, kv_turn, tile, Constant<true, false>{}, is_first);
        } else {
          step_of_shape(p, kv_turn, tile, Constant<false>{}, is_first);
        }
        tile = smem.tile_below(unit_turn, tile);
      }
    } else if (visibility.has_holes()) {
      walk_down_to(0, Constant<true>{});
    } else {
      // The tiles at the begin of a window take the same loop as those at the end: twice the code, twice the compile.
#pragma unroll 1
      for (Range clean = whole;; clean = {0, 0}) {
        walk_down_to(clean.end, Constant<true>{});
        walk_down_to(clean.begin, Constant<false>{});
        if (!visibility.has_begin() || clean.end == 0) break;
      }
    }
    if constexpr (Shape::kOverlaps) end_overlapped(p, kv_turn - 1);
  }

  __device__ __forceinline__ void step_of_shape(Probabilities& p, uint32_t turn, int tile, auto needs_mask,
                                                bool is_first) {
    if constexpr (Shape::kTransposesValues) {
      step_of_8_bits(p, turn, tile, needs_mask);
    } else if constexpr (Shape::kOverlaps) {
      step_overlapped(p, turn, tile, needs_mask, is_first);
    } else {
      step(p, turn, tile, needs_mask);
    }
  }

  // The same of a unit in which the consumer has no row, as of a request to decode among prompts: tiles are given back
  // as they come, and the tensor cores left to the other consumer, which waits for as many turns as it takes.
  __device__ __forceinline__ static void pass_by(Smem<Config>& smem, const Work& work, uint32_t& kv_turn) {
    static_assert(!Config::kMixes || Shape::kNumConsumers <= 2, "there are no registers for a loop more");
    const uint32_t first_turn = kv_turn, end_turn = kv_turn + work.item.tile_end - work.item.tile_begin;
#pragma unroll 1
    for (; kv_turn != end_turn; ++kv_turn) {
      smem.k_full.wait_full(kv_turn);
      if (elect_lane()) smem.k_empty.at(kv_turn).arrive();
      if (kHasHoles || kv_turn != first_turn) {  // but for begin_overlapped()
        Turns::await();
        Turns::pass_on();
      }
      smem.v_full.wait_full(kv_turn);
      if (elect_lane()) smem.v_empty.at(kv_turn).arrive();
    }
  }

  __device__ __forceinline__ void step(Probabilities& p, uint32_t turn, int tile, auto needs_mask) {
    Scores scores;
    smem.await(smem.k_full, turn);
    Turns::await();
    start_scores(scores, turn);
    Turns::pass_on();
    wait_for_scores<0>(scores, turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), needs_mask);
    if (softmax.raise_max(scores, scale_log2, rescale)) softmax.rescale_output(out, rescale);
    smem.await(smem.v_full, turn);
    softmax.template exponentiate<0, 2>(scores, scale_log2);
    softmax.template pack<0, 2>(scores, p);
    start_output<0, 2>(p, turn);
    pin(scores);
    softmax.template exponentiate<1, 2>(scores, scale_log2);
    softmax.template pack<1, 2>(scores, p);
    pin(p);
    start_output<1, 2>(p, turn);
    wait_for_output(turn);
  }

  // Sums of 8-bit products keep too few bits for those of all tiles: each tile has its own, of 64 columns at a time for
  // want of registers, and O = O rescale + P V is done in fp32.
  __device__ __forceinline__ void step_of_8_bits(Probabilities& p, uint32_t turn, int tile, auto needs_mask) {
    Scores scores;
    smem.await(smem.k_full, turn);
    start_scores(scores, turn);
    wait_for_scores<0>(scores, turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), needs_mask);
    softmax.raise_max(scores, scale_log2, rescale);
    softmax.exponentiate(scores, scale_log2);
    softmax.pack(scores, p);
    smem.v_full.wait_full(turn);
    const Operand v = depth_major_operand(smem_address(smem.v[turn % Shape::kNumStages]));
    pin(p);
#pragma unroll
    for (int first = 0; first < Shape::kHeadDimVo; first += kColumnsAtOnce) {
      float products[kColumnsAtOnce / 2];
      pin(products);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Shape::kBlockN / Shape::kProductDepth; ++step) {
        const int bytes = (step / 4 * Shape::kHeadDimVo + first) * kPanelBytes + step % 4 * 32;
        Wgmma<T, kColumnsAtOnce>::multiply(products, p + 4 * step, v.advanced(bytes), step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(products);
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce / 2; ++i) {
        float& x = out[first / 2 + i];
        x = fmaf(x, rescale[i / 2 % 2], products[i]);
      }
    }
    if (elect_lane()) smem.v_empty.at(turn).arrive();
  }

  // The tile's scores beside the products of the one before, whose probabilities p are; of the first, p is zero.
  __device__ __forceinline__ void step_overlapped(Probabilities& p, uint32_t turn, int tile, auto needs_mask,
                                                  bool is_first) {
    Scores scores;
    const uint32_t values_turn = is_first ? turn : turn - 1;
    if constexpr (Shape::kReadsCopies) {  // the fence is not to prolong the turn
      smem.await(smem.k_full, turn, smem.v_full, values_turn);
    } else {
      smem.await(smem.k_full, turn);
    }
    Turns::await();
    pin(out);
    pin(p);
    start_scores(scores, turn);
    if constexpr (!Shape::kReadsCopies) smem.await(smem.v_full, values_turn);
    start_output(p, values_turn);
    Turns::pass_on();
    wait_for_scores<1>(scores, turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), needs_mask);
    const bool is_raised = softmax.raise_max(scores, scale_log2, rescale);
    softmax.exponentiate(scores, scale_log2);
    pin(scores);  // not until all of it is done
    wait_for_output(values_turn, !is_first);
    softmax.pack(scores, p);
    if (is_raised) softmax.rescale_output(out, rescale);
  }
  __device__ __forceinline__ void begin_overlapped(Probabilities& p, uint32_t turn, int tile) {
    Scores scores;
    smem.await(smem.k_full, turn);
    start_scores(scores, turn);
    wait_for_scores<0>(scores, turn, tile);
    float no_rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), Constant<true>{});
    softmax.raise_max(scores, scale_log2, no_rescale);
    softmax.exponentiate(scores, scale_log2);
    softmax.pack(scores, p);
  }
  __device__ __forceinline__ void end_overlapped(Probabilities& p, uint32_t turn) {
    smem.await(smem.v_full, turn);
    start_output(p, turn);
    wait_for_output(turn);
  }

  // An address that all lanes are known to have in common. wgmma takes its operands from registers that a warp shares;
  // made from such an address they are computed there, and not moved one by one. Three consumers have a register for
  // that of keys alone, and of 8 bits none.
  template <bool kHasRegister = Shape::kOverlaps>
  __device__ __forceinline__ static uint32_t common_address(const uint8_t* tile_smem) {
    const uint32_t address = smem_address(tile_smem);
    if constexpr (!kHasRegister) return address;
    return __shfl_sync(0xffffffffu, address, 0);
  }

  // S = Q Kᵀ.
  __device__ __forceinline__ void start_scores(Scores& scores, uint32_t turn) const {
    Operand q = this->q;
    asm volatile("" : "+r"(q.low));  // else the operands of all steps would stay in registers, tile after tile
    const Operand k = depth_major_operand(common_address<sizeof(T) == 2>(smem.k[turn % Shape::kNumStages]));
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kHeadDimQk / Shape::kProductDepth; ++step) {
      const int panel = step / 4, bytes = step % 4 * 32;
      Wgmma<T, Shape::kBlockN>::multiply(scores, q.advanced(panel * Shape::kRowsPerConsumer * kPanelBytes + bytes),
                                         k.advanced(panel * Shape::kBlockN * kPanelBytes + bytes), step > 0);
    }
    wgmma_commit();
  }
  template <int kNumPending>
  __device__ __forceinline__ void wait_for_scores(Scores& scores, uint32_t turn, int tile) const {
    wgmma_wait<kNumPending>();
    pin(scores);
    if (elect_lane()) smem.k_empty.at(turn).arrive();
    if constexpr (Shape::kReleasesQueriesEarly) {
      smem.q_empty.at(0).arrive_if(elect_lane() && tile == work.item.tile_begin);
    }
  }

  // O += P V of one of kNumParts parts of the tile's keys.
  template <int kPart = 0, int kNumParts = 1>
  __device__ __forceinline__ void start_output(Probabilities& p, uint32_t turn) const {
    constexpr int kNumSteps = Shape::kBlockN / 16 / kNumParts;
    static_assert(kNumSteps * kNumParts * 16 == Shape::kBlockN);
    const Operand v = column_major_operand(common_address(smem.v[turn % Shape::kNumStages]), Shape::kBlockN);
    if constexpr (kPart == 0) {
      pin(out);
      pin(p);
    }
    wgmma_fence();
#pragma unroll
    for (int step = kPart * kNumSteps; step < (kPart + 1) * kNumSteps; ++step) {
      Wgmma<T, Shape::kHeadDimVo>::multiply(out, p + 4 * step, v.advanced(step * 16 * kPanelBytes), true);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void wait_for_output(uint32_t turn, bool is_done = true) const {
    wgmma_wait<0>();
    pin(out);
    if (elect_lane() && is_done) smem.v_empty.at(turn).arrive();
  }
};

}  // namespace flashinfer::sm90
