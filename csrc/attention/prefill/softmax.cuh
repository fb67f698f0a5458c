// SPDX-License-Identifier: Apache-2.0
// The softmax of prefill: what happens to a tile of scores between S = Q Kᵀ and O += P V. A new kind of logit belongs
// into score.cuh, a new mask into visibility.cuh; this file asks them what to do with a score.
#pragma once

#include "attention/prefill/tile.cuh"
#include "device/fragment.cuh"

namespace flashinfer {

template <class Config>
struct SoftmaxState {
  using Shape = PrefillShape<Config>;
  float max[Shape::kFragsM][2];  // of the transformed, unscaled scores; lags behind
  float sum[Shape::kFragsM][2];  // this lane's share until the end

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
      max[m][0] = max[m][1] = kMinusInfinity;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Raise the maximum to cover `scores`, rescaling the sums and the output where it moved by more than the lag allowed.
  __device__ __forceinline__ void raise_max(const float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                            float (&out)[Shape::kFragsM][Shape::kFragsD][4], float scale_log2) {
    float tile_max[Shape::kFragsM][2];
    bool lags = false;
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(at(scores[m], half, 0), at(scores[m], half, 1));
#pragma unroll
        for (int i = 2; i < 2 * Shape::kFragsN; i += 2) {
          x = fmaxf(x, fmaxf(at(scores[m], half, i), at(scores[m], half, i + 1)));
        }
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        tile_max[m][half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
        lags = lags || (tile_max[m][half] - max[m][half]) * scale_log2 > kMaxLag;
      }
    }
    if (!__any_sync(0xffffffffu, lags)) return;
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float new_max = fmaxf(max[m][half], tile_max[m][half]);
        const float rescale = new_max == kMinusInfinity ? 1.f : fast_exp2((max[m][half] - new_max) * scale_log2);
        max[m][half] = new_max;
        sum[m][half] *= rescale;
#pragma unroll
        for (int i = 0; i < 2 * Shape::kFragsD; ++i) at(out[m], half, i) *= rescale;
      }
    }
  }
};

// Soft cap and ALiBi on every score; then -inf where a query does not see a key.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void transform_and_mask(float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                                   const PrefillParams& params, const PrefillWork& work, int warp_row,
                                                   int tile, bool needs_mask) {
  const auto visibility = visibility_of<Config>(params, work.item.request_idx);
  const int lane_idx = int(fresh_thread_idx() % 32);
  const int first_kv = tile * Shape::kBlockN + lane_column(lane_idx);  // of this lane
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = work.template query_row<Shape>(warp_row + m * 16 + row_of(half) + lane_row(lane_idx));
      const int32_t position = work.position(query);
      if constexpr (!Score<Config>::kIsPlain) {
        const float slope = Score<Config>::alibi_slope(params, query.qo_head_idx);
#pragma unroll
        for (int i = 0; i < 2 * Shape::kFragsN; ++i) {
          float& score = at(scores[m], half, i);
          const ScoreAt at_score = {work.item.request_idx, query.qo_head_idx, position, first_kv + column_of(i)};
          score = Score<Config>::transform(params, score, slope, at_score);
        }
      }
      if (!needs_mask) continue;
      const Range keys = visibility.keys_of(position, work.item.kv_len);
      const Range gap = visibility.gap_of(position, work.item.kv_len);
#pragma unroll
      for (int word = 0; word < Shape::kBlockN / 32; ++word) {
        uint32_t bits = 0xffffffffu;
        if (visibility.has_bits()) {
          bits = visibility.bits_of(params, work.item.request_idx, query.token_idx, tile * Shape::kBlockN + word * 32,
                                    work.item.qo_len, work.item.kv_len);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // 4 fragments of 8 keys to a word of 32
          const int offset = column_of(i), kv_idx = first_kv + word * 32 + offset;
          bool visible = visibility.contains(keys, kv_idx) && !visibility.is_in_gap(gap, kv_idx);
          if (visibility.has_bits()) visible = visible && (bits >> (offset + lane_column(lane_idx))) & 1;
          visible = visible && visibility.sees(query.qo_head_idx, position, kv_idx);
          float& score = at(scores[m], half, word * 8 + i);
          score = visible ? score : kMinusInfinity;
        }
      }
    }
  }
}

// P = exp2(scores - max), 16 keys at a time so that the exponentials of one step overlap with the products of the last.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void softmax_times_v(const float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                                SoftmaxState<Config>& state,
                                                float (&out)[Shape::kFragsM][Shape::kFragsD][4], uint32_t v_smem,
                                                float scale_log2) {
  using VRows = typename Shape::VRows;
  const int lane_idx = int(fresh_thread_idx() % 32);
  const uint32_t v_lane_smem = v_smem + VRows::offset(lane_idx % 16, lane_idx / 16);
  float scaled_max[Shape::kFragsM][2];
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a row that has seen no key yet: exp2(-inf - 0) is zero, not NaN
      scaled_max[m][half] = state.max[m][half] == kMinusInfinity ? 0.f : state.max[m][half] * scale_log2;
    }
  }
#pragma unroll
  for (int step = 0; step < Shape::kBlockN / 16; ++step) {
    uint32_t p[Shape::kFragsM][4];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // register i of the A fragment: 8 columns i / 2 of the 16, rows of half i % 2
        const int first = 2 * (2 * step + i / 2), half = i % 2;
        const float x = fast_exp2(fmaf(at(scores[m], half, first), scale_log2, -scaled_max[m][half]));
        const float y = fast_exp2(fmaf(at(scores[m], half, first + 1), scale_log2, -scaled_max[m][half]));
        state.sum[m][half] += x + y;
        p[m][i] = pack_16bit<typename Shape::T>(x, y);
      }
    }
    accumulate_output<Config>(out, p, v_lane_smem + step * 16 * VRows::kNumBytes);
  }
}

}  // namespace flashinfer
