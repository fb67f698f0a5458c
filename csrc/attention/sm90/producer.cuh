// SPDX-License-Identifier: Apache-2.0
// The warps of prefill on Hopper that bring in what the others compute on: queries by cp.async, since rows of a tile
// are (token, head) pairs at any distance, keys and values by TMA.
#pragma once

#include "attention/sm90/rows.cuh"
#include "attention/sm90/scheduler.cuh"
#include "attention/sm90/transpose.cuh"

namespace flashinfer::sm90 {

// Rows [first, first + 32) of a unit's query tile, by a warp. Rows that do not exist become zeros.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void copy_query_rows(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work,
                                                uint32_t turn, int first) {
  using T = typename Shape::T;
  using Lanes = RowLanes<T, Shape::kHeadDimQk>;
  const Lanes lanes;
  const FastDivisor group_size = smem.group_size;
  const int num_rows = work.num_rows(group_size.divisor, Shape::kBlockM);
  const int row = work.item.q_tile * Shape::kBlockM + first + int(fresh_thread_idx() % 32);
  const int64_t offset = work.offset(work.query_row(group_size, row), params.q_token_stride, params.q_head_stride);
  const uint32_t rows_smem = smem_address(smem.q_of(turn, first / Shape::kRowsPerConsumer));
  // Where consumers wait for them, as many at a time as the registers of a warp that does nothing else allow.
  constexpr int kUnroll = Shape::kReleasesQueriesEarly && !Shape::kTogether ? 2 : 1;
#pragma unroll kUnroll
  for (int i = lanes.row; i < 32; i += Lanes::kNumRows) {
    const T* row_gmem = static_cast<const T*>(params.q) + __shfl_sync(0xffffffffu, offset, i);
    lanes.copy(rows_smem, Shape::kRowsPerConsumer, first % Shape::kRowsPerConsumer + i, row_gmem, first + i < num_rows);
  }
}

// The queries of every unit, consumer by consumer, or of every kNumQueryWarps-th consumer, ahead of them where there is
// room for two units. Each consumer has barriers of its own, as it comes to the end of a unit a turn after another.
template <class Config>
struct QueryProducer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;
  const int part = 0;

  // prepare(turn) ahead of the turn-th unit.
  template <class Prepare>
  __device__ __forceinline__ void run(const Prepare& prepare) const {
    const auto load = [&](const Work& work, uint32_t turn) {
      const auto pass_on = [&](int consumer) {
        fence_async_proxy();
        __syncwarp();
        if (elect_lane()) smem.q_full[consumer].at(turn).arrive();
      };
#pragma unroll 1
      for (int consumer = part; consumer < Shape::kNumConsumers; consumer += Shape::kNumQueryWarps) {
        smem.q_empty[consumer].wait_empty(turn);
#pragma unroll 1
        for (int first = 0; first < Shape::kRowsPerConsumer; first += 32) {
          copy_query_rows<Config>(params, smem, work, turn, consumer * Shape::kRowsPerConsumer + first);
        }
        cp_async_commit();
        if (consumer >= Shape::kNumQueryWarps) {
          cp_async_wait<1>();
          pass_on(consumer - Shape::kNumQueryWarps);
        }
        if (consumer + Shape::kNumQueryWarps >= Shape::kNumConsumers) {
          cp_async_wait<0>();
          pass_on(consumer);
        }
      }
    };
    for_each_unit(smem, load, prepare);
  }
};

// The tiles of K, of V or of both, of every unit, from the last to the first.
template <class Config, bool kSendsKeys, bool kSendsValues>
struct KvProducer {
  using Shape = sm90::Shape<Config>;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  // A page is looked up a tile ahead.
  __device__ __forceinline__ void run() const {
    const BoxLane<Config> lane{params};
    uint32_t turn = 0;
    for_each_unit(smem, [&](const Work& work, uint32_t unit_turn) {
      const auto gap = smem.gap_of(unit_turn);
      Box next = lane.find(work.item, gap.key_tile(work.item.tile_end - 1));
      for (int tile = work.item.tile_end - 1, next_tile; tile >= work.item.tile_begin; tile = next_tile, ++turn) {
        const Box box = next;
        next_tile = smem.tile_below(unit_turn, tile);
        next = lane.find(work.item, gap.key_tile(next_tile));
        const int stage = turn % Shape::kNumStages;
        if constexpr (kSendsKeys) {
          send<Shape::kQkPanels>(lane, params.k_map, smem.k[stage], smem.k_full, smem.k_empty, turn, work, box);
        }
        if constexpr (kSendsValues && Shape::kTransposesValues) {
          send<Shape::kVoPanels>(lane, params.v_map, smem.value_rows.stages[stage], smem.rows_full, smem.rows_empty,
                                 turn, work, box);
        } else if constexpr (kSendsValues) {
          send<Shape::kVoPanels>(lane, params.v_map, smem.v[stage], smem.v_full, smem.v_empty, turn, work, box);
        }
      }
    });
  }

  template <int kNumPanels, class Ring>
  __device__ __forceinline__ static void send(const BoxLane<Config>& lane, const TensorMap& map, uint8_t* tile_smem,
                                              Ring& full, Ring& empty, uint32_t turn, const Work& work,
                                              const Box& box) {
    empty.wait_empty(turn);
    lane.template send<kNumPanels, kPanelBytes>(map, smem_address(tile_smem), full.at(turn), work.kv_head_idx, box);
  }
};

// A unit is published before its queries are loaded: that needs room for them, as does the next unit.
template <class Config>
__device__ __forceinline__ void produce_schedule_and_queries(const Sm90PrefillParams& params, Smem<Config>& smem,
                                                             int part = 0) {
  Scheduler<Config> scheduler{params, smem};
  QueryProducer<Config>{params, smem, part}.run([&](uint32_t turn) {
    if (scheduler.has(fresh_thread_idx() % 32)) scheduler.publish(turn);
    __syncwarp();
  });
  if (fresh_thread_idx() % 32 == 0) scheduler.close();
}

// The producers' warpgroup: a warp each for keys, values, queries and the schedule, or for queries and the other half
// of them and the schedule. Where values are transposed, two warps do that, and the others have two of these jobs each.
template <class Config>
__device__ __forceinline__ void produce(const Sm90PrefillParams& params, Smem<Config>& smem) {
  constexpr bool kTransposesValues = Shape<Config>::kTransposesValues;
  const int warp_idx = fresh_thread_idx() % kWarpgroupSize / 32;
  if (warp_idx == 0) {
    KvProducer<Config, true, kTransposesValues>{params, smem}.run();
  } else if (warp_idx == 2) {
    if constexpr (kTransposesValues) {
      produce_schedule_and_queries(params, smem);
    } else {
      QueryProducer<Config>{params, smem}.run([](uint32_t) {});
    }
  } else if constexpr (kTransposesValues) {
    Transposer<Config>{smem, warp_idx / 2, Shape<Config>::kNumTransposers}.run();
  } else if (warp_idx == 1) {
    KvProducer<Config, false, true>{params, smem}.run();
  } else if constexpr (Shape<Config>::kNumQueryWarps > 1) {
    produce_schedule_and_queries(params, smem, 1);
  } else if (Smem<Config>::kProvesTiles || elect_lane()) {
    Scheduler<Config>{params, smem}.run();
  }
}

__device__ __forceinline__ int producer_warp_idx() {
  return fresh_thread_idx() % kWarpgroupSize / 32;
}

// The same where tiles of KV take all of these warps: each brings in a part of everything, and one of them has the
// schedule too. Of kv: begin(work, turn) ahead of a unit's tiles, bring(work, tile, next_tile, turn) from the last to
// the first.
template <class Config, class Kv>
__device__ __forceinline__ void produce_together(const Sm90PrefillParams& params, Smem<Config>& smem, Kv&& kv) {
  Scheduler<Config> scheduler{params, smem};
  const auto prepare = [&](uint32_t turn) {
    if (scheduler.has(fresh_thread_idx() % kWarpgroupSize)) scheduler.publish(turn);
    __syncwarp();
  };
  uint32_t kv_turn = 0;
  const auto load = [&](const Work& work, uint32_t turn) {
    const int32_t tile_begin = work.item.tile_begin;
    kv.gap = smem.gap_of(turn);
    kv.begin(work, kv_turn);
#pragma unroll 1
    for (int consumer = 0; consumer < Shape<Config>::kNumConsumers; ++consumer) smem.q_empty[consumer].wait_empty(turn);
#pragma unroll 1
    for (int first = producer_warp_idx() * 32; first < Shape<Config>::kBlockM; first += kNumProducerWarps * 32) {
      copy_query_rows<Config>(params, smem, work, turn, first);
    }
#pragma unroll 1
    for (int consumer = 0; consumer < Shape<Config>::kNumConsumers; ++consumer) {
      cp_async_arrive(smem.q_full[consumer].at(turn));
    }
    for (int tile = work.item.tile_end - 1, next_tile; tile >= tile_begin; tile = next_tile, ++kv_turn) {
      next_tile = smem.tile_below(turn, tile);
      kv.bring(work, tile, next_tile, kv_turn);
    }
  };
  for_each_unit(smem, load, prepare);
  if (fresh_thread_idx() % kWarpgroupSize == 0) scheduler.close();
  cp_async_wait_all();  // a block may not end with copies under way
}

}  // namespace flashinfer::sm90
