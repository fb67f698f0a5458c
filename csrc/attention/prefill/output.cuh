// SPDX-License-Identifier: Apache-2.0
// The end of a unit of prefill: normalized rows of the output and their LSE go where they belong; a query tile whose KV
// were split is merged by the blocks that finish its splits last.
#pragma once

#include "attention/prefill/load.cuh"
#include "attention/prefill/softmax.cuh"

namespace flashinfer {

// The two pairs of neighbouring output columns that a lane holds of 16. A pair is at lane_column(quad_lane) + column.
template <class Shape>
struct OutputPair {
  int idx[2];  // of the pair's first and second column among the lane's elements of a row
  int column;

  __device__ __forceinline__ static constexpr OutputPair of(int sixteen, int pair) {
    if (Shape::kPacksV) return {{4 * sixteen + pair, 4 * sixteen + 2 + pair}, 16 * sixteen + 2 * pair};
    return {{4 * sixteen + 2 * pair, 4 * sixteen + 2 * pair + 1}, 16 * sixteen + 8 * pair};
  }
  __device__ __forceinline__ static constexpr int lane_column(int quad_lane) {
    return (Shape::kPacksV ? 4 : 2) * quad_lane;
  }
};

// Reduce the lanes' shares of the sums. They become the factors that normalize the output; the LSE go to shared memory,
// from where one lane a row stores them. Of a split, without the sink: merge_splits adds it.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void finish_softmax(SoftmaxState<Config>& state, PrefillSmem<Config>& smem,
                                               const PrefillParams& params) {
  const float scale_log2 = Score<Config>::scale_log2(params), v_scale = Score<Config>::v_scale(params);
  const uint32_t thread_idx = thread_idx_after_loop();
  const int lane_idx = int(thread_idx % 32);
  float* warp_lse_smem = smem.lse + thread_idx / 32 * Shape::kRowsPerWarp;
  float sinks[Shape::kFragsM][2];
  if constexpr (Config::kHasSinks) {
#pragma unroll
    for (int i = 0; i < 2 * Shape::kFragsM; ++i) {
      const int row = int(thread_idx / 32) * Shape::kRowsPerWarp + i / 2 * 16 + row_of(i % 2) + lane_row(lane_idx);
      const int32_t head = smem.work.template query_row<Shape>(row).qo_head_idx;
      sinks[i / 2][i % 2] = smem.work.item.num_splits > 1 ? kMinusInfinity : params.sinks[head];
    }
  }
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float lse = state.max[m][half] * scale_log2 + fast_log2(sum);  // a row that saw no key: -inf - inf
      state.sum[m][half] = sum > 0.f ? __fdividef(v_scale, sum) : 0.f;
      if constexpr (Config::kHasSinks) state.sum[m][half] *= add_sink(sinks[m][half], lse);
      if (lane_idx % 4 == 0) warp_lse_smem[m * 16 + half * 8 + lane_idx / 4] = lse;
    }
  }
  __syncwarp();
}

// visit(row, column, x, y) for every pair of neighbouring output columns of this lane, normalized. Row and column are
// constants, to be added to the lane's own: lane_idx / 4 in the warp, and OutputPair::lane_column.
template <class Config, class Visit, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void for_each_output_pair(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                                     const SoftmaxState<Config>& state, const Visit& visit) {
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = state.sum[m][half];
#pragma unroll
      for (int pair = 0; pair < Shape::kFragsD; ++pair) {
        const auto place = OutputPair<Shape>::of(pair / 2, pair % 2);
        visit(m * 16 + row_of(half), place.column, at(out[m], half, place.idx[0]) * factor,
              at(out[m], half, place.idx[1]) * factor);
      }
    }
  }
}

// Write the warp's rows where they belong: out and lse, by way of shared memory, or this split's partial results.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void store_output(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                             const SoftmaxState<Config>& state, const PrefillParams& params,
                                             const PrefillWork& work, PrefillSmem<Config>& smem) {
  using T = typename Shape::Out;
  using OutRows = typename Shape::OutRows;
  const uint32_t thread_idx = thread_idx_after_loop();
  const int lane_idx = int(thread_idx % 32), warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
  const int num_rows = min(work.num_rows(Shape::kBlockM) - warp_row, Shape::kRowsPerWarp);  // of the warp
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const float* warp_lse_smem = smem.lse + warp_row;
  const int lane_row = lane_idx / 4, lane_column = OutputPair<Shape>::lane_column(lane_idx % 4);
  if (work.item.num_splits > 1) {
    const int64_t first_row =
        work.partial_row(work.item.split_idx, work.num_rows(Shape::kBlockM), params.num_kv_heads) + warp_row;
    float* lane_gmem = params.partial_out + (first_row + lane_row) * Shape::kHeadDimVo + lane_column;
    for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
      if (lane_row + row >= num_rows) return;
      *reinterpret_cast<float2*>(lane_gmem + row * Shape::kHeadDimVo + column) = float2{x, y};
    });
    if (lane_idx < num_rows) params.partial_lse[first_row + lane_idx] = warp_lse_smem[lane_idx];
    return;
  }
  const uint32_t lane_offset = OutRows::offset(lane_row, lane_column / 8) + lane_column % 8 * 2;
  for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
    const uint32_t offset = OutRows::advance(lane_offset, column / 8) + row * OutRows::kNumBytes + column % 8 * 2;
    *reinterpret_cast<uint32_t*>(warp_rows_smem + offset) = pack_16bit<T>(x, y);
  });
  __syncwarp();
  using Copy = RowCopy<OutRows, Shape::kRowsPerWarp, 32>;
  const Copy copy = Copy::of(thread_idx);
  const auto rows = WarpRows<Shape>::of(work, thread_idx, params.out_token_stride, params.out_head_stride);
  constexpr int kGranulesPerPass = OutRows::kNumGranules / Copy::kLanesPerRow;
  constexpr int kMaxBatch = 8 / kGranulesPerPass;
  constexpr int kBatch = Copy::kNumPasses < kMaxBatch ? Copy::kNumPasses : kMaxBatch;  // passes
  static_assert(Copy::kNumPasses % kBatch == 0);
#pragma unroll
  for (int first = 0; first < Copy::kNumPasses; first += kBatch) {
    uint4 vecs[kBatch][kGranulesPerPass];
    int64_t offsets[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = copy.row + (first + i) * Copy::kRowsPerPass;
      offsets[i] = rows.offset(row);
#pragma unroll
      for (int c = 0; c < kGranulesPerPass; ++c) {
        const int granule = copy.lane + c * Copy::kLanesPerRow;
        vecs[i][c] = load_shared_16(smem_address(warp_rows_smem) + OutRows::offset(row, granule));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (copy.row + (first + i) * Copy::kRowsPerPass >= num_rows) continue;
      T* row_gmem = static_cast<T*>(params.out) + offsets[i] + copy.lane * 8;
#pragma unroll
      for (int c = 0; c < kGranulesPerPass; ++c) {
        *reinterpret_cast<uint4*>(row_gmem + c * Copy::kLanesPerRow * 8) = vecs[i][c];
      }
    }
  }
  if (params.lse != nullptr && lane_idx < num_rows) {
    const QueryRow query = work.template query_row<Shape>(warp_row + lane_idx);
    const int64_t token_idx = work.item.q_begin + query.token_idx;
    params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = warp_lse_smem[lane_idx];
  }
}

}  // namespace flashinfer
