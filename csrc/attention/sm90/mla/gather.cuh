// SPDX-License-Identifier: Apache-2.0
// How latent attention on Hopper brings in a cache of small pages, row by row: as attention/sm90/gather.cuh, by all
// warps of the producers' warpgroup.
#pragma once

#include "attention/sm90/mla/producer.cuh"

namespace flashinfer::sm90::mla {

// How a warp copies its 16 rows of a half of the keys: a lane has every fourth row, and 16 bytes of every 128. Their
// places are at constant distances from few addresses: what a producer computes, consumers wait for.
struct LaneOfRows {
  static constexpr int kNumRows = 4, kStep = 4;
  int row = fresh_thread_idx() % 32 / 8, granule = fresh_thread_idx() % 8;  // the first one

  // 16 bytes of a lane's i-th row, from `src`, of which lane j of every 16 has found the offset of row j.
  __device__ __forceinline__ const uint8_t* find(const void* src, int64_t offset, int keys, int i) const {
    return static_cast<const uint8_t*>(src) + __shfl_sync(0xffffffffu, offset, keys * 16 + row + i * kStep) +
           granule * 16;
  }
  // Where the i-th row of a warp is in a panel; place: of the first.
  __device__ __forceinline__ static uint32_t panel_row(uint32_t place, int i) {
    static_assert(kStep == 4);  // then the swizzle differs in one bit
    return (place ^ (i % 2 * kStep << 4)) + i * kStep * kPanelBytes;
  }
};

// Of each half of the keys, a warp has 16 rows. A lane looks up one row, of the first half or of the second.
template <class Config>
struct KvGatherer {
  using Shape = mla::Shape<Config>;
  const Sm90MlaParams& params;
  Smem<Config>& smem;
  int warp_idx;

  // The rows of a tile, of which each lane has found one: bytes from the start of either part of the cache.
  struct Rows {
    int64_t ckv_offset, kpe_offset;
    int num_valid;  // from this warp's first on
  };

  __device__ __forceinline__ int kv_idx_of_lane(int tile) const {
    const int lane_idx = fresh_thread_idx() % 32;
    return tile * Shape::kBlockN + lane_idx / 16 * Shape::kNumKeys + 16 * warp_idx + lane_idx % 16;
  }
  // The row of this lane: a load whose result is needed a tile later.
  __device__ __forceinline__ KvRow look_up(const PrefillItem& item, int tile) const {
    const int kv_idx = kv_idx_of_lane(tile);
    if (tile < item.tile_begin || kv_idx >= item.kv_len) return {0, 0};
    return KvView<Config::kKvStorage>{params.kv.index, item.kv_begin, item.kv_len}.locate(kv_idx);
  }
  __device__ __forceinline__ Rows rows_of(const KvRow& row, const PrefillItem& item, int tile) const {
    const LatentKvParams& kv = params.kv;
    const int64_t ckv = row.page_idx * kv.ckv_page_stride + row.entry_idx * kv.ckv_entry_stride;
    const int64_t kpe = row.page_idx * kv.kpe_page_stride + row.entry_idx * kv.kpe_entry_stride;
    return {ckv * int(sizeof(typename Config::Kv)), kpe * int(sizeof(typename Config::Kpe)),
            item.kv_len - tile * Shape::kBlockN - 16 * warp_idx};
  }

  // The tiles of a unit, from the last to the first; kv_turn counts on.
  __device__ __forceinline__ void run(const PrefillItem& item, uint32_t& kv_turn) const {
    KvRow found = look_up(item, item.tile_end - 1);
    for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile, ++kv_turn) {
      const Rows rows = rows_of(found, item, tile);
      found = look_up(item, tile - 1);
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys) load_keys(keys, kv_turn, rows);
    }
  }

  __device__ __forceinline__ void load_keys(int keys, uint32_t turn, const Rows& rows) const {
    const LaneOfRows lane;
    const uint8_t* row_gmem[LaneOfRows::kNumRows];
#pragma unroll
    for (int i = 0; i < LaneOfRows::kNumRows; ++i) row_gmem[i] = lane.find(params.kv.ckv, rows.ckv_offset, keys, i);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      smem.kv_empty[keys][part].wait_empty(turn);
      copy_panels<Shape::kPanelsOfHalf>(keys, turn, part * Shape::kPanelsOfHalf, row_gmem, part, rows);
      cp_async_arrive(smem.kv_full[keys][part].at(turn));
    }
    if constexpr (Shape::kPePanels > 0) {
      copy_kpe(keys, turn, rows);
      cp_async_arrive(smem.kv_full[keys][kPositional].at(turn));
    }
  }
  __device__ __forceinline__ void copy_kpe(int keys, uint32_t turn, const Rows& rows) const {
    const LaneOfRows lane;
    const uint8_t* row_gmem[LaneOfRows::kNumRows];
#pragma unroll
    for (int i = 0; i < LaneOfRows::kNumRows; ++i) row_gmem[i] = lane.find(params.kv.kpe, rows.kpe_offset, keys, i);
    copy_panels<1>(keys, turn, Shape::kCkvPanels, row_gmem, 0, rows);
  }

 private:
  // kNum panels from `first` on, of columns from the part-th kNum of rows on.
  template <int kNum>
  __device__ __forceinline__ void copy_panels(int keys, uint32_t turn, int first,
                                              const uint8_t* const (&row_gmem)[LaneOfRows::kNumRows], int part,
                                              const Rows& rows) const {
    const LaneOfRows lane;
    const uint32_t panels_smem = smem_address(smem.kv[turn % Shape::kNumStages][keys][first]);
    const uint32_t lane_smem = panels_smem + granule_offset(16 * warp_idx + lane.row, lane.granule, Shape::kNumKeys);
    const int num_left = rows.num_valid - keys * Shape::kNumKeys - lane.row;
#pragma unroll
    for (int i = 0; i < LaneOfRows::kNumRows; ++i) {
      const uint32_t row_smem = LaneOfRows::panel_row(lane_smem, i);
#pragma unroll
      for (int panel = 0; panel < kNum; ++panel) {
        cp_async_16(row_smem + panel * Shape::kPanelSize, row_gmem[i] + (part * kNum + panel) * kPanelBytes,
                    num_left > i * LaneOfRows::kStep);
      }
    }
  }
};

}  // namespace flashinfer::sm90::mla
