// The warps of prefill on Hopper that bring in what the others compute on: queries by cp.async, since rows of a tile
// are (token, head) pairs at any distance, keys and values by TMA.
#pragma once

#include "attention/sm90/scheduler.cuh"

namespace flashinfer::sm90 {

// How a warp copies rows of kHeadDim elements: kNumRows at a time, neighbouring lanes take neighbouring granules of
// one.
template <int kHeadDim>
struct RowLanes {
  static constexpr int kGranulesPerRow = kHeadDim / 8, kLanesPerRow = kGranulesPerRow % 16 == 0 ? 16 : 8;
  static constexpr int kNumRows = 32 / kLanesPerRow;
  const int row = fresh_thread_idx() % 32 / kLanesPerRow, granule = fresh_thread_idx() % kLanesPerRow;

  // Row `row` of a tile, num_rows high. One that does not exist becomes zeros.
  template <class T>
  __device__ __forceinline__ void copy(uint32_t tile_smem, int num_rows, int row, const T* row_gmem,
                                       bool exists) const {
#pragma unroll
    for (int i = 0; i < kGranulesPerRow; i += kLanesPerRow) {
      cp_async_16(tile_smem + granule_offset(row, granule + i, num_rows), row_gmem + (granule + i) * 8, exists);
    }
  }
};

// The query tile of every unit, ahead of the consumers where there is room for two.
template <class Config>
struct QueryProducer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  __device__ __forceinline__ void run() const {
    using Lanes = RowLanes<Shape::kHeadDimQk>;
    const Lanes lanes;
    for_each_unit(smem, [&](const Work& work, uint32_t turn) {
      const FastDivisor group_size = smem.group_size;
      const int num_rows = work.num_rows(group_size.divisor, Shape::kBlockM);
      smem.q_empty.wait_empty(turn);
#pragma unroll 1
      for (int first = 0; first < Shape::kBlockM; first += 32) {
        const int row = work.item.q_tile * Shape::kBlockM + first + int(fresh_thread_idx() % 32);
        const int64_t offset =
            work.offset(work.query_row(group_size, row), params.q_token_stride, params.q_head_stride);
        const uint32_t rows_smem = smem_address(smem.q_of(turn, first / Shape::kRowsPerConsumer));
#pragma unroll 1
        for (int i = lanes.row; i < 32; i += Lanes::kNumRows) {
          const T* row_gmem = static_cast<const T*>(params.q) + __shfl_sync(0xffffffffu, offset, i);
          lanes.copy(rows_smem, Shape::kRowsPerConsumer, first % Shape::kRowsPerConsumer + i, row_gmem,
                     first + i < num_rows);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();
      fence_async_proxy();
      __syncwarp();
      if (elect_lane()) smem.q_full.at(turn).arrive();
    });
  }
};

// The tiles of K (or V) of every unit, from the last to the first.
template <class Config, bool kIsKeys>
struct KvProducer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;
  static constexpr int kHeadDim = kIsKeys ? Shape::kHeadDimQk : Shape::kHeadDimVo;
  static constexpr int kNumPanels = kHeadDim / Shape::kPanelColumns;
  static constexpr int kTileBytes = Shape::kBlockN * kHeadDim * 2;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  __device__ __forceinline__ auto& full() const { return kIsKeys ? smem.k_full : smem.v_full; }
  __device__ __forceinline__ auto& empty() const { return kIsKeys ? smem.k_empty : smem.v_empty; }
  __device__ __forceinline__ uint32_t tile_smem(uint32_t turn) const {
    const int stage = turn % Shape::kNumStages;
    return smem_address(kIsKeys ? smem.k[stage] : smem.v[stage]);
  }

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

  // Without pages a copy brings a whole tile of 64 columns; of paged KV each lane has its box, whose page it looks up a
  // tile ahead.
  __device__ __forceinline__ void run() const {
    const TensorMap& map = kIsKeys ? params.k_map : params.v_map;
    const int lane_idx = fresh_thread_idx() % 32, box_rows = kIsPaged ? params.box_rows : Shape::kBlockN;
    const int row = lane_idx * box_rows;
    uint32_t turn = 0;
    for_each_unit(smem, [&](const Work& work, uint32_t) {
      Box next = find_box(work.item, work.item.tile_end - 1, row);
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile, ++turn) {
        const Box box = next;
        next = find_box(work.item, tile - 1, row);
        empty().wait_empty(turn);
        if (lane_idx == 0) full().at(turn).arrive_expecting(kTileBytes);
        __syncwarp();
        if (row >= Shape::kBlockN) continue;
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
          tma_load_5d(tile_smem(turn) + (panel * Shape::kBlockN + row) * kPanelBytes, map, full().at(turn),
                      panel * Shape::kPanelColumns, box_rows - box.num_valid, work.kv_head_idx, box.page_idx,
                      box.shift + box.num_valid);
        }
      }
    });
  }
};

// The producers' warpgroup: a warp each for keys, values, queries and the schedule.
template <class Config>
__device__ __forceinline__ void produce(const Sm90PrefillParams& params, Smem<Config>& smem) {
  const int warp_idx = fresh_thread_idx() % kWarpgroupSize / 32;
  if (warp_idx == 0) {
    KvProducer<Config, true>{params, smem}.run();
  } else if (warp_idx == 1) {
    KvProducer<Config, false>{params, smem}.run();
  } else if (warp_idx == 2) {
    QueryProducer<Config>{params, smem}.run();
  } else if (elect_lane()) {
    Scheduler<Config>{params, smem}.run();
  }
}

}  // namespace flashinfer::sm90
