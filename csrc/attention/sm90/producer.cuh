// The warps of prefill on Hopper that bring in what the others compute on: queries by cp.async, since rows of a tile
// are (token, head) pairs at any distance, keys and values by TMA.
#pragma once

#include "attention/sm90/scheduler.cuh"
#include "attention/sm90/transpose.cuh"

namespace flashinfer::sm90 {

// How a warp copies rows of kHeadDim elements: kNumRows at a time, neighbouring lanes take neighbouring granules of
// one.
template <class T, int kHeadDim>
struct RowLanes {
  static constexpr int kGranuleLen = 16 / sizeof(T), kGranulesPerRow = kHeadDim / kGranuleLen,
                       kLanesPerRow = kGranulesPerRow % 16 == 0 ? 16 : 8;
  static constexpr int kNumRows = 32 / kLanesPerRow;
  const int row = fresh_thread_idx() % 32 / kLanesPerRow, granule = fresh_thread_idx() % kLanesPerRow;

  // Row `row` of a tile, num_rows high. One that does not exist becomes zeros.
  __device__ __forceinline__ void copy(uint32_t tile_smem, int num_rows, int row, const T* row_gmem,
                                       bool exists) const {
#pragma unroll
    for (int i = 0; i < kGranulesPerRow; i += kLanesPerRow) {
      cp_async_16(tile_smem + granule_offset(row, granule + i, num_rows), row_gmem + (granule + i) * kGranuleLen,
                  exists);
    }
  }
};

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
#pragma unroll 1
  for (int i = lanes.row; i < 32; i += Lanes::kNumRows) {
    const T* row_gmem = static_cast<const T*>(params.q) + __shfl_sync(0xffffffffu, offset, i);
    lanes.copy(rows_smem, Shape::kRowsPerConsumer, first % Shape::kRowsPerConsumer + i, row_gmem, first + i < num_rows);
  }
}

// The query tile of every unit, ahead of the consumers where there is room for two.
template <class Config>
struct QueryProducer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  // prepare(turn) ahead of the turn-th unit.
  template <class Prepare>
  __device__ __forceinline__ void run(const Prepare& prepare) const {
    const auto load = [&](const Work& work, uint32_t turn) {
      smem.q_empty.wait_empty(turn);
#pragma unroll 1
      for (int first = 0; first < Shape::kBlockM; first += 32) {
        copy_query_rows<Config>(params, smem, work, turn, first);
      }
      cp_async_commit();
      cp_async_wait<0>();
      fence_async_proxy();
      __syncwarp();
      if (elect_lane()) smem.q_full.at(turn).arrive();
    };
    for_each_unit(smem, load, prepare);
  }
};

// The tiles of K, of V or of both, of every unit, from the last to the first.
template <class Config, bool kSendsKeys, bool kSendsValues>
struct KvProducer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  // Rows [shift, shift + box_rows) of a page, of which the first num_valid exist.
  struct Box {
    int32_t page_idx, shift, num_valid;
  };

  __device__ __forceinline__ Box find_box(const PrefillItem& item, int tile, int row) const {
    const int kv_idx = tile * Shape::kBlockN + row;
    if constexpr (!kIsPaged) return {0, item.kv_begin + kv_idx, min(item.kv_len - kv_idx, Shape::kBlockN)};
    if (tile < item.tile_begin || row >= Shape::kBlockN) return {0, 0, 0};
    // Where all of a box is beyond the end, it brings the last row once, which nobody sees there: boxes without any row
    // to read were seen to fault, as the tensor starts before its memory.
    const KvView<Config::kKvStorage> view = {params.kv.index, item.kv_begin, item.kv_len};
    const KvRow found = view.locate(min(kv_idx, item.kv_len - 1));
    return {found.page_idx, found.entry_idx, max(min(item.kv_len - kv_idx, params.box_rows), 1)};
  }

  // Without pages a copy brings a whole tile of a panel's columns; of paged KV each lane has its box, whose page it
  // looks up a tile ahead.
  __device__ __forceinline__ void run() const {
    const int lane_idx = fresh_thread_idx() % 32, box_rows = kIsPaged ? params.box_rows : Shape::kBlockN;
    const int row = lane_idx * box_rows;
    uint32_t turn = 0;
    for_each_unit(smem, [&](const Work& work, uint32_t) {
      Box next = find_box(work.item, work.item.tile_end - 1, row);
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile, ++turn) {
        const Box box = next;
        next = find_box(work.item, tile - 1, row);
        const int stage = turn % Shape::kNumStages;
        if constexpr (kSendsKeys) {
          send<Shape::kQkPanels>(params.k_map, smem.k[stage], smem.k_full, smem.k_empty, turn, work, box, row,
                                 box_rows);
        }
        if constexpr (kSendsValues && Shape::kTransposesValues) {
          send<Shape::kVoPanels>(params.v_map, smem.value_rows.stages[stage], smem.rows_full, smem.rows_empty, turn,
                                 work, box, row, box_rows);
        } else if constexpr (kSendsValues) {
          send<Shape::kVoPanels>(params.v_map, smem.v[stage], smem.v_full, smem.v_empty, turn, work, box, row,
                                 box_rows);
        }
      }
    });
  }

  template <int kNumPanels, class Ring>
  __device__ __forceinline__ void send(const TensorMap& map, uint8_t* tile_smem, Ring& full, Ring& empty, uint32_t turn,
                                       const Work& work, const Box& box, int row, int box_rows) const {
    empty.wait_empty(turn);
    if (fresh_thread_idx() % 32 == 0) full.at(turn).arrive_expecting(kNumPanels * Shape::kBlockN * kPanelBytes);
    __syncwarp();
    if (row >= Shape::kBlockN) return;
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
      tma_load_5d(smem_address(tile_smem) + (panel * Shape::kBlockN + row) * kPanelBytes, map, full.at(turn),
                  panel * (kPanelBytes / 2), box_rows - box.num_valid, work.kv_head_idx, box.page_idx,
                  box.shift + box.num_valid);
    }
  }
};

// A unit is published before its queries are loaded: that needs room for them, as does the next unit.
template <class Config>
__device__ __forceinline__ void produce_schedule_and_queries(const Sm90PrefillParams& params, Smem<Config>& smem) {
  Scheduler<Config> scheduler{params, smem};
  QueryProducer<Config>{params, smem}.run([&](uint32_t turn) {
    if (fresh_thread_idx() % 32 == 0) scheduler.publish(turn);
    __syncwarp();
  });
  if (fresh_thread_idx() % 32 == 0) scheduler.close();
}

// The producers' warpgroup: a warp each for keys, values, queries and the schedule. Where values are transposed, two
// warps do that, and the others have two of these jobs each.
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
    Transposer<Config>{smem, warp_idx / 2}.run();
  } else if (warp_idx == 1) {
    KvProducer<Config, false, true>{params, smem}.run();
  } else if (elect_lane()) {
    Scheduler<Config>{params, smem}.run();
  }
}

}  // namespace flashinfer::sm90
