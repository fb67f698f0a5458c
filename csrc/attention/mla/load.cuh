// SPDX-License-Identifier: Apache-2.0
// How queries and the cache come in: rows of two parts, each a copy into a swizzled tile of its own.
#pragma once

#include "attention/mla/tile.cuh"

namespace flashinfer {

// Copies kNumRows rows of two parts, by all threads. The addresses of the rows that a warp copies are found by its
// lanes, one each: those of the first part by lanes 0 to 7 of every 16, or of larger tiles 0 to 15 of all, those of the
// second by the others. The warp's lanes get them by shuffle.
template <class Shape, class CkvElement, class KpeElement, int kNumRows>
struct LatentCopy {
  static constexpr int kCkvBytes = Shape::kHeadDimCkv * int(sizeof(CkvElement)), kHeadDimKpe = Shape::kHeadDimKpe;
  using Ckv = RowCopy<SwizzledRows<kCkvBytes>, kNumRows, Shape::kNumThreads>;
  using Kpe = RowCopy<SwizzledRows<(kHeadDimKpe > 0 ? kHeadDimKpe : 64) * int(sizeof(KpeElement))>, kNumRows,
                      Shape::kNumThreads>;

  __device__ __forceinline__ static bool finds_kpe() {
    return kHeadDimKpe > 0 && Shape::thread_idx() / kNumFound % 2 == 1;
  }
  // The row whose address this lane finds; may be none of the tile's.
  __device__ __forceinline__ static int row_found() {
    const uint32_t of_ckv = row_found_of<Ckv>(), of_kpe = row_found_of<Kpe>();
    return int(finds_kpe() ? of_kpe : of_ckv);
  }

  // row_gmem: what this lane has found. Rows from num_valid on become zeros.
  template <class... Policy>
  __device__ __forceinline__ static void copy(uint32_t ckv_smem, int num_valid, const uint8_t* row_gmem,
                                              Policy... l2_policy) {
    copy_part<Ckv, 0>(ckv_smem, num_valid, row_gmem, l2_policy...);
    if constexpr (kHeadDimKpe > 0) {
      copy_part<Kpe, kNumFound>(ckv_smem + kNumRows * kCkvBytes, num_valid, row_gmem, l2_policy...);
    }
  }
  // 16 bytes that follow the first part of each row, by the lanes that have found it.
  __device__ __forceinline__ static void copy_rest(uint32_t rest_smem, int num_valid, const uint8_t* row_gmem) {
    const int row = row_found();
    if (finds_kpe() || Shape::thread_idx() % 32 >= kNumFound || row >= kNumRows) return;
    cp_async_16(rest_smem + row * 16, row_gmem + kCkvBytes, row < num_valid);
  }

 private:
  template <class Copy>
  static constexpr uint32_t kRowsOfWarp = 32 / Copy::kLanesPerRow;  // in a pass
  template <class Copy>
  static constexpr int kRowsOfTile = Copy::kNumPasses * kRowsOfWarp<Copy>;  // of a warp, of a part
  static constexpr int kNumFound = kRowsOfTile<Ckv> <= 8 && kRowsOfTile<Kpe> <= 8 ? 8 : 16;

  template <class Copy>
  __device__ __forceinline__ static uint32_t row_found_of() {
    static_assert(kRowsOfTile<Copy> <= kNumFound, "a lane a row");
    const uint32_t thread_idx = Shape::thread_idx(), i = thread_idx % kNumFound;
    return thread_idx / 32 * kRowsOfWarp<Copy> + i % kRowsOfWarp<Copy> + i / kRowsOfWarp<Copy> * Copy::kRowsPerPass;
  }
  template <class Copy, int kFirstLane, class... Policy>
  __device__ __forceinline__ static void copy_part(uint32_t tile_smem, int num_valid, const uint8_t* row_gmem,
                                                   Policy... l2_policy) {
    const uint32_t thread_idx = Shape::thread_idx();
    const uint32_t lane_idx = kFirstLane + thread_idx % 32 / Copy::kLanesPerRow;
    const auto address = reinterpret_cast<uint64_t>(row_gmem);
    Copy::of(thread_idx)(
        tile_smem, num_valid,
        [&](int pass) {
          return reinterpret_cast<const uint8_t*>(
              __shfl_sync(0xffffffffu, address, int(lane_idx + pass * kRowsOfWarp<Copy>)));
        },
        l2_policy...);
  }
};

// The query rows of the unit.
template <class Config, class Shape = MlaShape<Config>>
__device__ __forceinline__ void load_queries_async(const MlaParams& params, const PrefillUnit& work,
                                                   const FastDivisor& group_size, uint32_t q_smem) {
  using Q = typename Config::Q;
  using Copy = LatentCopy<Shape, Q, Q, Shape::kBlockM>;
  const QueryRow query = work.query_row(group_size, work.item.q_tile * Shape::kBlockM + Copy::row_found());
  const Q* row_gmem = Copy::finds_kpe() ? static_cast<const Q*>(params.q_pe) +
                                              work.offset(query, params.q_pe_token_stride, params.q_pe_head_stride)
                                        : static_cast<const Q*>(params.q_nope) +
                                              work.offset(query, params.q_nope_token_stride, params.q_nope_head_stride);
  Copy::copy(q_smem, work.num_rows(group_size.divisor, Shape::kBlockM), reinterpret_cast<const uint8_t*>(row_gmem));
}

// Brings in KV tiles, each in three steps: look_up() the page of this lane's row, find() the row, load_async() the
// tile. Between the first two lies a trip to memory; what the second makes of it is at hand when the tile's stage is
// free.
template <class Config>
struct LatentKvLoader {
  using Shape = MlaShape<Config>;
  using Kv = typename Config::Kv;
  using Kpe = typename Config::Kpe;
  using Copy = LatentCopy<Shape, Kv, Kpe, Shape::kBlockN>;
  const LatentKvParams& kv;
  MlaSmem<Config>& smem;
  int32_t kv_begin, kv_len, tile_begin;

  __device__ __forceinline__ static LatentKvLoader of(const MlaParams& params, MlaSmem<Config>& smem) {
    const PrefillItem& item = smem.work.item;
    return {params.kv, smem, item.kv_begin, item.kv_len, item.tile_begin};
  }

  __device__ __forceinline__ int32_t look_up(int tile) const {
    const int row = Copy::row_found(), kv_idx = tile * Shape::kBlockN + row;
    if (tile < tile_begin || row >= Shape::kBlockN || kv_idx >= kv_len) return 0;
    return KvView<Config::kKvStorage>{kv.index, kv_begin, kv_len}.locate(kv_idx).page_idx;
  }

  // Of rows that do not exist, or of no tile, an address that nobody reads.
  __device__ __forceinline__ const uint8_t* find(int tile, int32_t page_idx) const {
    const int32_t kv_idx = tile * Shape::kBlockN + Copy::row_found();
    const FastDivisor& page_size = kv.index.page_size;
    const int32_t entry_idx = kv_idx - int32_t(page_size.divide(kv_idx) * page_size.divisor);
    const bool is_kpe = Copy::finds_kpe();
    const void* part_gmem = is_kpe ? kv.kpe : kv.ckv;
    const int64_t page_stride = is_kpe ? kv.kpe_page_stride : kv.ckv_page_stride;
    const int64_t entry_stride = is_kpe ? kv.kpe_entry_stride : kv.ckv_entry_stride;
    const int64_t offset = page_idx * page_stride + entry_idx * entry_stride;
    return static_cast<const uint8_t*>(part_gmem) + offset * (is_kpe ? int(sizeof(Kpe)) : int(sizeof(Kv)));
  }

  // A group is committed for every tile, there or not: so "all but the latest" counts tiles.
  __device__ __forceinline__ void load_async(int tile, const uint8_t* row_gmem) const {
    if (tile >= tile_begin) {
      const uint32_t stage_smem = smem_address(smem.stage(tile));
      const int num_valid = kv_len - tile * Shape::kBlockN;
      if constexpr (Shape::kReadsOnce) {
        Copy::copy(stage_smem, num_valid, row_gmem, evict_first_policy());
      } else {
        Copy::copy(stage_smem, num_valid, row_gmem);
      }
      if constexpr (Shape::kHasScales) Copy::copy_rest(stage_smem + Shape::kScalesOffset, num_valid, row_gmem);
    }
    cp_async_commit();
  }
};

// Sends for the query rows and the last KV tiles of the unit. Returns this lane's row of the first tile that is left.
template <class Config, class Shape = MlaShape<Config>>
__device__ __forceinline__ const uint8_t* load_first_tiles_async(const MlaParams& params, MlaSmem<Config>& smem) {
  const PrefillUnit& work = smem.work;
  const auto loader = LatentKvLoader<Config>::of(params, smem);
  const int last_tile = work.item.tile_end - 1;
  int32_t pages[Shape::kNumStages];
#pragma unroll
  for (int i = 0; i < Shape::kNumStages; ++i) pages[i] = loader.look_up(last_tile - i);
  load_queries_async<Config>(params, work, smem.group_size, smem_address(smem.queries(last_tile)));
#pragma unroll
  for (int i = 0; i < Shape::kNumAhead; ++i) loader.load_async(last_tile - i, loader.find(last_tile - i, pages[i]));
  return loader.find(last_tile - Shape::kNumAhead, pages[Shape::kNumAhead]);
}

// What is multiplied with keys of fp8: the queries in T, each 16 columns as even ones, then odd ones, the order in
// which the codec hands out a key's elements. Those of kpe stay as they are where it is not of fp8.
template <class Config, class Shape = MlaShape<Config>>
__device__ __forceinline__ void reorder_queries(uint8_t* q_smem) {
  using T = typename Shape::T;
  using Q = typename Config::Q;
  const auto reorder = [](uint8_t* low_smem, uint8_t* high_smem) {
    uint4* low = reinterpret_cast<uint4*>(low_smem);
    uint4* high = reinterpret_cast<uint4*>(high_smem);
    const uint4 a = *low, b = *high;
    const auto even = [](uint32_t x, uint32_t y) { return cast_16bit<T, Q>(__byte_perm(x, y, 0x5410)); };
    const auto odd = [](uint32_t x, uint32_t y) { return cast_16bit<T, Q>(__byte_perm(x, y, 0x7632)); };
    *low = uint4{even(a.x, a.y), even(a.z, a.w), even(b.x, b.y), even(b.z, b.w)};
    *high = uint4{odd(a.x, a.y), odd(a.z, a.w), odd(b.x, b.y), odd(b.z, b.w)};
  };
  constexpr int kCkvGroups = Shape::kCkvPanels * 4;
  constexpr int kGroupsOfRow = kCkvGroups + (Shape::kHasScales ? 0 : Shape::kPePanels * 4);
#pragma unroll 1
  for (int i = fresh_thread_idx(); i < Shape::kBlockM * kGroupsOfRow; i += Shape::kNumThreads) {
    const int row = i / kGroupsOfRow, group = i % kGroupsOfRow;
    if (group < kCkvGroups) {
      using Rows = typename Shape::QRows;
      reorder(q_smem + Rows::offset(row, 2 * group), q_smem + Rows::offset(row, 2 * group + 1));
    } else {
      using Rows = typename Shape::QPeRows;
      uint8_t* pe_smem = q_smem + Shape::kQBytes;
      reorder(pe_smem + Rows::offset(row, 2 * (group - kCkvGroups)),
              pe_smem + Rows::offset(row, 2 * (group - kCkvGroups) + 1));
    }
  }
}

}  // namespace flashinfer
