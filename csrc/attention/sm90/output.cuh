// SPDX-License-Identifier: Apache-2.0
// The end of a unit of prefill on Hopper: normalized rows and their LSE go where they belong; a query tile whose KV
// were split is merged by the blocks that finish its splits last.
#pragma once

#include "attention/sm90/softmax.cuh"
#include "device/ldmatrix.cuh"

namespace flashinfer::sm90 {

// The consumer's rows of the output, staged in shared memory where its queries were, so that a row is written as a
// whole.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void store_rows(const Sm90PrefillParams& params, const Work& work,
                                           const FastDivisor& group_size, int first_row, int num_rows,
                                           uint32_t rows_smem, int warp_row, const float (&out)[Shape::kNumOutputs]) {
  using T = typename Shape::Out;
  const int lane_idx = fresh_thread_idx() % 32;
  const int row = warp_row + lane_idx % 16;  // whose address this lane passes to stmatrix
#pragma unroll
  for (int granule = 0; granule < Shape::kHeadDimVo / 8; granule += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = 2 * (granule + i / 2), half = i % 2;
      packed[i] = pack_16bit<T>(at(out, half, first), at(out, half, first + 1));
    }
    stmatrix_x4(rows_smem + granule_offset(row, granule + lane_idx / 16, Shape::kRowsPerConsumer), packed);
  }
  const QueryRow query = work.query_row(group_size, first_row + row);
  const int64_t offset = work.offset(query, params.out_token_stride, params.out_head_stride);
  __syncwarp();
  // All rows are on their way from shared memory before the first is stored.
  constexpr int kGranulesPerRow = Shape::kHeadDimVo / 8;
  constexpr int kLanesPerRow = kGranulesPerRow % 16 == 0 ? 16 : 8, kRowsPerPass = 32 / kLanesPerRow;
  constexpr int kNumPasses = Shape::kRowsPerWarp / kRowsPerPass, kNumVecs = kGranulesPerRow / kLanesPerRow;
  const int lane_row = lane_idx / kLanesPerRow, lane_granule = lane_idx % kLanesPerRow;
  uint4 vecs[kNumPasses][kNumVecs];
  T* rows_gmem[kNumPasses];
#pragma unroll
  for (int pass = 0; pass < kNumPasses; ++pass) {
    rows_gmem[pass] = static_cast<T*>(params.out) + __shfl_sync(0xffffffffu, offset, pass * kRowsPerPass + lane_row) +
                      lane_granule * 8;
#pragma unroll
    for (int i = 0; i < kNumVecs; ++i) {
      const int granule = lane_granule + i * kLanesPerRow;
      // The swizzle of a later row differs in bits that no other part of the address has.
      const uint32_t first_smem = rows_smem + granule_offset(warp_row + lane_row, granule, Shape::kRowsPerConsumer);
      const uint32_t row_smem = (first_smem ^ pass * kRowsPerPass % 8 << 4) + pass * kRowsPerPass * kPanelBytes;
      uint4& vec = vecs[pass][i];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w)
                   : "r"(row_smem));
    }
  }
#pragma unroll
  for (int pass = 0; pass < kNumPasses; ++pass) {
    if (warp_row + pass * kRowsPerPass + lane_row >= num_rows) continue;
#pragma unroll
    for (int i = 0; i < kNumVecs; ++i)
      *reinterpret_cast<uint4*>(rows_gmem[pass] + i * kLanesPerRow * 8) = vecs[pass][i];
  }
}

// The same from registers, where the next queries may be on their way to that place. Four lanes have a pair each of
// every eight columns of a row; of 32 columns they write eight each, two whole sectors.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void store_rows_unstaged(const Sm90PrefillParams& params, const Work& work,
                                                    const FastDivisor& group_size, int first_row, int num_rows,
                                                    int first_lane_row, const float (&out)[Shape::kNumOutputs]) {
  using T = typename Shape::Out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_lane_row + row_of(half);
    const QueryRow query = work.query_row(group_size, first_row + row);
    T* lane_gmem = static_cast<T*>(params.out) + work.offset(query, params.out_token_stride, params.out_head_stride) +
                   fresh_thread_idx() % 4 * 8;
#pragma unroll
    for (int column = 0; column < Shape::kHeadDimVo; column += 32) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = column / 4 + 2 * i;
        x[i] = pack_16bit<T>(at(out, half, first), at(out, half, first + 1));
      }
      transpose_quad(x);
      if (row < num_rows) *reinterpret_cast<uint4*>(lane_gmem + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
}

// Four neighbouring columns of each 16, the j-th, that a thread has where the values' dimensions were reordered
// (transpose.cuh).
template <int kNum>
__device__ __forceinline__ void four_columns(const float (&out)[kNum], int j, int half, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = at(out, half, 4 * j + i % 2 * 2 + i / 2);
}

// The consumer's rows of such an output: four lanes write a whole sector.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void store_reordered_rows(const Sm90PrefillParams& params, const Work& work,
                                                     const FastDivisor& group_size, int first_row, int num_rows,
                                                     int first_lane_row, const float (&out)[Shape::kNumOutputs]) {
  using T = typename Shape::Out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first_lane_row + row_of(half) >= num_rows) continue;
    const QueryRow query = work.query_row(group_size, first_row + first_lane_row + row_of(half));
    T* lane_gmem = static_cast<T*>(params.out) + work.offset(query, params.out_token_stride, params.out_head_stride) +
                   fresh_thread_idx() % 4 * 4;
#pragma unroll
    for (int j = 0; j < Shape::kHeadDimVo / 16; ++j) {
      float x[4];
      four_columns(out, j, half, x);
      cast_vec<T>(x).store(lane_gmem + j * 16);
    }
  }
}

// Merges the splits of the query tile as far as this block is the one to do it. By all consumers.
template <class Config>
__device__ __forceinline__ void merge_splits(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work) {
  constexpr int kNumThreads = Shape<Config>::kNumConsumerThreads;
  constexpr int kNumVecs = Shape<Config>::kNumConsumers == 1 ? 4 : 2;  // as much under way with half the threads
  const auto sync = [] { named_barrier_sync(kAllConsumers, kNumThreads); };
  const FastDivisor group_size = smem.group_size;
  flashinfer::merge_splits<Config, kNumThreads, kNumVecs, 4>(
      params, work, group_size, [&](uint32_t* counter, int32_t count) {
        const bool is_last = arrives_last(counter, count, smem.is_last, fresh_thread_idx(), sync);
        sync();  // read by all before it is written again
        return is_last;
      });
}

// Normalizes the consumer's rows and writes them, and their LSE, where they belong.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void finish_unit(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work,
                                            uint32_t turn, float (&out)[Shape::kNumOutputs],
                                            const Softmax<Config>& softmax) {
  const PrefillItem& item = work.item;
  const FastDivisor& group_size = smem.group_size;
  const int thread_idx = fresh_thread_idx(), consumer_idx = thread_idx / kWarpgroupSize;
  const int lane_idx = thread_idx % 32, warp_row = thread_idx % kWarpgroupSize / 32 * Shape::kRowsPerWarp;
  const int tile_rows = work.num_rows(group_size.divisor, Shape::kBlockM);
  const int num_rows = tile_rows - consumer_idx * Shape::kRowsPerConsumer;  // of the consumer; may be negative
  const int first_row = item.q_tile * Shape::kBlockM + consumer_idx * Shape::kRowsPerConsumer;
  const float scale_log2 = Score<Config>::scale_log2(params), v_scale = Score<Config>::v_scale(params);
  float lse[2], sinks[2];
  if constexpr (Config::kHasSinks) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = work.query_row(group_size, first_row + warp_row + lane_row(lane_idx) + row_of(half));
      sinks[half] = item.num_splits > 1 ? kMinusInfinity : params.sinks[query.qo_head_idx];  // merge_splits adds it
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    lse[half] = softmax.lse(half, sum, scale_log2);
    float factor = sum > 0.f ? __fdividef(v_scale, sum) : 0.f;
    if constexpr (Config::kHasSinks) factor *= add_sink(sinks[half], lse[half]);
#pragma unroll
    for (int i = 0; i < Shape::kNumOutputs / 2; ++i) at(out, half, i) *= factor;
  }

  const int first_lane_row = warp_row + lane_row(lane_idx);
  if (item.num_splits > 1) {
    const int64_t row = work.partial_row(item.split_idx, tile_rows, params.num_kv_heads) +
                        consumer_idx * Shape::kRowsPerConsumer + first_lane_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_lane_row + row_of(half) >= num_rows) continue;
      float* row_gmem = params.partial_out + (row + row_of(half)) * Shape::kHeadDimVo;
      if constexpr (Shape::kTransposesValues) {
#pragma unroll
        for (int j = 0; j < Shape::kHeadDimVo / 16; ++j) {
          float x[4];
          four_columns(out, j, half, x);
          *reinterpret_cast<float4*>(row_gmem + lane_idx % 4 * 4 + j * 16) = float4{x[0], x[1], x[2], x[3]};
        }
      } else {
#pragma unroll
        for (int i = 0; i < Shape::kNumOutputs / 2; i += 2) {
          float* pair_gmem = row_gmem + lane_column(lane_idx) + column_of(i);
          *reinterpret_cast<float2*>(pair_gmem) = float2{at(out, half, i), at(out, half, i + 1)};
        }
      }
      if (lane_column(lane_idx) == 0) params.partial_lse[row + row_of(half)] = lse[half];
    }
    merge_splits<Config>(params, smem, work);
    return;
  }
  if constexpr (Shape::kTransposesValues) {
    store_reordered_rows<Config>(params, work, group_size, first_row, num_rows, first_lane_row, out);
  } else if constexpr (Shape::kReleasesQueriesEarly) {
    store_rows_unstaged<Config>(params, work, group_size, first_row, num_rows, first_lane_row, out);
  } else {
    named_barrier_sync(kConsumer + consumer_idx, kWarpgroupSize);  // all warps have left the queries
    store_rows<Config>(params, work, group_size, first_row, num_rows, smem_address(smem.q_of(turn, consumer_idx)),
                       warp_row, out);
  }
  if (params.lse == nullptr || lane_column(lane_idx) != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first_lane_row + row_of(half) >= num_rows) continue;
    const QueryRow query = work.query_row(group_size, first_row + first_lane_row + row_of(half));
    params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse[half];
  }
}

}  // namespace flashinfer::sm90
