// How prefill on Hopper brings in the KV of small pages: TMA's boxes would be a few rows each, so all warps of the
// producers' warpgroup copy 16 bytes a lane, each its part of the rows of every tile. One of them has the schedule too.
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
  static constexpr int kNumWarps = Shape::kNumGatherers / 32;
  static constexpr int kRows = Shape::kBlockN / kNumWarps;  // of a tile, for a warp: a lane looks up one
  static_assert(Shape::kBlockN % kNumWarps == 0 && kRows <= 32);

  const Sm90PrefillParams& params;
  Smem<Config>& smem;

  __device__ __forceinline__ static int warp_idx() { return fresh_thread_idx() % kWarpgroupSize / 32; }
  __device__ __forceinline__ static int kv_idx_of_lane(int tile) {
    return tile * Shape::kBlockN + warp_idx() * kRows + int(fresh_thread_idx() % 32);
  }

  // The page of this lane's row: a load whose result is needed a tile later.
  __device__ __forceinline__ int32_t look_up(const PrefillItem& item, int tile) const {
    const int kv_idx = kv_idx_of_lane(tile);
    if (tile < item.tile_begin || kv_idx >= item.kv_len) return 0;
    return View{params.kv.index, item.kv_begin, item.kv_len}.locate(kv_idx).page_idx;
  }

  // This warp's rows of a tile of keys or of values, whose offsets its lanes have found. Those at or after num_valid
  // become zeros.
  template <int kHeadDim>
  __device__ __forceinline__ void copy_rows(uint32_t tile_smem, const void* src, int64_t offset, int num_valid) const {
    using Lanes = RowLanes<T, kHeadDim>;
    static_assert(kRows % Lanes::kNumRows == 0);
    const Lanes lanes;
    const int first = warp_idx() * kRows;
#pragma unroll 4  // more would take more registers than producers have
    for (int i = lanes.row; i < kRows; i += Lanes::kNumRows) {
      const T* row_gmem = static_cast<const T*>(src) + __shfl_sync(0xffffffffu, offset, i);
      lanes.copy(tile_smem, Shape::kBlockN, first + i, row_gmem, first + i < num_valid);
    }
  }

  __device__ __forceinline__ void load_queries(const Work& work, uint32_t turn) const {
    smem.q_empty.wait_empty(turn);
#pragma unroll 1
    for (int first = warp_idx() * 32; first < Shape::kBlockM; first += kNumWarps * 32) {
      copy_query_rows<Config>(params, smem, work, turn, first);
    }
    cp_async_arrive(smem.q_full.at(turn));
  }

  __device__ __forceinline__ void load_tile(const Work& work, int tile, int32_t page_idx, uint32_t turn) const {
    const int num_valid = work.item.kv_len - tile * Shape::kBlockN, stage = turn % Shape::kNumStages;
    const FastDivisor& page_size = params.kv.index.page_size;
    const int kv_idx = kv_idx_of_lane(tile);
    const KvRow row = {page_idx, kv_idx - int32_t(page_size.divide(kv_idx) * page_size.divisor)};
    smem.k_empty.wait_empty(turn);
    copy_rows<Shape::kHeadDimQk>(smem_address(smem.k[stage]), params.kv.k,
                                 View::k_offset(params.kv, row, work.kv_head_idx), num_valid);
    cp_async_arrive(smem.k_full.at(turn));
    smem.v_empty.wait_empty(turn);
    copy_rows<Shape::kHeadDimVo>(smem_address(smem.v[stage]), params.kv.v,
                                 View::v_offset(params.kv, row, work.kv_head_idx), num_valid);
    cp_async_arrive(smem.v_full.at(turn));
  }

  __device__ __forceinline__ void run() const {
    Scheduler<Config> scheduler{params, smem};
    const auto prepare = [&](uint32_t turn) {
      if (warp_idx() == 0 && fresh_thread_idx() % 32 == 0) scheduler.publish(turn);
      __syncwarp();
    };
    uint32_t kv_turn = 0;
    const auto load = [&](const Work& work, uint32_t turn) {
      int32_t next = look_up(work.item, work.item.tile_end - 1);
      load_queries(work, turn);
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile, ++kv_turn) {
        const int32_t page_idx = next;
        next = look_up(work.item, tile - 1);
        load_tile(work, tile, page_idx, kv_turn);
      }
    };
    for_each_unit(smem, load, prepare);
    if (warp_idx() == 0 && fresh_thread_idx() % 32 == 0) scheduler.close();
    cp_async_wait_all();  // a block may not end with copies under way
  }
};

}  // namespace flashinfer::sm90
