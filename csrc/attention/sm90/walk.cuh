// SPDX-License-Identifier: Apache-2.0
// The loop of prefill on Hopper: S = Q Kᵀ, softmax, O += P V for the 64 rows of a consumer, tile after tile of KV.
//
// Tensor cores and exponentials take about as long, and are to run at the same time: of 16 bits, consumers have
// registers for their own products of one tile and the softmax of the next, and where there are several they take turns
// at the tensor cores. Of 8 bits three overlap with each other.
//
// A tile that all rows see whole is first tried by the maximum of the tiles before (Softmax::exponentiate_by_last_max).
// If its scores turn out to be far above, it is done again with care. Most never are.
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
    return {params,
            smem,
            work,
            smem.gap_of(unit_turn).numbers_of(visibility_of<Config>(params, work.item.request_idx)
                                                  .tiles_seen_whole(position_of_row(smem, work, first_row),
                                                                    position_of_row(smem, work, last_row),
                                                                    work.item.kv_len, Shape::kBlockN)),
            depth_major_operand(common_address(smem.q_of(unit_turn, consumer_idx()))),
            Score<Config>::scale_log2(params),
            out,
            softmax,
            unit_turn};
  }

  // Of the request's.
  __device__ __forceinline__ static int32_t position_of_row(const Smem<Config>& smem, const Work& work, int row) {
    return position_of(int32_t(smem.group_size.divide(row)), work.item.qo_len, work.item.kv_len);
  }

  // Where the keys of a tile are; looked up where it is needed, which takes no register.
  __device__ __forceinline__ int key_tile(int tile) const { return smem.gap_of(unit_turn).key_tile(tile); }

  // From the last tile to the first; kv_turn counts on.
  __device__ __forceinline__ void run(uint32_t& kv_turn) {
    const auto visibility = visibility_of<Config>(params, work.item.request_idx);
    const uint32_t first_turn = kv_turn, turn_plus_tile = kv_turn + work.item.tile_end - 1;
    if constexpr (Shape::kNumConsumers > 1 && !kHasHoles) {
      pass_unseen(kv_turn);
      if (int32_t(turn_plus_tile - kv_turn) < work.item.tile_begin) return;
    }
    Probabilities p = {};
    bool is_again = false;  // the tile at hand, whose scores are too far above the maximum of those before
    const auto walk_down_to = [&](int end_tile, auto needs_mask) {
      const uint32_t end_turn = turn_plus_tile + 1 - max(end_tile, work.item.tile_begin);
#pragma unroll 1
      for (; int32_t(end_turn - kv_turn) > 0; ++kv_turn) {
        const bool is_first = kHasHoles && kv_turn == first_turn;
        is_again = !step(p, kv_turn, int(turn_plus_tile - kv_turn), needs_mask, is_first);
        if (is_again) break;
      }
    };
    if constexpr (Smem<Config>::kProvesTiles) {
      static_assert(kHasHoles && !Shape::kTrustsLastMax, "no tile is done again here, nor begun beside no products");
#pragma unroll 1
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; ++kv_turn) {
        const bool is_first = kv_turn == first_turn;
        const bool is_whole = visibility.contains(smem.proofs.range[unit_turn % kNumWorkSlots], key_tile(tile));
        const bool asks_function = !smem.shows_all(unit_turn, tile);
        if (asks_function || !is_whole) {
          step(p, kv_turn, tile, Constant<true>{}, is_first, asks_function);
        } else {
          step(p, kv_turn, tile, Constant<false>{}, is_first);
        }
        tile = smem.tile_below(unit_turn, tile);
      }
    } else if (visibility.has_holes()) {
      walk_down_to(0, Constant<true>{});
    } else {
      Range clean = whole;
#pragma unroll 1
      do {
        if constexpr (Shape::kOverlaps) begin_overlapped(p, kv_turn, int(turn_plus_tile - kv_turn)), ++kv_turn;
        is_again = false;  // there may be no tile left
        // The tiles at the begin of a window take the same loop as those at the end: twice the code, twice the compile.
#pragma unroll 1
        for (;; clean = {0, 0}) {
          walk_down_to(clean.end, Constant<true>{});
          walk_down_to(clean.begin, Constant<false>{});
          if (is_again || !visibility.has_begin() || clean.end == 0) break;
        }
      } while (is_again);
    }
    if constexpr (Shape::kOverlaps) end_overlapped(p, kv_turn - 1);
  }

  // Tiles at the end of the unit, which come first, that its other consumers have rows for: this one lets them pass,
  // and takes as many turns as the others.
  __device__ __forceinline__ void pass_unseen(uint32_t& kv_turn) const {
    const int end = max(end_of_seen(), work.item.tile_begin);
#pragma unroll 1
    for (int tile = work.item.tile_end - 1; tile >= end; --tile, ++kv_turn) {
      smem.k_full.wait_full(kv_turn);
      release_keys(kv_turn, tile);
      if (tile > work.item.tile_begin) Turns::await(), Turns::pass_on();
      smem.v_full.wait_full(kv_turn);
      if (elect_lane()) smem.v_empty.at(kv_turn).arrive();
    }
  }
  // Of the tiles that the rows of this consumer see.
  __device__ __forceinline__ int end_of_seen() const {
    const PrefillItem& item = work.item;
    const int first_row = item.q_tile * Shape::kBlockM + consumer_idx() * Shape::kRowsPerConsumer;
    const int end_row = min(first_row + Shape::kRowsPerConsumer, int(item.qo_len * smem.group_size.divisor));
    if (first_row >= end_row) return 0;
    if constexpr (Smem<Config>::kHasGap) return item.tile_end;
    return visibility_of<Config>(params, item.request_idx)
        .tiles_seen(position_of_row(smem, work, first_row), position_of_row(smem, work, end_row - 1), item.kv_len,
                    Shape::kBlockN)
        .end;
  }

  // False if the tile is to be done again.
  __device__ __forceinline__ bool step(Probabilities& p, uint32_t turn, int tile, auto needs_mask, bool is_first,
                                       bool asks_function = true) {
    if constexpr (Shape::kOverlaps) {
      return step_overlapped(p, turn, tile, needs_mask, is_first, asks_function);
    } else {
      step_of_8_bits(p, turn, tile, needs_mask, asks_function);
      return true;
    }
  }

  // Sums of 8-bit products keep too few bits for those of all tiles: each tile has its own, of 64 columns at a time for
  // want of registers, and O = O rescale + P V is done in fp32.
  __device__ __forceinline__ void step_of_8_bits(Probabilities& p, uint32_t turn, int tile, auto needs_mask,
                                                 bool asks_function) {
    Scores scores;
    smem.await(smem.k_full, turn);
    start_scores(scores, turn);
    wait_for_scores<0>(scores);
    release_keys(turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), needs_mask, asks_function);
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

  // The tile's scores beside the products of the one before, whose probabilities p are; of the first, p is zero. False
  // if the tile is to be done again: its scores are too far above the maximum so far. That takes no other turn at the
  // tensor cores, since all consumers take as many.
  __device__ __forceinline__ bool step_overlapped(Probabilities& p, uint32_t turn, int tile, auto needs_mask,
                                                  bool is_first, bool asks_function) {
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
    wait_for_scores<1>(scores);
    if constexpr (Shape::kTrustsLastMax && !needs_mask) {
      float tile_sum[2];
      softmax.exponentiate_by_last_max(scores, scale_log2, tile_sum);
      pin(scores);  // not until all of it is done
      const bool holds = softmax.holds(tile_sum);
      release_keys_if(holds, turn, tile);
      wait_for_output(values_turn);
      if (!holds) return false;
      softmax.add(tile_sum);
      softmax.pack(scores, p);
      return true;
    }
    release_keys(turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), needs_mask, asks_function);
    const bool is_raised = softmax.raise_max(scores, scale_log2, rescale);
    softmax.exponentiate(scores, scale_log2);
    pin(scores);  // not until all of it is done
    wait_for_output(values_turn, !is_first);
    softmax.pack(scores, p);
    if (is_raised) softmax.rescale_output(out, rescale);
    return true;
  }
  // The first tile, or one that is done again: beside no other products, and without a turn.
  __device__ __forceinline__ void begin_overlapped(Probabilities& p, uint32_t turn, int tile) {
    Scores scores;
    smem.await(smem.k_full, turn);
    start_scores(scores, turn);
    wait_for_scores<0>(scores);
    release_keys(turn, tile);
    float rescale[2];
    transform_and_mask<Config>(scores, params, work, smem.group_size, key_tile(tile), Constant<true>{});
    softmax.raise_max(scores, scale_log2, rescale);
    if (Shape::kTrustsLastMax && tile != work.item.tile_end - 1) softmax.rescale_output(out, rescale);
    softmax.exponentiate(scores, scale_log2);
    softmax.pack(scores, p);
  }
  __device__ __forceinline__ void end_overlapped(Probabilities& p, uint32_t turn) {
    smem.await(smem.v_full, turn);
    start_output(p, turn);
    wait_for_output(turn);
  }

  // An address that all lanes are known to have in common. wgmma takes its operands from registers that a warp shares;
  // made from such an address they are computed there, and not moved one by one. Of 8 bits there is no register for it.
  __device__ __forceinline__ static uint32_t common_address(const uint8_t* tile_smem) {
    const uint32_t address = smem_address(tile_smem);
    if constexpr (Shape::kTransposesValues) return address;
    return __shfl_sync(0xffffffffu, address, 0);
  }

  // S = Q Kᵀ.
  __device__ __forceinline__ void start_scores(Scores& scores, uint32_t turn) const {
    Operand q = this->q;
    asm volatile("" : "+r"(q.low));  // else the operands of all steps would stay in registers, tile after tile
    // Likewise common to all lanes, which the compiler does not see in a loop that may end early.
    if constexpr (Shape::kTrustsLastMax) q.low = __shfl_sync(0xffffffffu, q.low, 0);
    const Operand k = depth_major_operand(common_address(smem.k[turn % Shape::kNumStages]));
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
  __device__ __forceinline__ static void wait_for_scores(Scores& scores) {
    wgmma_wait<kNumPending>();
    pin(scores);
  }
  __device__ __forceinline__ void release_keys(uint32_t turn, int tile) const {
    if (elect_lane()) smem.k_empty.at(turn).arrive();
    if constexpr (Shape::kReleasesQueriesEarly) {
      smem.q_empty[consumer_idx()].at(0).arrive_if(elect_lane() && tile == work.item.tile_begin);
    }
  }

  // Without a branch, for between the start of products and the wait for them.
  __device__ __forceinline__ void release_keys_if(bool is_done, uint32_t turn, int tile) const {
    const bool arrives = elect_lane() && is_done;
    smem.k_empty.at(turn).arrive_if(arrives);
    if constexpr (Shape::kReleasesQueriesEarly)
      smem.q_empty[consumer_idx()].at(0).arrive_if(arrives && tile == work.item.tile_begin);
  }

  // O += P V.
  __device__ __forceinline__ void start_output(Probabilities& p, uint32_t turn) const {
    const Operand v = column_major_operand(common_address(smem.v[turn % Shape::kNumStages]), Shape::kBlockN);
    pin(out);
    pin(p);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kBlockN / 16; ++step) {
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
