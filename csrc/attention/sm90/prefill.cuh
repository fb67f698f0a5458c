// SPDX-License-Identifier: Apache-2.0
// Attention of many query rows per request on Hopper (sm_90a): what attention/prefill/kernel.cuh computes, by its
// equations and on its shapes, with wgmma and TMA. FlashAttention-3 (Shah et al., 2024) is the model for its two
// overlaps.
//
// A persistent block an SM, whose warpgroups have roles. One brings in: a warp fetches units of work, a warp copies
// query rows, a warp each sends for tiles of K and of V. The others compute, 64 query rows each, so that tensor cores
// and exponentials overlap (walk.cuh). All that they pass on goes through rings in shared memory, with a full and an
// empty barrier a stage; a role runs ahead of the others, over the ends of units, as far as its rings reach.
//
//   scheduler.cuh  which unit of work is next (plan and list are those of attention/prefill)
//   proofs.cuh     which of its tiles a function is proved to hide, or to leave alone
//   producer.cuh   how queries, keys and values come in
//   rows.cuh       which copies bring rows
//   gather.cuh     the same row by row, where pages are small or queries short
//   widen.cuh      and where 8-bit keys and values have 16-bit queries
//   transpose.cuh  and 8-bit values, whose keys the tensor cores want side by side
//   consumer.cuh   the units of work
//   walk.cuh       the loop over KV tiles
//   softmax.cuh    what happens to the scores in between
//   output.cuh     the end of a unit: normalize, store, merge
//   tile.cuh       geometry, shared memory
#pragma once

#include "attention/sm90/consumer.cuh"
#include "attention/sm90/gather.cuh"
#include "attention/sm90/widen.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// Config: Q, Kv, Out, kHeadDimQk, kHeadDimVo, kKvStorage, kMask, kHasWindow, kHasSoftCap, kHasSinks, kPosEncoding,
// kHasDeviceScales, kGathersKv, kSharesKv, kIsMixed, and the tile: kBlockM, kBlockN, kNumStages, kNumQueryStages,
// kNumThreads, kSmemBytes. Grid: as many blocks as the planner was told; without a plan, any.
//
// Of a mixed batch (kIsMixed) decode has the requests of one query, in a launch behind this one that does not wait for
// it (decode/kernel.cuh). This one lets it in when its own blocks have started, and keeps as many SMs as the planner
// says; the others go to decode at once, and the rest as blocks of this one end.
template <class Config>
__device__ void prefill(const Sm90PrefillParams& params) {
  using Shape = sm90::Shape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(sm90::Smem<Config>) <= Config::kSmemBytes);
  auto& smem = *reinterpret_cast<sm90::Smem<Config>*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.init(params);
    if constexpr (!Shape::kGathers) {
      prefetch_tensor_map(params.k_map);
      prefetch_tensor_map(params.v_map);
    }
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  if constexpr (Config::kIsMixed) {
    if (blockIdx.x >= uint32_t(params.schedule->num_blocks)) return;
  }

  const int warpgroup_idx = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupSize, 0);
  if (warpgroup_idx == Shape::kNumConsumers) {
    if constexpr (Shape::kMovesRegisters) shrink_registers<Shape::kProducerRegisters>();
    if constexpr (Shape::kWidens) {
      sm90::produce_together<Config>(params, smem, sm90::Widener<Config>{params, smem});
    } else if constexpr (Shape::kGathers && Shape::kTransposesValues) {
      sm90::produce_together<Config>(params, smem, sm90::TransposingGatherer<Config>{{params, smem}});
    } else if constexpr (Shape::kGathers) {
      sm90::produce_together<Config>(params, smem, sm90::Gatherer<Config>{params, smem});
    } else {
      sm90::produce<Config>(params, smem);
    }
  } else {
    if constexpr (Shape::kMovesRegisters) grow_registers<Shape::kConsumerRegisters>();
    sm90::consume<Config>(params, smem);
  }
}

}  // namespace flashinfer
