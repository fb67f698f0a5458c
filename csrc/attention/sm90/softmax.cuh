// SPDX-License-Identifier: Apache-2.0
// The softmax of prefill on Hopper: what happens to a tile of scores between S = Q Kᵀ and O += P V.
#pragma once

#include "attention/sm90/tile.cuh"
#include "device/fragment.cuh"
#include "device/mma.cuh"

namespace flashinfer::sm90 {

// Probabilities are 2^kHeadroom at the maximum that scales them, which may lag behind the true one by kMaxLag powers of
// two (attention/score.cuh). In 8 bits (e4m3: 2^-9 to 448)
// they make use of the range: those 2^-14 of the largest keep all of their bits. Where they are computed by a maximum
// that nobody compared with the scores, the sum that a thread has of a tile's must not exceed kMostSum: what T holds,
// and of bf16 what leaves values and fp32 sums room.
template <class T>
struct ProbabilityRange {
  static constexpr float kMaxLag = flashinfer::kMaxLag, kHeadroom = 0.f, kMostSum = 0x1p32f;
};
template <>
struct ProbabilityRange<fp16> : ProbabilityRange<bf16> {
  static constexpr float kMostSum = 0x1p15f;
};
template <>
struct ProbabilityRange<fp8_e4m3> {
  static constexpr float kMaxLag = 0.f, kHeadroom = 8.f;
};

// Probabilities as the registers of A of P·V (device/sm90/wgmma.cuh). Of 8 bits a register takes four, of the two pairs
// that a thread holds of 16 keys: their order within these is that in which transpose.cuh puts the values.
template <class T, int kNumScores>
__device__ __forceinline__ uint32_t pack_probabilities(const float (&scores)[kNumScores], int idx) {
  if constexpr (sizeof(T) == 2) {
    return pack_16bit<T>(scores[2 * idx], scores[2 * idx + 1]);
  } else {
    const int half = idx % 2, first = idx / 2 * 4;
    return pack_e4m3(at(scores, half, first), at(scores, half, first + 1), at(scores, half, first + 2),
                     at(scores, half, first + 3));
  }
}

// Of the two rows of a thread.
template <class Config>
struct Softmax {
  using Shape = sm90::Shape<Config>;
  using Probability = ProbabilityRange<typename Shape::T>;
  using Scores = float[Shape::kNumScores];
  using Output = float[Shape::kNumOutputs];
  float max[2];  // of the unscaled scores; lags behind
  float sum[2];  // this lane's share until the end

  __device__ __forceinline__ void reset() {
    max[0] = max[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.f;
  }

  // Raises the maximum to cover the scores. `rescale` is what earlier probabilities, and their output, shrink by; false
  // if they stay.
  __device__ __forceinline__ bool raise_max(const Scores& scores, float scale_log2, float (&rescale)[2]) {
    float tile_max[2];
    bool lags = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(at(scores, half, 0), at(scores, half, 1));
#pragma unroll
      for (int i = 2; i < Shape::kNumScores / 2; i += 2)
        x = fmaxf(x, fmaxf(at(scores, half, i), at(scores, half, i + 1)));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      tile_max[half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      lags = lags || (tile_max[half] - max[half]) * scale_log2 > Probability::kMaxLag;
    }
    lags = __any_sync(0xffffffffu, lags);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float new_max = lags ? fmaxf(max[half], tile_max[half]) : max[half];
      rescale[half] = new_max == kMinusInfinity ? 1.f : fast_exp2((max[half] - new_max) * scale_log2);
      max[half] = new_max;
      sum[half] *= rescale[half];
    }
    return lags;
  }

  // The base-2 logarithm of the sum over all lanes of a row. A row that saw no key: -inf - inf.
  __device__ __forceinline__ float lse(int half, float total, float scale_log2) const {
    return max[half] * scale_log2 + (fast_log2(total) - Probability::kHeadroom);
  }

  // Scores become probabilities, up to the factor 2^-max.
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row that has seen no key yet: exp2(-inf - 0) is zero, not NaN.
      const float scaled_max = max[half] == kMinusInfinity ? 0.f : max[half] * scale_log2 - Probability::kHeadroom;
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; i += 2) {
        float &x = at(scores, half, i), &y = at(scores, half, i + 1);
        x = fast_exp2(fmaf(x, scale_log2, -scaled_max));
        y = fast_exp2(fmaf(y, scale_log2, -scaled_max));
        sum[half] += x + y;
      }
    }
  }

  // The same of all scores by the maximum as it is, which may be too far below them: tile_sum is to be added (`add`) if
  // it `holds`.
  __device__ __forceinline__ void exponentiate_by_last_max(Scores& scores, float scale_log2,
                                                           float (&tile_sum)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scaled_max = max[half] * scale_log2;
      tile_sum[half] = 0.f;
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; i += 2) {
        float &x = at(scores, half, i), &y = at(scores, half, i + 1);
        x = fast_exp2(fmaf(x, scale_log2, -scaled_max));
        y = fast_exp2(fmaf(y, scale_log2, -scaled_max));
        tile_sum[half] += x + y;
      }
    }
  }
  // Of all rows of the consumer, whose products are started together. Not if a row has seen no key yet, where the
  // maximum is -inf and the sum not finite.
  __device__ __forceinline__ static bool holds(const float (&tile_sum)[2]) {
    const bool is_less = tile_sum[0] <= Probability::kMostSum && tile_sum[1] <= Probability::kMostSum;
    return !named_barrier_any(kConsumer + consumer_idx(), kWarpgroupSize, !is_less);
  }
  __device__ __forceinline__ void add(const float (&tile_sum)[2]) {
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

  __device__ __forceinline__ static void rescale_output(Output& out, const float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Shape::kNumOutputs / 2; ++i) at(out, half, i) *= rescale[half];
    }
  }

  __device__ __forceinline__ static void pack(const Scores& scores, uint32_t (&p)[Shape::kNumProbabilityRegisters]) {
#pragma unroll
    for (int i = 0; i < Shape::kNumProbabilityRegisters; ++i) p[i] = pack_probabilities<typename Shape::T>(scores, i);
  }
};

// Soft cap and ALiBi on every score; then -inf where a query does not see a key.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void transform_and_mask(float (&scores)[Shape::kNumScores], const PrefillParams& params,
                                                   const Work& work, const FastDivisor& group_size, int tile,
                                                   auto needs_mask, bool asks_function = true) {
  const PrefillItem& item = work.item;
  const int thread_idx = fresh_thread_idx(), lane_idx = thread_idx % 32;
  const int first_row = item.q_tile * Shape::kBlockM + thread_idx / 32 * Shape::kRowsPerWarp + lane_row(lane_idx);
  const int first_kv = tile * Shape::kBlockN + lane_column(lane_idx);  // of this lane
  const auto visibility = visibility_of<Config>(params, item.request_idx);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const QueryRow query = work.query_row(group_size, first_row + row_of(half));
    const int32_t position = work.position(query);
    if constexpr (!Score<Config>::kIsPlain) {
      const float slope = Score<Config>::alibi_slope(params, query.qo_head_idx);
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; ++i) {
        float& score = at(scores, half, i);
        const ScoreAt at_score = {item.request_idx, query.qo_head_idx, position, first_kv + column_of(i)};
        score = Score<Config>::transform(params, score, slope, at_score);
      }
    }
    if (!needs_mask) continue;
    const Range keys = visibility.keys_of(position, item.kv_len);
    const Range from_here = {keys.begin - first_kv, keys.end - first_kv};
    const Range gap = visibility.gap_of(position, item.kv_len);
    const Range gap_from_here = {gap.begin - first_kv, gap.end - first_kv};
    // Four words of the mask at a time, one a lane of the four that share a row.
    uint32_t lane_bits = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < Shape::kNumScores / 2; ++i) {
      const int offset = column_of(i);
      bool visible = visibility.contains(from_here, offset);
      if (visibility.kGapIsAll) visible = visible && !visibility.is_in_gap(gap_from_here, offset);
      if (visibility.has_bits()) {
        if (offset % 128 == 0) {
          lane_bits = visibility.bits_of(params, item.request_idx, query.token_idx,
                                         tile * Shape::kBlockN + offset + lane_idx % 4 * 32, item.qo_len, item.kv_len);
        }
        const uint32_t bits = __shfl_sync(0xffffffffu, lane_bits, offset % 128 / 32, 4);
        visible = visible && (bits >> (offset % 32 + lane_column(lane_idx))) & 1;
      }
      float& score = at(scores, half, i);
      score = visible ? score : kMinusInfinity;
    }
    if constexpr (Config::Function::kHasHoles) {
      if (!asks_function) continue;
#pragma unroll
      for (int i = 0; i < Shape::kNumScores / 2; ++i) {
        float& score = at(scores, half, i);
        if (!visibility.sees(query.qo_head_idx, position, first_kv + column_of(i))) score = kMinusInfinity;
      }
    }
  }
}

}  // namespace flashinfer::sm90
