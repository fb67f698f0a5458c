// SPDX-License-Identifier: Apache-2.0
// The loop of latent attention on Hopper, tile after tile of KV: a seesaw (FlashMLA, DeepSeek 2025) of two consumers.
//
// 64 rows of a 512-wide output fill the registers of two warpgroups, so each has half of the columns, and both need the
// probabilities of all keys. Each computes those of half a tile's keys and hands them over:
//
//   first consumer                              second consumer                             tensor cores
//   S0 = Q K0ᵀ                                                                              S0
//   m0 = max(m, S0);  P0 = 2^(S0 - m0)    →     S1 = Q K1ᵀ                                  S1
//   O0 = O0 2^(m - m0) + P0 V0                  O1 = O1 2^(m - m0) + P0 V0                  P0 V0
//                                         ←     m1 = max(m0, S1);  P1 = 2^(S1 - m1)
//   O0 = O0 2^(m0 - m1) + P1 V1                 O1 = O1 2^(m0 - m1) + P1 V1                 P1 V1
//
// K0 and K1 are the halves of the keys; O0 and O1 those of the columns, with the same columns of V. While one is at its
// softmax, the tensor cores have the other's products. A maximum may lag behind (attention/score.cuh), so it rarely
// changes. The order frees each half of the keys two products before its place is needed for those of the next tile.
//
// No branch may lie between the start of products and the wait for them: see attention/sm90/walk.cuh.
#pragma once

#include "attention/score.cuh"
#include "attention/sm90/mla/tile.cuh"
#include "device/fragment.cuh"
#include "device/mma.cuh"

namespace flashinfer::sm90::mla {

// Two of the 64 query rows, as far as one thread of a consumer has them.
template <class Config>
struct RowStates {
  float out[Shape<Config>::kNumOutputs] = {};       // of this consumer's columns, yet to be normalized
  float max[2] = {kMinusInfinity, kMinusInfinity};  // of the unscaled scores; lags behind
  float sum[2] = {0.f, 0.f};                        // of this consumer's keys; this lane's share until the end
};

struct ConsumerThread {
  __device__ __forceinline__ static int lane_idx() { return fresh_thread_idx() % 32; }
  __device__ __forceinline__ static int warp_row() { return fresh_thread_idx() % kWarpgroupSize / 32 * 16; }
  // Of the tile; one of this lane's two.
  __device__ __forceinline__ static int row(int half) { return warp_row() + lane_row(lane_idx()) + row_of(half); }
  // Of the four lanes that share a row.
  __device__ __forceinline__ static bool leads_row() { return lane_idx() % 4 == 0; }
};

template <class Config>
struct TileWalk : ConsumerThread {
  using Shape = mla::Shape<Config>;
  using T = typename Shape::T;
  using Scores = float[Shape::kNumScores];
  using Output = float[Shape::kNumOutputs];
  using Probabilities = uint32_t[Shape::kNumProbabilityRegisters];

  const Sm90MlaParams& params;
  Smem<Config>& smem;
  const Work& work;
  int consumer;
  float scale_log2;
  RowStates<Config>& rows;
  Output& out = rows.out;
  float (&max)[2] = rows.max, (&sum)[2] = rows.sum;

  // From the last tile to the first; kv_turn counts on. What both consumers do alike is there once: it takes long to
  // compile.
  __device__ __forceinline__ void run(uint32_t& kv_turn) {
#pragma unroll 1
    for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile, ++kv_turn) {
      Scores scores;
      if (consumer == 1) {  // then the tensor cores have time for these
        named_barrier_sync(kFirstHasScores, Shape::kNumConsumerThreads);
      }
      start_scores(scores, kv_turn);
      named_barrier_arrive_if(consumer == 0, kFirstHasScores, Shape::kNumConsumerThreads);
      wait_for_scores(scores);
      mask(scores, tile);
      if (consumer == 0) {
        go_on_first(scores, kv_turn);
      } else {
        go_on_second(scores, kv_turn);
      }
    }
  }

  __device__ __forceinline__ void go_on_first(Scores& scores, uint32_t turn) {
    float rescale[2];
    raise_max(scores, rescale);
    Probabilities p;
    exponentiate(scores, p);
    hand_over<0>(p, turn);
    rescale_output(rescale);
    start_output<0>(p, turn);
    wait_for_output<0>(0, turn);
    pin(p);
    take_over<0>(rescale);
    rescale_output(rescale);
    start_output_of_other<0>(turn);
    wait_for_output<0>(1, turn);
  }

  __device__ __forceinline__ void go_on_second(Scores& scores, uint32_t turn) {
    float rescale[2];
    take_over<1>(rescale);
    rescale_output(rescale);
    start_output_of_other<1>(turn);
    raise_max(scores, rescale);
    Probabilities p;
    exponentiate(scores, p);
    hand_over<1>(p, turn);
    wait_for_output<1>(0, turn);
    rescale_output(rescale);
    start_output<1>(p, turn);
    wait_for_output<1>(1, turn);
    pin(p);
  }

  // S = Q Kᵀ of this consumer's keys, in the order in which their parts come in.
  __device__ __forceinline__ void start_scores(Scores& scores, uint32_t turn) const {
    uint32_t q_smem = smem_address(smem.q);
    asm volatile("" : "+r"(q_smem));  // else the operands of all steps would stay in registers, tile after tile
    const Operand q = depth_major_operand(q_smem), k = depth_major_operand(smem_address(panels_of(consumer, turn)));
    const auto multiply = [&](int part, int first, int num, bool accumulate) {
      if constexpr (Shape::kGathers) {
        smem.await(smem.kv_full[consumer][part], turn);
      } else {
        smem.kv_full[consumer][part].wait_full(turn);
      }
      wgmma_fence();  // after every loop that waits: else ptxas adds it, and says so
#pragma unroll
      for (int panel = first; panel < first + num; ++panel) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const int bytes = panel * Shape::kPanelSize + step * 32;
          Wgmma<T, Shape::kNumKeys>::multiply(scores, q.advanced(bytes), k.advanced(bytes),
                                              accumulate || panel > first || step > 0);
        }
      }
    };
    pin(scores);
    multiply(0, 0, Shape::kPanelsOfHalf, false);
    multiply(1, Shape::kPanelsOfHalf, Shape::kPanelsOfHalf, true);
    if constexpr (Shape::kPePanels > 0) multiply(kPositional, Shape::kCkvPanels, 1, true);
    wgmma_commit();
  }
  __device__ __forceinline__ static void wait_for_scores(Scores& scores) {
    wgmma_wait<0>();
    pin(scores);
  }

  // O += P V of this consumer's columns, of its own keys.
  template <int kConsumer>
  __device__ __forceinline__ void start_output(Probabilities& p, uint32_t turn) const {
    const Operand v = values_of<kConsumer>(kConsumer, turn);
    pin(out);
    pin(p);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kNumKeys / 16; ++step) {
      Wgmma<T, Shape::kNumColumns>::multiply(out, p + 4 * step, v.advanced(step * 16 * kPanelBytes), true);
    }
    wgmma_commit();
  }
  // The same of the other's keys, whose probabilities are in shared memory.
  template <int kConsumer>
  __device__ __forceinline__ void start_output_of_other(uint32_t turn) const {
    constexpr int kOther = 1 - kConsumer;
    const Operand v = values_of<kConsumer>(kOther, turn),
                  p = depth_major_operand(smem_address(probabilities_of(kOther, turn)));
    pin(out);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kNumKeys / 16; ++step) {
      Wgmma<T, Shape::kNumColumns>::template multiply<true>(out, p.advanced(step * 32),
                                                            v.advanced(step * 16 * kPanelBytes), true);
    }
    wgmma_commit();
  }
  // Then this consumer's columns of a half of the keys have been read.
  template <int kConsumer>
  __device__ __forceinline__ void wait_for_output(int keys, uint32_t turn) const {
    wgmma_wait<0>();
    pin(out);
    if (elect_lane()) smem.kv_empty[keys][kConsumer].at(turn).arrive();
  }

  __device__ __forceinline__ uint8_t* panels_of(int keys, uint32_t turn) const {
    return smem.kv[turn % Shape::kNumStages][keys][0];
  }
  __device__ __forceinline__ uint8_t* probabilities_of(int keys, uint32_t turn) const {
    return panels_of(keys, turn) + Shape::kCkvPanels * Shape::kPanelSize;
  }
  template <int kConsumer>
  __device__ __forceinline__ Operand values_of(int keys, uint32_t turn) const {
    const int bytes = kConsumer * Shape::kPanelsOfHalf * Shape::kPanelSize;
    return column_major_operand(smem_address(panels_of(keys, turn) + bytes), Shape::kNumKeys);
  }

  // -inf where a query does not see a key.
  __device__ __forceinline__ void mask(Scores& scores, int tile) const {
    constexpr Visibility kVisibility = {Config::kMask, false, 0};
    const PrefillItem& item = work.item;
    const int first_kv = tile * Shape::kBlockN + consumer * Shape::kNumKeys;
    const int first_token = smem.group_size.divide(item.q_tile * Shape::kBlockM);
    if (kVisibility.contains_all(kVisibility.keys_of(position_of(first_token, item.qo_len, item.kv_len), item.kv_len),
                                 first_kv, Shape::kNumKeys)) {
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = work.query_row(smem.group_size, item.q_tile * Shape::kBlockM + row(half));
      const Range keys = kVisibility.keys_of(work.position(query), item.kv_len);
      const int num_visible = keys.end - first_kv - lane_column(lane_idx());
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; ++i) {
        if (column_of(i) >= num_visible) at(scores, half, i) = kMinusInfinity;
      }
    }
  }

  // Raises the maximum to cover the scores, where a row of this warp lags too far behind. `rescale` is what earlier
  // probabilities, and the output, shrink by.
  __device__ __forceinline__ void raise_max(const Scores& scores, float (&rescale)[2]) {
    float new_max[2];
    bool lags = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = at(scores, half, 0);
#pragma unroll
      for (int i = 1; i < Shape::kNumScores / 2; ++i) x = fmaxf(x, at(scores, half, i));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      lags = lags || (x - max[half]) * scale_log2 > kMaxLag;
      new_max[half] = fmaxf(x, max[half]);
    }
    if (!__any_sync(0xffffffffu, lags)) new_max[0] = max[0], new_max[1] = max[1];
    move_max_to(new_max, rescale);
  }
  __device__ __forceinline__ void move_max_to(const float (&new_max)[2], float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rescale[half] = new_max[half] == kMinusInfinity ? 1.f : fast_exp2((max[half] - new_max[half]) * scale_log2);
      max[half] = new_max[half];
      sum[half] *= rescale[half];
    }
  }
  __device__ __forceinline__ void rescale_output(const float (&rescale)[2]) const {
    if (!__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Shape::kNumOutputs / 2; ++i) at(out, half, i) *= rescale[half];
    }
  }

  // Scores become probabilities, up to the factor 2^-max.
  __device__ __forceinline__ void exponentiate(Scores& scores, Probabilities& p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row that has seen no key yet: exp2(-inf - 0) is zero, not NaN.
      const float scaled_max = max[half] == kMinusInfinity ? 0.f : max[half] * scale_log2;
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; i += 2) {
        float &x = at(scores, half, i), &y = at(scores, half, i + 1);
        x = fast_exp2(fmaf(x, scale_log2, -scaled_max));
        y = fast_exp2(fmaf(y, scale_log2, -scaled_max));
        sum[half] += x + y;
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kNumProbabilityRegisters; ++i) p[i] = pack_16bit<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // Probabilities, and the maximum that scales them, to where the other consumer finds them.
  template <int kConsumer>
  __device__ __forceinline__ void hand_over(const Probabilities& p, uint32_t turn) const {
    const uint32_t panel_smem = smem_address(probabilities_of(kConsumer, turn));
    const int stored_row = warp_row() + lane_idx() % 16;  // whose address this lane passes to stmatrix
#pragma unroll
    for (int step = 0; step < Shape::kNumKeys / 16; ++step) {
      const uint32_t packed[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      stmatrix_x4(panel_smem + granule_offset(stored_row, 2 * step + lane_idx() / 16, Shape::kNumKeys), packed);
    }
    if (leads_row()) smem.max_of_row[kConsumer][row(0)] = max[0], smem.max_of_row[kConsumer][row(1)] = max[1];
    fence_async_proxy();
    named_barrier_arrive(kHasHandedOver + kConsumer, Shape::kNumConsumerThreads);
  }
  // Waits for those of the other.
  template <int kConsumer>
  __device__ __forceinline__ void take_over(float (&rescale)[2]) {
    constexpr int kOther = 1 - kConsumer;
    named_barrier_sync(kHasHandedOver + kOther, Shape::kNumConsumerThreads);
    const float new_max[2] = {smem.max_of_row[kOther][row(0)], smem.max_of_row[kOther][row(1)]};
    move_max_to(new_max, rescale);
  }
};

}  // namespace flashinfer::sm90::mla
