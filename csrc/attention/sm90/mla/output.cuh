// The end of a unit of latent attention on Hopper: as attention/sm90/output.cuh, where each consumer has half of the
// columns of every row.
#pragma once

#include "attention/mla/merge.cuh"
#include "attention/sm90/mla/walk.cuh"

namespace flashinfer::sm90::mla {

// Normalizes the consumer's columns and writes them, and the first consumer the LSE, where they belong.
template <class Config, int kConsumer>
__device__ __forceinline__ void finish_unit(TileWalk<Config, kConsumer>& walk) {
  using Shape = mla::Shape<Config>;
  using T = typename Config::Out;
  const Sm90MlaParams& params = walk.params;
  const Work& work = walk.work;
  auto& sum_of_row = walk.smem.sum_of_row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = walk.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (walk.leads_row()) sum_of_row[kConsumer][walk.row(half)] = sum;
  }
  named_barrier_sync(kBothConsumers, Shape::kNumConsumerThreads);

  const PrefillItem& item = work.item;
  const FastDivisor group_size = walk.smem.group_size;
  const int num_rows = work.num_rows(group_size.divisor, Shape::kBlockM);
  const int first_column = kConsumer * Shape::kNumColumns, quad_lane = walk.lane_idx() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = walk.row(half);
    const bool exists = row < num_rows;
    const float sum = walk.sum[half] + sum_of_row[1 - kConsumer][row];
    const float factor = sum > 0.f ? __fdividef(params.v_scale, sum) : 0.f;
    // A row that saw no key: -inf - inf.
    const float lse = walk.max[half] * walk.scale_log2 + fast_log2(sum);
    if (item.num_splits > 1) {
      if (!exists) continue;
      const int64_t partial_row = work.partial_row(item.split_idx, num_rows, 1) + row;
      float* row_gmem = params.partial_out + partial_row * Config::kHeadDimVo + first_column + 4 * quad_lane;
#pragma unroll
      for (int i = 0; i < Shape::kNumOutputs / 2; i += 4) {  // a lane's pairs of 16 columns
        *reinterpret_cast<float4*>(row_gmem + i * 4) =
            float4{at(walk.out, half, i) * factor, at(walk.out, half, i + 1) * factor,
                   at(walk.out, half, i + 2) * factor, at(walk.out, half, i + 3) * factor};
      }
      if (kConsumer == 0 && walk.leads_row()) params.partial_lse[partial_row] = lse;
      continue;
    }
    const QueryRow query = work.query_row(group_size, item.q_tile * Shape::kBlockM + row);
    T* row_gmem = static_cast<T*>(params.out) + work.offset(query, params.out_token_stride, params.out_head_stride) +
                  first_column + 8 * quad_lane;
#pragma unroll
    for (int i = 0; i < Shape::kNumOutputs / 2; i += 8) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        packed[j] = pack_16bit<T>(at(walk.out, half, i + 2 * j) * factor, at(walk.out, half, i + 2 * j + 1) * factor);
      }
      transpose_quad(packed);
      if (exists) {
        *reinterpret_cast<uint4*>(row_gmem + i * 4) = uint4{packed[0], packed[1], packed[2], packed[3]};
      }
    }
    if (exists && kConsumer == 0 && walk.leads_row() && params.lse != nullptr) {
      params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse;
    }
  }
  // Then sums may be written again: nothing else in the way of a unit without keys would hold the other consumer back.
  named_barrier_sync(kBothConsumers, Shape::kNumConsumerThreads);
  if (item.num_splits > 1 && fresh_thread_idx() == 0) {
    SplitCounter{params.counters + item.counter, uint32_t(item.num_splits)}.arrive();
  }
}

}  // namespace flashinfer::sm90::mla
