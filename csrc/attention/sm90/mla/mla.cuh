// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention on Hopper (sm_90a): what attention/mla/params.h says, with wgmma and TMA.
//
// A persistent block an SM takes units off the planner's list: 64 rows, (token, head) pairs with the head innermost,
// against a run of KV tiles. Two warpgroups compute and share the output's columns (walk.cuh), a third brings in
// queries and the cache. All that is passed on goes through rings in shared memory, as in attention/sm90/prefill.cuh.
//
//   producer.cuh  how queries and the cache come in
//   gather.cuh    the same where pages are small
//   widen.cuh     the same where the cache is of fp8
//   walk.cuh      the loop over KV tiles
//   output.cuh    the end of a unit: normalize, store, merge
//   tile.cuh      geometry, shared memory
#pragma once

#include "attention/mla/units.cuh"
#include "attention/sm90/mla/output.cuh"
#include "attention/sm90/mla/widen.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

namespace sm90::mla {

// By a warp.
template <class Config>
__device__ __forceinline__ void publish(const LatentUnits& units, Smem<Config>& smem, uint32_t turn) {
  smem.work_empty.wait_empty(turn);
  Work& work = smem.work[turn % kNumWorkSlots];
  const bool is_leader = fresh_thread_idx() % 32 == 0;
  bool is_found = __any_sync(0xffffffffu, is_leader && units.claim(turn == 0, work));
  while (!is_found && units.has_late(units.taken_of_lane())) {
    if (!smem.work_empty.is_empty(turn + kNumWorkSlots - 1)) continue;  // the unit before is not done yet
    is_found = __any_sync(0xffffffffu, is_leader && units.steal(work));
  }
  if (is_leader) {
    work.is_end = !is_found;
    smem.work_full.at(turn).arrive();
  }
  __syncwarp();
}

// A warp has the cache, unless it is gathered by all; the others have the queries. One that brings in the cache has the
// schedule too: it takes a unit when the last keys of that before are under way, so that nothing waits for it, and a
// block that is at a long unit does not take from the others.
template <class Config>
__device__ __forceinline__ void produce(const Sm90MlaParams& params, Smem<Config>& smem) {
  using Shape = mla::Shape<Config>;
  constexpr int kScheduler = Shape::kGathers ? 0 : Shape::kNumQueryProducers;
  const int warp_idx = fresh_thread_idx() % kWarpgroupSize / 32;
  const LatentUnits units{params};
  const auto prepare = [&](uint32_t turn) {
    if (warp_idx == kScheduler) publish(units, smem, turn);
  };
  uint32_t kv_turn = 0;
  const auto load = [&](const Work& work, uint32_t turn) {
    load_queries<Config>(params, smem, work, turn, warp_idx);
    if constexpr (Shape::kWidens) {
      KvWidener<Config>{params, smem, warp_idx}.run(work.item, kv_turn);
    } else if constexpr (Shape::kGathers) {
      KvGatherer<Config>{params, smem, warp_idx}.run(work.item, kv_turn);
    }
  };
  if constexpr (Shape::kGathers) {
    for_each_unit(smem, load, prepare);
  } else if (warp_idx == kScheduler) {
    KvProducer<Config>{params, smem}.run(prepare);
  } else {
    for_each_unit(smem, load);
  }
  if (warp_idx == kScheduler && fresh_thread_idx() % 32 == 0) units.close();
  cp_async_wait_all();  // a block may not end with copies under way
}

template <class Config>
__device__ __forceinline__ void consume(const Sm90MlaParams& params, Smem<Config>& smem, int consumer) {
  uint32_t kv_turn = 0;  // KV tiles so far
  for_each_unit(smem, [&](const Work& work, uint32_t turn) {
    RowStates<Config> rows;
    smem.await(smem.q_full, turn);
    cast_queries(smem);
    TileWalk<Config>{{}, params, smem, work, consumer, params.sm_scale * kLog2E, rows}.run(kv_turn);
    __syncwarp();
    if (elect_lane()) smem.q_empty.at(turn).arrive();
    finish_unit(params, smem, work, rows, consumer);
  });
}

}  // namespace sm90::mla

// Config: Q, Kv (that, or fp8 with kGathersKv), Out, kHeadDimCkv, kHeadDimKpe, kHeadDimVo (the former), kKvStorage,
// kMask, kGathersKv, and the tile: kBlockM, kBlockN, kNumStages, kNumThreads, kSmemBytes. Grid: as many blocks as the
// planner was told.
template <class Config>
__device__ void mla(const Sm90MlaParams& params) {
  using Shape = sm90::mla::Shape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(sm90::mla::Smem<Config>) <= Config::kSmemBytes);
  auto& smem = *reinterpret_cast<sm90::mla::Smem<Config>*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.init(params);
    if constexpr (!Shape::kGathers) {
      prefetch_tensor_map(params.ckv_map);
      if constexpr (Shape::kPePanels > 0) prefetch_tensor_map(params.kpe_map);
    }
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();  // whose blocks find room as these end: registers are all in use

  const int warpgroup_idx = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupSize, 0);
  if (warpgroup_idx == Shape::kNumConsumers) {
    shrink_registers<Shape::kProducerRegisters>();
    sm90::mla::produce<Config>(params, smem);
    return;
  }
  grow_registers<Shape::kConsumerRegisters>();
  sm90::mla::consume<Config>(params, smem, warpgroup_idx);
  constexpr int kNumThreads = Shape::kNumConsumerThreads;
  const auto sync = [] { named_barrier_sync(sm90::mla::kBothConsumers, kNumThreads); };
  merge_shares<Config, kNumThreads, 8>(params, smem, sync);
}

}  // namespace flashinfer
