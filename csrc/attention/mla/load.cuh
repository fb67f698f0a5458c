// How queries and the cache come in: rows of two parts, each a copy into a swizzled tile of its own.
#pragma once

#include "attention/mla/tile.cuh"

namespace flashinfer {

// Copies kNumRows rows of two parts, by all threads. The addresses of the rows that a warp copies are found by its
// lanes, one each: those of the first part by lanes 0 to 7 of every 16, those of the second by the others. The warp's
// lanes get them by shuffle.
template <class Element, int kNumRows, int kHeadDimCkv, int kHeadDimKpe, int kNumThreads>
struct LatentCopy {
  static constexpr int kSize = int(sizeof(Element));
  using Ckv = RowCopy<SwizzledRows<kHeadDimCkv * kSize>, kNumRows, kNumThreads>;
  using Kpe = RowCopy<SwizzledRows<(kHeadDimKpe > 0 ? kHeadDimKpe : 64) * kSize>, kNumRows, kNumThreads>;

  __device__ __forceinline__ static bool finds_kpe() { return kHeadDimKpe > 0 && fresh_thread_idx() / 8 % 2 == 1; }
  // The row whose address this lane finds; may be none of the tile's.
  __device__ __forceinline__ static int row_found() { return finds_kpe() ? row_found_of<Kpe>() : row_found_of<Ckv>(); }

  // row_gmem: what this lane has found. Rows from num_valid on become zeros.
  __device__ __forceinline__ static void copy(uint32_t ckv_smem, int num_valid, const uint8_t* row_gmem) {
    copy_part<Ckv, 0>(ckv_smem, num_valid, row_gmem);
    if constexpr (kHeadDimKpe > 0) copy_part<Kpe, 8>(ckv_smem + kNumRows * kHeadDimCkv * kSize, num_valid, row_gmem);
  }

 private:
  template <class Copy>
  static constexpr int kRowsOfWarp = 32 / Copy::kLanesPerRow;  // in a pass

  template <class Copy>
  __device__ __forceinline__ static int row_found_of() {
    static_assert(Copy::kNumPasses * kRowsOfWarp<Copy> <= 8, "a lane a row");
    const int thread_idx = fresh_thread_idx(), i = thread_idx % 8;
    return thread_idx / 32 * kRowsOfWarp<Copy> + i % kRowsOfWarp<Copy> + i / kRowsOfWarp<Copy> * Copy::kRowsPerPass;
  }
  template <class Copy, int kFirstLane>
  __device__ __forceinline__ static void copy_part(uint32_t tile_smem, int num_valid, const uint8_t* row_gmem) {
    const int thread_idx = fresh_thread_idx();
    const int lane_idx = kFirstLane + thread_idx % 32 / Copy::kLanesPerRow;
    const auto address = reinterpret_cast<uint64_t>(row_gmem);
    Copy::of(thread_idx)(tile_smem, num_valid, [&](int pass) {
      return reinterpret_cast<const uint8_t*>(__shfl_sync(0xffffffffu, address, lane_idx + pass * kRowsOfWarp<Copy>));
    });
  }
};

// The query rows of the unit.
template <class Config, class Shape = MlaShape<Config>>
__device__ __forceinline__ void load_queries_async(const MlaParams& params, const PrefillUnit& work,
                                                   const FastDivisor& group_size, uint32_t q_smem) {
  using Q = typename Config::Q;
  using Copy = LatentCopy<Q, Shape::kBlockM, Shape::kHeadDimCkv, Shape::kHeadDimKpe, Shape::kNumThreads>;
  const QueryRow query = work.query_row(group_size, work.item.q_tile * Shape::kBlockM + Copy::row_found());
  const Q* row_gmem = Copy::finds_kpe() ? static_cast<const Q*>(params.q_pe) +
                                              work.offset(query, params.q_pe_token_stride, params.q_pe_head_stride)
                                        : static_cast<const Q*>(params.q_nope) +
                                              work.offset(query, params.q_nope_token_stride, params.q_nope_head_stride);
  Copy::copy(q_smem, work.num_rows(group_size.divisor, Shape::kBlockM), reinterpret_cast<const uint8_t*>(row_gmem));
}

// Brings in KV tiles. Pages are looked up a tile ahead of the copy: of that, one register is kept.
template <class Config>
struct LatentKvLoader {
  using Shape = MlaShape<Config>;
  using Kv = typename Config::Kv;
  using Copy = LatentCopy<Kv, Shape::kBlockN, Shape::kHeadDimCkv, Shape::kHeadDimKpe, Shape::kNumThreads>;
  const LatentKvParams& kv;
  const PrefillItem& item;
  MlaSmem<Config>& smem;

  // The page of this lane's row.
  __device__ __forceinline__ int32_t look_up(int tile) const {
    const int row = Copy::row_found(), kv_idx = tile * Shape::kBlockN + row;
    if (tile < item.tile_begin || row >= Shape::kBlockN || kv_idx >= item.kv_len) return 0;
    return KvView<Config::kKvStorage>{kv.index, item.kv_begin, item.kv_len}.locate(kv_idx).page_idx;
  }

  // A group is committed for every tile, there or not: so "all but the latest" counts tiles.
  __device__ __forceinline__ void load_async(int tile, int32_t page_idx) const {
    if (tile >= item.tile_begin) copy_async(tile, page_idx);
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void copy_async(int tile, int32_t page_idx) const {
    const int32_t kv_idx = tile * Shape::kBlockN + Copy::row_found();
    const FastDivisor& page_size = kv.index.page_size;
    const int32_t entry_idx = kv_idx - int32_t(page_size.divide(kv_idx) * page_size.divisor);
    const Kv* row_gmem =
        Copy::finds_kpe()
            ? static_cast<const Kv*>(kv.kpe) + (page_idx * kv.kpe_page_stride + entry_idx * kv.kpe_entry_stride)
            : static_cast<const Kv*>(kv.ckv) + (page_idx * kv.ckv_page_stride + entry_idx * kv.ckv_entry_stride);
    Copy::copy(smem_address(smem.stage(tile)), item.kv_len - tile * Shape::kBlockN,
               reinterpret_cast<const uint8_t*>(row_gmem));
  }
};

// Sends for the query rows and the last KV tiles of the unit. Returns the page of the first tile that is left.
template <class Config, class Shape = MlaShape<Config>>
__device__ __forceinline__ int32_t load_first_tiles_async(const MlaParams& params, MlaSmem<Config>& smem) {
  const PrefillUnit& work = smem.work;
  const LatentKvLoader<Config> loader{params.kv, work.item, smem};
  const int last_tile = work.item.tile_end - 1;
  int32_t pages[Shape::kNumStages];
#pragma unroll
  for (int i = 0; i < Shape::kNumStages; ++i) pages[i] = loader.look_up(last_tile - i);
  load_queries_async<Config>(params, work, smem.group_size, smem_address(smem.queries(last_tile)));
#pragma unroll
  for (int i = 0; i < Shape::kNumAhead; ++i) loader.load_async(last_tile - i, pages[i]);
  return pages[Shape::kNumAhead];
}

// What is multiplied with keys of fp8: the queries in T, each 16 columns as even ones, then odd ones, the order in
// which the codec hands out a key's elements.
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
  constexpr int kGroupsOfRow = Shape::kPanels * 4, kCkvGroups = Shape::kCkvPanels * 4;
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
