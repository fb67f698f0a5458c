// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule on Hopper: the warps that bring in chunks, as far ahead as there are stages.
#pragma once

#include "device/pdl.cuh"
#include "gdn/sm90/tile.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GdnFeed {
  using Shape = GdnShape<Config>;
  using Smem = GdnSmem<Config>;
  // 64 elements of each row of a chunk: a panel. Of values there may be one, of queries none.
  using Panel = GdnRowStream<typename Config::T, GdnSquare, kGdnChunk, kGdnFeedThreads, 8>;

  const GdnPrefillParams& params;
  Smem& smem;
  const GdnUnit unit;
  const int thread_idx;

  // Before the block's barrier: of a transition the values are zero.
  __device__ __forceinline__ void clear_values() const {
    if (!unit.is_transition) return;
    for (auto& stage : smem.stages) {
      for (int i = thread_idx; i < int(sizeof(stage.v) / 16); i += kGdnFeedThreads) {
        reinterpret_cast<uint4*>(stage.v)[i] = uint4{};
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const auto panel = [&](const void* base, const GdnRowStrides& strides, int heads_per_row, int first_element) {
      return Panel(base, strides, unit.head / heads_per_row, first_element, unit.tokens, 0, thread_idx);
    };
    Panel k[2] = {panel(params.k, params.k_strides, params.heads_per_k, 0),
                  panel(params.k, params.k_strides, params.heads_per_k, 64)};
    Panel v[2] = {panel(params.v, params.v_strides, params.heads_per_v, unit.first_v),
                  panel(params.v, params.v_strides, params.heads_per_v, unit.first_v + 64)};
    Panel q[2] = {panel(params.q, params.q_strides, params.heads_per_q, 0),
                  panel(params.q, params.q_strides, params.heads_per_q, 64)};
    const GdnChunk* chunks = chunks_of(params, unit);
    // Else two kernels have begun since, and what it wrote is there (pdl.cuh), as all that the caller gave is.
    const bool is_behind_chunks = !Shape::kHasOutput || unit.segment == nullptr;
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const int stage_idx = chunk % Shape::kNumStages;
      auto& stage = smem.stages[stage_idx];
      smem.empty.wait_empty(chunk);
#pragma unroll
      for (int i = 0; i < 2; ++i) k[i].load_async(smem_address(stage.k[i]));
      if (!unit.is_transition) {
#pragma unroll
        for (int i = 0; i < GdnStages<Config>::kStateWarpgroups; ++i) v[i].load_async(smem_address(stage.v[i]));
      }
      if constexpr (Shape::kHasOutput) {
#pragma unroll
        for (int i = 0; i < 2; ++i) q[i].load_async(smem_address(smem.q[stage_idx][i]));
      }
      if (chunk == 0 && is_behind_chunks) wait_for_previous_kernel();
      load_chunk_async<kGdnFeedThreads>(stage.chunk, chunks, thread_idx);
      cp_async_arrive(smem.full.at(chunk));
      chunks += params.num_heads;
    }
    cp_async_wait_all();
  }
};

}  // namespace flashinfer::sm90
