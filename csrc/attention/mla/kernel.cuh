// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention on mma.sync and cp.async, for every GPU from sm_80 up: what mla/params.h says.
//
// A persistent block an SM takes units off the planner's list: kBlockM rows, (token, head) pairs with the head
// innermost, against a run of KV tiles. Per tile S = Q Kᵀ, softmax, O += P V. The output of all rows lies in registers,
// 512 columns over eight warps; keys are values, and so are in shared memory once.
//
//   mla/units.cuh  which unit of work a block does next
//   mla/tile.cuh   geometry, shared memory, Q Kᵀ and P V
//   mla/load.cuh   how rows come in
//   mla/walk.cuh   the loop over KV tiles, and what happens to the scores in it
//   mla/merge.cuh  how splits of the KV are merged
//
// Barriers of all warps order a tile: one that its keys have come, one that its probabilities are there. A group of
// warps has its own in between, to add up parts of the scores.
#pragma once

#include "attention/mla/merge.cuh"
#include "attention/mla/units.cuh"
#include "attention/mla/walk.cuh"
#include "attention/prefill/output.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// Normalizes the warp's columns and writes them, and one lane a row the LSE, where they belong.
template <class Config>
__device__ __forceinline__ void finish_unit(MlaWalk<Config>& walk) {
  using Shape = MlaShape<Config>;
  using Out = typename Config::Out;
  const MlaParams& params = walk.params;
  MlaSmem<Config>& smem = walk.smem;
  const PrefillUnit& work = smem.work;
  const PrefillItem& item = work.item;
  const int num_rows = work.num_rows(smem.group_size.divisor, Shape::kBlockM);
  const bool is_split = item.num_splits > 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    walk.sum[half] += __shfl_xor_sync(0xffffffffu, walk.sum[half], 1);
    walk.sum[half] += __shfl_xor_sync(0xffffffffu, walk.sum[half], 2);
  }
  if (is_split) walk.find_largest();
  walk.share(walk.sum);

  const int thread_idx = thread_idx_after_loop(), lane_idx = thread_idx % 32, quad_lane = lane_idx % 4;
  const int first_column = thread_idx / 32 * Shape::kNumColumns + OutputPair<Shape>::lane_column(quad_lane);
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + row_of(half) + lane_row(lane_idx);
      if (row >= num_rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < MlaSplit<Config>::kNumParts; ++i) sum += smem.stats[i * Shape::kBlockM + row];
      const float factor = sum > 0.f ? __fdividef(params.v_scale, sum) : 0.f;
      const bool leads = thread_idx / 32 == 0 && quad_lane == 0;  // one lane a row
      // A row that saw no key: -inf - inf.
      const float lse = smem.max_of_row[row] * walk.scale_log2 + fast_log2(sum);
      const float factor_of_warp = factor * walk.unit;
      if (is_split) {
        const auto unit = PartialUnit::of(__uint_as_float(smem.largest_of_row[row]) * factor);
        const auto partial = PartialRow<Config>::at(params, work.partial_row(item.split_idx, num_rows, 1) + row);
        uint4* vec_gmem = partial.vec(thread_idx / 32 * (Shape::kNumColumns / 8) + quad_lane);
#pragma unroll
        for (int i = 0; i < Shape::kFragsD / 4; ++i) {
          uint32_t pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const auto place = OutputPair<Shape>::of(2 * i + j / 2, j % 2);
            pairs[j] = pack_16bit<fp16>(at(walk.out[m], half, place.idx[0]) * factor_of_warp * unit.inverse(),
                                        at(walk.out[m], half, place.idx[1]) * factor_of_warp * unit.inverse());
          }
          vec_gmem[4 * i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
        if (leads) *partial.stats() = {lse, unit.value()};
        continue;
      }
      const QueryRow query = work.query_row(smem.group_size, item.q_tile * Shape::kBlockM + row);
      Out* row_gmem = static_cast<Out*>(params.out) +
                      work.offset(query, params.out_token_stride, params.out_head_stride) + first_column;
#pragma unroll
      for (int pair = 0; pair < Shape::kFragsD; ++pair) {
        const auto place = OutputPair<Shape>::of(pair / 2, pair % 2);
        *reinterpret_cast<uint32_t*>(row_gmem + place.column) = pack_16bit<Out>(
            at(walk.out[m], half, place.idx[0]) * factor_of_warp, at(walk.out[m], half, place.idx[1]) * factor_of_warp);
      }
      if (leads && params.lse != nullptr) {
        params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse;
      }
    }
  }
  __syncthreads();  // all have left the unit
  if (is_split && fresh_thread_idx() == 0) {
    SplitCounter{params.counters + item.counter, uint32_t(item.num_splits)}.arrive();
  }
}

// Config: Q, Kv, Out, kHeadDimCkv, kHeadDimKpe, kHeadDimVo (the former), kKvStorage, kMask, and the tile: kBlockM,
// kBlockN, kNumStages, kKeepsQ, kNumThreads, kSmemBytes. Grid: as many blocks as the planner was told.
template <class Config>
__device__ void mla(const MlaParams& params) {
  using Shape = MlaShape<Config>;
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  static_assert(sizeof(MlaSmem<Config>) <= Config::kSmemBytes);
  auto& smem = *reinterpret_cast<MlaSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();
  allow_next_kernel();
  const LatentUnits units{params};
  if (fresh_thread_idx() == 0) {
    smem.has_next = units.claim(true, smem.next_work);
    smem.has_late = !smem.has_next;
  }
  if (fresh_thread_idx() == 32) smem.group_size = FastDivisor::of(params.num_qo_heads);
  while (true) {
    if (fresh_thread_idx() == 0) {
      smem.has_work = smem.has_next || (smem.has_late && units.steal(smem.next_work));
      smem.work = smem.next_work;
    }
    if (fresh_thread_idx() < Shape::kBlockM) {
      smem.max_of_row[fresh_thread_idx()] = kMinusInfinity;
      smem.largest_of_row[fresh_thread_idx()] = 0;
    }
    __syncthreads();
    if (!smem.has_work) break;
    const uint8_t* row_gmem = load_first_tiles_async(params, smem);
    if (fresh_thread_idx() < 32) {  // while they come in
      const uint32_t word = units.taken_of_lane();
      if (fresh_thread_idx() == 0) smem.has_next = units.claim(false, smem.next_work);
      const bool has_late = units.has_late(word);
      if (fresh_thread_idx() == 0) smem.has_late = !smem.has_next && has_late;
    }
    float out[Shape::kFragsM][Shape::kFragsD][4] = {};
    MlaWalk<Config> walk{params, smem, params.sm_scale * kLog2E, out};
    walk.run(row_gmem);
    cp_async_wait<0>();  // of a unit without keys, the queries
    finish_unit(walk);
  }
  if (fresh_thread_idx() == 0) units.close();
  constexpr int kPairDistance = OutputPair<Shape>::of(0, 1).column;
  merge_shares<Config, Shape::kNumThreads, kPairDistance>(params, smem, [] { __syncthreads(); });
}

}  // namespace flashinfer
