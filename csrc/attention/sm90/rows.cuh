// SPDX-License-Identifier: Apache-2.0
// How a warp of prefill on Hopper brings in rows: one by one by cp.async, or boxes of them by TMA.
#pragma once

#include "attention/sm90/tile.cuh"
#include "device/sm90/tma.cuh"

namespace flashinfer::sm90 {

// How a warp copies rows of kHeadDim elements: kNumRows at a time, neighbouring lanes take neighbouring granules of
// one.
template <class T, int kHeadDim>
struct RowLanes {
  static constexpr int kGranuleLen = 16 / sizeof(T), kGranulesPerRow = kHeadDim / kGranuleLen,
                       kLanesPerRow = kGranulesPerRow % 16 == 0  ? 16
                                      : kGranulesPerRow % 8 == 0 ? 8
                                                                 : 4;
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
  // A row as it is.
  __device__ __forceinline__ void copy(uint32_t row_smem, const T* row_gmem) const {
#pragma unroll
    for (int i = 0; i < kGranulesPerRow; i += kLanesPerRow) {
      cp_async_16(row_smem + (granule + i) * 16, row_gmem + (granule + i) * kGranuleLen, true);
    }
  }
};

// copy(lanes, i, row) for rows of a warp, at most one a lane, which has found the offset of its own in src.
template <class T, int kHeadDim, int kNumRows, class Copy>
__device__ __forceinline__ void for_each_row(const void* src, int64_t offset, const Copy& copy) {
  using Lanes = RowLanes<T, kHeadDim>;
  static_assert(kNumRows <= 32 && kNumRows % Lanes::kNumRows == 0);
  const Lanes lanes;
#pragma unroll 4  // more would take more registers than producers have
  for (int i = lanes.row; i < kNumRows; i += Lanes::kNumRows) {
    copy(lanes, i, static_cast<const T*>(src) + __shfl_sync(0xffffffffu, offset, i));
  }
}

// Rows [shift, shift + box_rows) of a page, of which the first num_valid exist: what one copy by TMA brings.
struct Box {
  int32_t page_idx, shift, num_valid;
};

// A lane of a warp that sends for rows [first_row, first_row + kNumRows) of tiles of KV: it has a box of them, or none.
// Without pages one box is all of these rows.
template <class Config, int kNumRows = Config::kBlockN>
struct BoxLane {
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;
  const Sm90PrefillParams& params;
  const int first_row = 0;
  const int box_rows = kIsPaged ? params.box_rows : kNumRows;
  const int row = int(fresh_thread_idx() % 32) * box_rows;  // of those

  __device__ __forceinline__ Box find(const PrefillItem& item, int tile) const {
    const int kv_idx = tile * Config::kBlockN + first_row + row;
    if constexpr (!kIsPaged && kNumRows == Config::kBlockN) {
      return {0, item.kv_begin + kv_idx, min(item.kv_len - kv_idx, Config::kBlockN)};
    }
    if (tile < item.tile_begin || row >= kNumRows) return {0, 0, 0};
    // Where all of a box is beyond the end, it brings the last row once, which nobody sees there: boxes without any row
    // to read were seen to fault, as the tensor starts before its memory.
    const KvView<Config::kKvStorage> view = {params.kv.index, item.kv_begin, item.kv_len};
    const KvRow found = view.locate(min(kv_idx, item.kv_len - 1));
    const int num_valid = max(min(item.kv_len - kv_idx, box_rows), 1);
    if constexpr (!kIsPaged) return {0, found.page_idx, num_valid};
    return {found.page_idx, found.entry_idx, num_valid};
  }

  // Sends for the rows, of kNumPanels panels of kRowBytes.
  template <int kNumPanels, int kRowBytes>
  __device__ __forceinline__ void send(const TensorMap& map, uint32_t tile_smem, Mbarrier& full, int32_t kv_head_idx,
                                       const Box& box) const {
    if (fresh_thread_idx() % 32 == 0) full.arrive_expecting(kNumPanels * kNumRows * kRowBytes);
    __syncwarp();
    if (row >= kNumRows) return;
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
      tma_load_5d(tile_smem + (panel * Config::kBlockN + first_row + row) * kRowBytes, map, full,
                  panel * (kRowBytes / 2), box_rows - box.num_valid, kv_head_idx, box.page_idx,
                  box.shift + box.num_valid);
    }
  }
};

}  // namespace flashinfer::sm90
