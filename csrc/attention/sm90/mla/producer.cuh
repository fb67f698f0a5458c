// SPDX-License-Identifier: Apache-2.0
// The warps of latent attention on Hopper that bring in what the others compute on: queries by cp.async, the cache by
// TMA.
#pragma once

#include "attention/sm90/mla/tile.cuh"
#include "attention/sm90/producer.cuh"

namespace flashinfer::sm90::mla {

// 16 rows of kHeadDim elements by a warp, the first of them row `first` of panels of 64 rows. Lane i has found the
// offset of row i % 16. Rows from num_rows on become zeros.
template <class T, int kHeadDim>
__device__ __forceinline__ void copy_16_rows(uint32_t panels_smem, int first, const void* src, int64_t offset,
                                             int num_rows) {
  using Lanes = RowLanes<T, kHeadDim>;
  const Lanes lanes;
  static_assert(8 % Lanes::kNumRows == 0 && Lanes::kLanesPerRow % 8 == 0);
  const uint32_t lane_smem = panels_smem + granule_offset(first + lanes.row, lanes.granule, 64);
  const T* lane_src = static_cast<const T*>(src) + lanes.granule * Lanes::kGranuleLen;
  const int num_left = num_rows - first - lanes.row;
#pragma unroll 4
  for (int row = 0; row < 16; row += Lanes::kNumRows) {
    const T* row_gmem = lane_src + __shfl_sync(0xffffffffu, offset, row + lanes.row);
    const uint32_t row_smem = (lane_smem ^ (row % 8 << 4)) + row * kPanelBytes;  // the swizzle of `first` is none
#pragma unroll
    for (int i = 0; i < Lanes::kGranulesPerRow; i += Lanes::kLanesPerRow) {
      cp_async_16(row_smem + i / 8 * (64 * kPanelBytes), row_gmem + i * Lanes::kGranuleLen, num_left > row);
    }
  }
}

// Brings in the query tile of a unit, its warp_idx-th part of it.
template <class Config, class Shape = mla::Shape<Config>>
__device__ __forceinline__ void load_queries(const Sm90MlaParams& params, Smem<Config>& smem, const Work& work,
                                             uint32_t turn, int warp_idx) {
  using T = typename Shape::T;
  const int num_rows = work.num_rows(smem.group_size.divisor, Shape::kBlockM);
  smem.q_empty.wait_empty(turn);
#pragma unroll 1
  for (int first = 16 * warp_idx; first < Shape::kBlockM; first += 16 * Shape::kNumQueryProducers) {
    const int row = work.item.q_tile * Shape::kBlockM + first + int(fresh_thread_idx() % 16);
    const QueryRow query = work.query_row(smem.group_size, row);
    copy_16_rows<T, Config::kHeadDimCkv>(smem_address(smem.q), first, params.q_nope,
                                         work.offset(query, params.q_nope_token_stride, params.q_nope_head_stride),
                                         num_rows);
    if constexpr (Shape::kPePanels > 0) {
      copy_16_rows<T, Config::kHeadDimKpe>(smem_address(smem.q[Shape::kCkvPanels]), first, params.q_pe,
                                           work.offset(query, params.q_pe_token_stride, params.q_pe_head_stride),
                                           num_rows);
    }
  }
  cp_async_arrive(smem.q_full.at(turn));
}

// The KV tiles of every unit, from the last to the first, by one warp: a lane a box.
template <class Config>
struct KvProducer {
  using Shape = mla::Shape<Config>;
  const Sm90MlaParams& params;
  Smem<Config>& smem;

  // Rows [shift, shift + box_rows) of a page, of which the first num_valid exist.
  struct Box {
    int32_t page_idx, shift, num_valid;
  };

  __device__ __forceinline__ Box find_box(const PrefillItem& item, int tile, int row) const {
    if (tile < item.tile_begin || row >= Shape::kBlockN) return {0, 0, 0};
    const int kv_idx = tile * Shape::kBlockN + row;
    // All of a box beyond the end: see attention/sm90/producer.cuh.
    const KvView<Config::kKvStorage> view = {params.kv.index, item.kv_begin, item.kv_len};
    const KvRow found = view.locate(min(kv_idx, item.kv_len - 1));
    return {found.page_idx, found.entry_idx, max(min(item.kv_len - kv_idx, params.box_rows), 1)};
  }

  // prepare(turn) ahead of the turn-th unit.
  template <class Prepare>
  __device__ __forceinline__ void run(const Prepare& prepare) const {
    const int row = fresh_thread_idx() % 32 * params.box_rows;
    uint32_t turn = 0;
    const auto send_unit = [&](const Work& work, uint32_t) {
      Box next = find_box(work.item, work.item.tile_end - 1, row);
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile, ++turn) {
        const Box box = next;
        next = find_box(work.item, tile - 1, row);
#pragma unroll 1
        for (int keys = 0; keys < 2; ++keys) send_keys(keys, turn, box, row);
      }
    };
    for_each_unit(smem, send_unit, prepare);
  }

  // A half of the tile's keys.
  __device__ __forceinline__ void send_keys(int keys, uint32_t turn, const Box& box, int row) const {
    smem.kv_empty[keys][0].wait_empty(turn);
    send<0, Shape::kPanelsOfHalf>(params.ckv_map, 0, keys, turn, box, row);
    smem.kv_empty[keys][1].wait_empty(turn);
    send<Shape::kPanelsOfHalf, Shape::kPanelsOfHalf>(params.ckv_map, 1, keys, turn, box, row);
    if constexpr (Shape::kPePanels > 0) send<Shape::kCkvPanels, 1>(params.kpe_map, kPositional, keys, turn, box, row);
  }
  template <int kFirst, int kNum>
  __device__ __forceinline__ void send(const TensorMap& map, int part, int keys, uint32_t turn, const Box& box,
                                       int row) const {
    Mbarrier& full = smem.kv_full[keys][part].at(turn);
    if (fresh_thread_idx() % 32 == 0) full.arrive_expecting(kNum * Shape::kPanelSize);
    __syncwarp();
    if (row / Shape::kNumKeys != keys) return;
    uint8_t* panels_smem = smem.kv[turn % Shape::kNumStages][keys][0];
#pragma unroll
    for (int panel = kFirst; panel < kFirst + kNum; ++panel) {
      tma_load_5d(smem_address(panels_smem) + panel * Shape::kPanelSize + row % Shape::kNumKeys * kPanelBytes, map,
                  full, panel % Shape::kCkvPanels * Shape::kPanelColumns, params.box_rows - box.num_valid, 0,
                  box.page_idx, box.shift + box.num_valid);
    }
  }
};

}  // namespace flashinfer::sm90::mla
