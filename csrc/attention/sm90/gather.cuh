// SPDX-License-Identifier: Apache-2.0
// How prefill on Hopper brings in KV row by row: all warps of the producers' warpgroup copy 16 bytes a lane, each its
// part of the rows of every tile. One of them has the schedule too. So it is for small pages, where TMA's boxes would
// be a few rows each; and for short queries, whose KV, read once, come 3% faster from memory than in boxes.
//
// A copy reports to the full barrier when it has landed, so that no warp waits for its own. What cp.async writes is not
// yet visible to wgmma then: who waited for the barrier says fence_async_proxy().
#pragma once

#include "attention/sm90/producer.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct Gatherer {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  using View = KvView<Config::kKvStorage>;
  static constexpr int kRows = Shape::kRowsPerPart;  // of a tile: a lane looks up one
  static_assert(kRows * kNumProducerWarps == Shape::kBlockN && kRows <= 32);

  // What all tiles of a unit need.
  struct Unit {
    const T *k, *v;  // of the KV head
    int32_t kv_begin, kv_len, tile_begin;
  };

  const Sm90PrefillParams& params;
  Smem<Config>& smem;
  Unit unit = {};
  int32_t next_page = 0;  // of this lane's row
  TileGap<Smem<Config>::kHasGap> gap = {};

  __device__ __forceinline__ int kv_idx_of_lane(int tile) const {
    return gap.key_tile(tile) * Shape::kBlockN + producer_warp_idx() * kRows + int(fresh_thread_idx() % 32);
  }

  // The page of this lane's row: a load whose result is needed a tile later.
  __device__ __forceinline__ int32_t look_up(int tile) const {
    const int kv_idx = kv_idx_of_lane(tile);
    if (tile < unit.tile_begin || kv_idx >= unit.kv_len) return 0;
    return View{params.kv.index, unit.kv_begin, unit.kv_len}.locate(kv_idx).page_idx;
  }

  // This warp's rows of a tile of keys or of values, each of which one of its lanes has found: row_gmem. Those at or
  // after num_valid become zeros. Producers take issue slots from consumers, so that every instruction counts: a lane
  // copies from every fourth row, whose places in shared memory are at constant distances from two addresses.
  template <int kHeadDim, class Wait>
  __device__ __forceinline__ void copy_rows(uint8_t* tile, const T* row_gmem, int num_valid,
                                            const Wait& wait_for_room) const {
    constexpr int kGranulesPerPanel = kPanelBytes / 16, kStep = 32 / kGranulesPerPanel;  // rows at a time
    static_assert(kStep == 4 && kRows % kStep == 0);
    const int lane_idx = fresh_thread_idx() % 32, granule = lane_idx % kGranulesPerPanel;
    const int row = lane_idx / kGranulesPerPanel, tile_row = producer_warp_idx() * kRows + row;
    uint64_t* addresses_smem = smem.row_addresses.of_warp[producer_warp_idx()];
    if (lane_idx < kRows) addresses_smem[lane_idx] = reinterpret_cast<uint64_t>(row_gmem);
    __syncwarp();
    uint64_t addresses[kRows / kStep];
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) addresses[i] = addresses_smem[row + i * kStep];
    __syncwarp();
    const uint32_t lane_smem = smem_address(tile) + granule_offset(tile_row, granule, Shape::kBlockN);
    wait_for_room();
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const T* lane_gmem = reinterpret_cast<const T*>(addresses[i] + granule * 16);
      // Of rows four apart the swizzle differs in one bit.
      const uint32_t row_smem = (lane_smem ^ (i % 2 * kStep << 4)) + i * kStep * kPanelBytes;
#pragma unroll
      for (int panel = 0; panel < ceil_div(kHeadDim, Shape::kPanelColumns); ++panel) {
        const bool is_whole = (panel + 1) * Shape::kPanelColumns <= kHeadDim;  // else half of it
        cp_async_16(row_smem + panel * Shape::kBlockN * kPanelBytes, lane_gmem + panel * Shape::kPanelColumns,
                    i * kStep < num_valid - tile_row && (is_whole || granule < kGranulesPerPanel / 2));
      }
    }
  }

  __device__ __forceinline__ void begin(const Work& work, uint32_t) {
    const PrefillItem& item = work.item;
    unit = {static_cast<const T*>(params.kv.k) + work.kv_head_idx * params.kv.k_head_stride,
            static_cast<const T*>(params.kv.v) + work.kv_head_idx * params.kv.v_head_stride, item.kv_begin, item.kv_len,
            item.tile_begin};
    next_page = look_up(item.tile_end - 1);
  }

  __device__ __forceinline__ void bring(const Work&, int tile, int next_tile, uint32_t turn) {
    const int num_valid = unit.kv_len - gap.key_tile(tile) * Shape::kBlockN, stage = turn % Shape::kNumStages;
    const KvRow row = find_row(tile, next_tile);
    copy_keys(row, turn, num_valid);
    copy_rows<Shape::kHeadDimVo>(smem.v[stage], unit.v + View::v_offset(params.kv, row, 0), num_valid,
                                 [&] { smem.v_empty.wait_empty(turn); });
    cp_async_arrive(smem.v_full.at(turn));
  }

  // This lane's; the page of the next tile is looked up.
  __device__ __forceinline__ KvRow find_row(int tile, int next_tile) {
    const FastDivisor& page_size = params.kv.index.page_size;
    const int32_t page = next_page;
    next_page = look_up(next_tile);
    const int kv_idx = kv_idx_of_lane(tile);
    return {page, kv_idx - int32_t(page_size.divide(kv_idx) * page_size.divisor)};
  }

  __device__ __forceinline__ void copy_keys(const KvRow& row, uint32_t turn, int num_valid) const {
    copy_rows<Shape::kHeadDimQk>(smem.k[turn % Shape::kNumStages], unit.k + View::k_offset(params.kv, row, 0),
                                 num_valid, [&] { smem.k_empty.wait_empty(turn); });
    cp_async_arrive(smem.k_full.at(turn));
  }
};

// 8-bit values are transposed as well: a warp does so with the rows that it has copied, while those of the next tile
// are under way.
template <class Config>
struct TransposingGatherer : Gatherer<Config> {
  using Base = Gatherer<Config>;
  using Shape = sm90::Shape<Config>;
  static_assert(Shape::kNumStages >= 2, "rows of two tiles are there at a time");

  __device__ __forceinline__ void bring(const Work& work, int tile, int next_tile, uint32_t turn) {
    const int num_valid = this->unit.kv_len - this->gap.key_tile(tile) * Shape::kBlockN;
    const KvRow row = this->find_row(tile, next_tile);
    this->copy_keys(row, turn, num_valid);
    this->template copy_rows<Shape::kHeadDimVo>(this->smem.value_rows.stages[turn % Shape::kNumStages],
                                                this->unit.v + Base::View::v_offset(this->params.kv, row, 0), num_valid,
                                                [] {});
    cp_async_commit();
    if (tile < work.item.tile_end - 1) transpose<1>(turn - 1);
    if (tile == work.item.tile_begin) transpose<0>(turn);
  }

  // kNumPending: tiles whose copies are under way.
  template <int kNumPending>
  __device__ __forceinline__ void transpose(uint32_t turn) const {
    cp_async_wait<kNumPending>();
    __syncwarp();
    this->smem.v_empty.wait_empty(turn);
    Transposer<Config>{this->smem, 0, 1}.transpose(turn, producer_warp_idx() * Base::kRows, Base::kRows);
    fence_async_proxy();
    __syncwarp();
    if (elect_lane()) this->smem.v_full.at(turn).arrive();
  }
};

}  // namespace flashinfer::sm90
