// SPDX-License-Identifier: Apache-2.0
// The end of a unit of latent attention on Hopper: as attention/sm90/output.cuh, where each consumer has half of the
// columns of every row.
#pragma once

#include "attention/mla/merge.cuh"
#include "attention/sm90/mla/walk.cuh"

namespace flashinfer::sm90::mla {

// Normalizes the consumer's columns and writes them, and the first consumer the LSE, where they belong.
template <class Config>
__device__ __forceinline__ void finish_unit(const Sm90MlaParams& params, Smem<Config>& smem, const Work& work,
                                            RowStates<Config>& rows, int consumer) {
  using Shape = mla::Shape<Config>;
  using T = typename Config::Out;
  using Thread = ConsumerThread;
  const PrefillItem& item = work.item;
  const bool is_split = item.num_splits > 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = rows.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (Thread::leads_row()) smem.sum_of_row[consumer][Thread::row(half)] = sum;
    if (!is_split) continue;
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < Shape::kNumOutputs / 2; ++i) largest = fmaxf(largest, fabsf(at(rows.out, half, i)));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    if (Thread::leads_row()) smem.largest_of_row[consumer][Thread::row(half)] = largest;
  }
  named_barrier_sync(kBothConsumers, Shape::kNumConsumerThreads);

  const FastDivisor group_size = smem.group_size;
  const int num_rows = work.num_rows(group_size.divisor, Shape::kBlockM), quad_lane = Thread::lane_idx() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Thread::row(half);
    const bool exists = row < num_rows;
    const float sum = rows.sum[half] + smem.sum_of_row[1 - consumer][row];
    const float factor = sum > 0.f ? __fdividef(params.v_scale, sum) : 0.f;
    // A row that saw no key: -inf - inf.
    const float lse = rows.max[half] * params.sm_scale * kLog2E + fast_log2(sum);
    if (is_split) {
      if (!exists) continue;
      const float largest = fmaxf(smem.largest_of_row[0][row], smem.largest_of_row[1][row]);
      const auto unit = PartialUnit::of(largest * factor, factor);
      const float factor_to_units = factor * unit.inverse();
      const auto partial = PartialRow<Config>::at(params, work.partial_row(item.split_idx, num_rows, 1) + row);
      uint4* vec_gmem = partial.vec(consumer * (Shape::kNumColumns / 8) + quad_lane);
#pragma unroll
      for (int i = 0; i < Shape::kNumOutputs / 2; i += 8) {  // a lane's pairs of 32 columns
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          pairs[j] = pack_16bit<fp16>(at(rows.out, half, i + 2 * j) * factor_to_units,
                                      at(rows.out, half, i + 2 * j + 1) * factor_to_units);
        }
        vec_gmem[i / 2] = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
      if (consumer == 0 && Thread::leads_row()) *partial.stats() = {lse, unit.value()};
      continue;
    }
    const QueryRow query = work.query_row(group_size, item.q_tile * Shape::kBlockM + row);
    T* row_gmem = static_cast<T*>(params.out) + work.offset(query, params.out_token_stride, params.out_head_stride) +
                  consumer * Shape::kNumColumns + 8 * quad_lane;
#pragma unroll
    for (int i = 0; i < Shape::kNumOutputs / 2; i += 8) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        packed[j] = pack_16bit<T>(at(rows.out, half, i + 2 * j) * factor, at(rows.out, half, i + 2 * j + 1) * factor);
      }
      transpose_quad(packed);
      if (exists) {
        *reinterpret_cast<uint4*>(row_gmem + i * 4) = uint4{packed[0], packed[1], packed[2], packed[3]};
      }
    }
    if (exists && consumer == 0 && Thread::leads_row() && params.lse != nullptr) {
      params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse;
    }
  }
  // Then sums may be written again: nothing else in the way of a unit without keys would hold the other consumer back.
  named_barrier_sync(kBothConsumers, Shape::kNumConsumerThreads);
  if (is_split && fresh_thread_idx() == 0) {
    SplitCounter{params.counters + item.counter, uint32_t(item.num_splits)}.arrive();
  }
}

}  // namespace flashinfer::sm90::mla
