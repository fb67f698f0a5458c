// How latent attention on Hopper brings in a cache of small pages, row by row: as attention/sm90/gather.cuh, by all
// warps of the producers' warpgroup.
#pragma once

#include "attention/sm90/mla/producer.cuh"

namespace flashinfer::sm90::mla {

// Of each half of the keys, a warp has 16 rows. A lane looks up one row, of the first half or of the second.
template <class Config>
struct KvGatherer {
  using Shape = mla::Shape<Config>;
  using T = typename Shape::T;
  const Sm90MlaParams& params;
  Smem<Config>& smem;
  int warp_idx;

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

  // The tiles of a unit, from the last to the first; kv_turn counts on.
  __device__ __forceinline__ void run(const PrefillItem& item, uint32_t& kv_turn) const {
    KvRow next = look_up(item, item.tile_end - 1);
    for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile, ++kv_turn) {
      const LatentKvParams& kv = params.kv;
      const int64_t ckv_offset = next.page_idx * kv.ckv_page_stride + next.entry_idx * kv.ckv_entry_stride;
      const int64_t kpe_offset = next.page_idx * kv.kpe_page_stride + next.entry_idx * kv.kpe_entry_stride;
      next = look_up(item, tile - 1);
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys) {
        const int num_valid = item.kv_len - tile * Shape::kBlockN - keys * Shape::kNumKeys;
        load_keys(keys, kv_turn, num_valid, of_keys(keys, ckv_offset), of_keys(keys, kpe_offset));
      }
    }
  }
  // To lane i, what lane i % 16 of a half has.
  __device__ __forceinline__ static int64_t of_keys(int keys, int64_t offset) {
    return __shfl_sync(0xffffffffu, offset, keys * 16 + fresh_thread_idx() % 16);
  }

  __device__ __forceinline__ void load_keys(int keys, uint32_t turn, int num_valid, int64_t ckv_offset,
                                            int64_t kpe_offset) const {
    constexpr int kColumns = Shape::kNumColumns;
    const uint32_t panels_smem = smem_address(smem.kv[turn % Shape::kNumStages][keys]);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      smem.kv_empty[keys][part].wait_empty(turn);
      copy_16_rows<T, kColumns>(panels_smem + part * Shape::kPanelsOfHalf * Shape::kPanelSize, 16 * warp_idx,
                                static_cast<const T*>(params.kv.ckv) + part * kColumns, ckv_offset, num_valid);
      cp_async_arrive(smem.kv_full[keys][part].at(turn));
    }
    if constexpr (Shape::kPePanels > 0) {
      copy_16_rows<T, Config::kHeadDimKpe>(panels_smem + Shape::kCkvPanels * Shape::kPanelSize, 16 * warp_idx,
                                           params.kv.kpe, kpe_offset, num_valid);
      cp_async_arrive(smem.kv_full[keys][kPositional].at(turn));
    }
  }
};

}  // namespace flashinfer::sm90::mla
