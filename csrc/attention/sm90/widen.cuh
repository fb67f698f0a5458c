// SPDX-License-Identifier: Apache-2.0
// 8-bit keys and values under 16-bit queries: brought in as they are, and widened on the way to where wgmma reads them.
//
// All warps of the producers do it, each for its part of the rows of every tile: TMA brings the part, the warp widens
// it, and sends for that of the next tile. The latter is under way while the warp is at the other half, keys or values.
#pragma once

#include "attention/sm90/producer.cuh"
#include "device/vec.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct Widener {
  using Shape = sm90::Shape<Config>;
  using View = KvView<Config::kKvStorage>;
  using Codec = KvCodec<typename Shape::T, typename Shape::Kv>;
  static constexpr int kRows = Shape::kRowsPerPart;
  const Sm90PrefillParams& params;
  Smem<Config>& smem;
  Box key_box = {}, value_box = {};  // that are sent for next: keys are a tile ahead
  TileGap<Smem<Config>::kHasGap> gap = {};

  __device__ __forceinline__ static int first_row() { return producer_warp_idx() * kRows; }
  __device__ __forceinline__ BoxLane<Config, kRows> lane() const { return {params, first_row()}; }

  __device__ __forceinline__ Box find(const Work& work, int tile) const {
    return lane().find(work.item, gap.key_tile(tile));
  }

  __device__ __forceinline__ void send_keys(const Work& work, const Box& box) const {
    send<Shape::kHeadDimQk>(params.k_map, params.kv.k, View::k_offset(params.kv, first_of(box), work.kv_head_idx),
                            smem_address(smem.key_rows.stages[0]), smem.key_part_full[producer_warp_idx()], work, box);
  }
  __device__ __forceinline__ void send_values(const Work& work, const Box& box) const {
    send<Shape::kHeadDimVo>(params.v_map, params.kv.v, View::v_offset(params.kv, first_of(box), work.kv_head_idx),
                            smem_address(smem.value_rows.stages[0]), smem.value_part_full[producer_warp_idx()], work,
                            box);
  }
  __device__ __forceinline__ static KvRow first_of(const Box& box) { return {box.page_idx, box.shift}; }

  // From boxes of small pages, a row each, every lane reports what it has copied.
  template <int kHeadDim>
  __device__ __forceinline__ void send(const TensorMap& map, const void* src, int64_t offset, uint32_t rows_smem,
                                       Mbarrier& full, const Work& work, const Box& box) const {
    if constexpr (Shape::kGathers) {
      using Kv = typename Shape::Kv;
      for_each_row<Kv, kHeadDim, kRows>(src, offset, [&](const auto& lanes, int i, const Kv* row_gmem) {
        lanes.copy(rows_smem + (first_row() + i) * kHeadDim, row_gmem);
      });
      cp_async_arrive(full);
    } else {
      lane().template send<1, kHeadDim>(map, rows_smem, full, work.kv_head_idx, box);
    }
  }

  __device__ __forceinline__ void begin(const Work& work, uint32_t turn) {
    if (work.item.tile_begin >= work.item.tile_end) return;
    const Box box = find(work, work.item.tile_end - 1);
    send_keys(work, box);
    send_values(work, box);
    key_box = find(work, work.item.tile_end - 2);
    if constexpr (Shape::kNumQueryStages == 1) bring_first_keys(work, turn);  // queries wait for the last unit's end
  }
  __device__ __forceinline__ void bring_first_keys(const Work& work, uint32_t turn) {
    bring_keys(work, work.item.tile_end - 1, turn);
    value_box = key_box;
    key_box = find(work, work.item.tile_end - 3);
  }

  __device__ __forceinline__ void bring(const Work& work, int tile, int, uint32_t turn) {
    if (Shape::kNumQueryStages > 1 && tile == work.item.tile_end - 1) bring_first_keys(work, turn);
    if (tile > work.item.tile_begin) bring_keys(work, tile - 1, turn + 1);
    smem.v_empty.wait_empty(turn);
    smem.value_part_full[producer_warp_idx()].wait(turn & 1);
    widen<Shape::kHeadDimVo>(smem_address(smem.value_rows.stages[0]), smem_address(smem.v[turn % Shape::kNumStages]));
    publish(smem.v_full.at(turn));
    if (tile > work.item.tile_begin) send_values(work, value_box);
    value_box = key_box;
    key_box = find(work, tile - 3);
  }

  __device__ __forceinline__ void bring_keys(const Work& work, int tile, uint32_t turn) const {
    smem.k_empty.wait_empty(turn);
    smem.key_part_full[producer_warp_idx()].wait(turn & 1);
    widen<Shape::kHeadDimQk>(smem_address(smem.key_rows.stages[0]), smem_address(smem.k[turn % Shape::kNumStages]));
    publish(smem.k_full.at(turn));
    if (tile > work.item.tile_begin) send_keys(work, key_box);
  }

  // The part is where consumers read it.
  __device__ __forceinline__ static void publish(Mbarrier& full) {
    fence_async_proxy();
    __syncwarp();
    if (elect_lane()) full.arrive();
  }

  // The part. Neighbouring lanes take eight neighbouring elements each, kBatch times before they widen any.
  template <int kHeadDim>
  __device__ __forceinline__ void widen(uint32_t rows_smem, uint32_t tile_smem) const {
    using Lanes = RowLanes<typename Shape::T, kHeadDim>;
    constexpr int kPerRow = Lanes::kGranulesPerRow / Lanes::kLanesPerRow, kNum = kRows / Lanes::kNumRows * kPerRow;
    constexpr int kBatch = kHeadDim <= 128 ? kNum : kNum / 2, kBatchRows = kBatch / kPerRow * Lanes::kNumRows;
    static_assert(kBatchRows % 8 == 0 && kBatch <= 16, "more would take more registers than producers have");
    const Lanes lanes;
    uint32_t from = rows_smem + (first_row() + lanes.row) * kHeadDim + lanes.granule * 8;
    uint32_t to = tile_smem + granule_offset(first_row() + lanes.row, lanes.granule, Shape::kBlockN);
    const auto row_of = [](int i) { return i / kPerRow * Lanes::kNumRows; };
    const auto granule_of = [](int i) { return i % kPerRow * Lanes::kLanesPerRow; };
#pragma unroll 1
    for (int row = 0; row < kRows; row += kBatchRows, from += kBatchRows * kHeadDim, to += kBatchRows * kPanelBytes) {
      uint2 x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = load_shared_8(from + row_of(i) * kHeadDim + granule_of(i) * 8);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        // Rows of a multiple of kNumRows have no bit in common with lanes.row: the swizzle is that of both.
        const uint32_t swizzled = (to ^ row_of(i) % 8 << 4) + row_of(i) * kPanelBytes;
        store_shared_16(swizzled + granule_offset(0, granule_of(i), Shape::kBlockN),
                        uint4{Codec::pair(x[i].x, kBytes01), Codec::pair(x[i].x, kBytes23),
                              Codec::pair(x[i].y, kBytes01), Codec::pair(x[i].y, kBytes23)});
      }
    }
  }
};

// By a consumer: its queries, which cp.async wrote, as operands of the type that keys are widened to.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void narrow_queries(Smem<Config>& smem, uint32_t turn) {
  using T = typename Shape::T;
  using Q = typename Shape::Q;
  if constexpr (!kSameType<T, Q>) {
    const uint32_t q_smem = smem_address(smem.q_of(turn, consumer_idx()));
#pragma unroll 2
    for (int i = fresh_thread_idx() % kWarpgroupSize * 16; i < Shape::kQBytes; i += kWarpgroupSize * 16) {
      const uint4 x = load_shared_16(q_smem + i);
      store_shared_16(q_smem + i, uint4{cast_16bit<T, Q>(x.x), cast_16bit<T, Q>(x.y), cast_16bit<T, Q>(x.z),
                                        cast_16bit<T, Q>(x.w)});
    }
    fence_async_proxy();
    named_barrier_sync(kConsumer + consumer_idx(), kWarpgroupSize);
  } else {
    fence_async_proxy();
  }
}

}  // namespace flashinfer::sm90
