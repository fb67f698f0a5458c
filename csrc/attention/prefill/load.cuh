// SPDX-License-Identifier: Apache-2.0
// How rows of prefill come from device memory: copies into swizzled tiles, of the query and of KV.
#pragma once

#include "attention/prefill/tile.cuh"

namespace flashinfer {

// Copies rows of 16-byte granules into a swizzled tile, kNumThreads together. Neighbouring threads take neighbouring
// granules of a row; a thread takes the same granules of rows `row`, `row + kRowsPerPass`, and so on.
template <class Rows, int kNumRows, int kNumThreads>
struct RowCopy {
  static constexpr int kPowerOfTwo = Rows::kNumGranules & -Rows::kNumGranules;
  static constexpr int kLanesPerRow = kPowerOfTwo < 16 ? kPowerOfTwo : 16;
  static constexpr int kRowsPerPass = kNumThreads / kLanesPerRow;
  static constexpr int kNumPasses = ceil_div(kNumRows, kRowsPerPass);

  int row, lane;

  __device__ __forceinline__ static RowCopy of(uint32_t thread_idx) {
    thread_idx %= kNumThreads;
    return {int(thread_idx / kLanesPerRow), int(thread_idx % kLanesPerRow)};
  }

  // source(pass) is the address of row `row + pass * kRowsPerPass`, called in order. Rows from num_valid on are filled
  // with zeros, because a probability of zero times an arbitrary bit pattern may be NaN.
  // l2_policy: of cp_async_16, or none.
  template <class Source, class... Policy>
  __device__ __forceinline__ void operator()(uint32_t tile_smem, int num_valid, const Source& source,
                                             Policy... l2_policy) const {
    const uint32_t lane_smem = tile_smem + Rows::offset(row, lane);
    const int num_left = num_valid - row;
#pragma unroll
    for (int pass = 0; pass < kNumPasses; ++pass) {
      const int first_row = pass * kRowsPerPass;
      if (kNumRows % kRowsPerPass != 0 && row + first_row >= kNumRows) break;
      const uint8_t* src_gmem = reinterpret_cast<const uint8_t*>(source(pass)) + lane * 16;
      // Eight rows on, the permutation is the same, and the distance in shared memory folds into the copy.
      const uint32_t row_smem = kRowsPerPass % 8 == 0 ? lane_smem + first_row * Rows::kNumBytes
                                                      : tile_smem + Rows::offset(row + first_row, lane);
#pragma unroll
      for (int granule = 0; granule < Rows::kNumGranules; granule += kLanesPerRow) {
        cp_async_16(row_smem + granule * 16, src_gmem + granule * 16, num_left > first_row, l2_policy...);
      }
    }
  }
};

// The rows of a warp in q or out. Each lane finds one, the others get it by shuffle.
template <class Shape>
struct WarpRows {
  int num_rows;  // that exist; may be negative
  int64_t lane_offset;

  __device__ __forceinline__ static WarpRows of(const PrefillWork& work, uint32_t thread_idx, int64_t token_stride,
                                                int64_t head_stride) {
    static_assert(Shape::kRowsPerWarp <= 32);
    const int warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
    const QueryRow query = work.template query_row<Shape>(warp_row + int(thread_idx % 32));
    return {work.num_rows(Shape::kBlockM) - warp_row, work.offset(query, token_stride, head_stride)};
  }
  // Elements from the start of the tensor to that of a row. By all lanes of the warp.
  __device__ __forceinline__ int64_t offset(int row) const { return __shfl_sync(0xffffffffu, lane_offset, row); }
};

// Each warp copies its own query rows.
template <class Config>
__device__ __forceinline__ void load_q_async(const PrefillParams& params, const PrefillWork& work,
                                             PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  using Rows = SwizzledRows<Shape::kHeadDimQk* int(sizeof(typename Shape::Q))>;
  using Copy = RowCopy<Rows, Shape::kRowsPerWarp, 32>;
  const uint32_t thread_idx = fresh_thread_idx();
  const int warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
  const auto rows = WarpRows<Shape>::of(work, thread_idx, params.q_token_stride, params.q_head_stride);
  const Copy copy = Copy::of(thread_idx);
  const int offset = warp_row * Shape::kHeadDimQk * 2 + (Shape::kWidensQ ? kNarrowQOffset<Shape> : 0);
  copy(smem_address(smem.q + offset), rows.num_rows, [&](int pass) {
    return static_cast<const typename Shape::Q*>(params.q) + rows.offset(copy.row + pass * Copy::kRowsPerPass);
  });
}

// Brings in KV tiles. Rows of single and ragged KV are evenly spaced. Those of paged KV are looked up one a thread, a
// tile ahead of the copy, and their addresses in K and V (the strides may differ) passed through shared memory.
template <class Config>
struct KvTileLoader {
  using Shape = PrefillShape<Config>;
  using View = KvView<Config::kKvStorage>;
  using Kv = typename Config::Kv;
  using CopyK = RowCopy<typename Shape::KRows, Shape::kBlockN, Shape::kNumThreads>;
  using CopyV = RowCopy<typename Shape::VRows, Shape::kBlockN, Shape::kNumThreads>;
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;

  const PrefillParams& params;
  const PrefillWork& work;
  PrefillSmem<Config>& smem;

  static_assert(!kIsPaged || Shape::kNumThreads % Shape::kBlockN == 0);
  // Two threads a row share the work: one finds the row of K, one that of V.
  static constexpr bool kHasThreadsForEach = Shape::kNumThreads >= 2 * Shape::kBlockN;

  // The page of this thread's row: a load whose result publish() needs only after the current tile. It is kept alone,
  // in one register; where in the page the row is costs less to compute again than to hold.
  __device__ __forceinline__ int32_t look_up(int tile) const {
    if constexpr (!kIsPaged) return 0;
    const int kv_idx = first_key_of(tile) + int(threadIdx.x % Shape::kBlockN);
    if (tile < work.item.tile_begin || kv_idx >= work.item.kv_len) return 0;
    return View{params.kv.index, work.item.kv_begin, work.item.kv_len}.locate(kv_idx).page_idx;
  }

  // Leaves the address where one thread finds all the rows it copies side by side. Rows that do not exist get one as
  // well, which nobody reads.
  __device__ __forceinline__ void publish(int tile, int32_t page_idx) const {
    if constexpr (kIsPaged) {
      const uint32_t thread_idx = fresh_thread_idx();
      const int row = int(thread_idx % Shape::kBlockN), kv_idx = max(first_key_of(tile) + row, 0);
      const FastDivisor& page_size = params.kv.index.page_size;
      const KvRow location = {page_idx, kv_idx - int32_t(page_size.divide(kv_idx) * page_size.divisor)};
      if (!kHasThreadsForEach || thread_idx / Shape::kBlockN == 0) {
        smem.rows[tile & 1][0][place_of<CopyK>(row)] =
            static_cast<const Kv*>(work.k_gmem) + View::k_offset(params.kv, location, 0);
      }
      if (!kHasThreadsForEach || thread_idx / Shape::kBlockN == 1) {
        smem.rows[tile & 1][1][place_of<CopyV>(row)] =
            static_cast<const Kv*>(work.v_gmem) + View::v_offset(params.kv, location, 0);
      }
    }
  }
  template <class Copy>
  __device__ __forceinline__ static constexpr int place_of(int row) {
    return row % Copy::kRowsPerPass * Copy::kNumPasses + row / Copy::kRowsPerPass;
  }

  __device__ __forceinline__ int first_key_of(int tile) const { return smem.gap.key_tile(tile) * Shape::kBlockN; }
  // Rows of the tile that exist, or more.
  __device__ __forceinline__ int num_valid(int tile) const { return work.item.kv_len - first_key_of(tile); }

  template <bool kKeys, bool kValues>
  __device__ __forceinline__ void load_async(int tile, int num_valid) const {
    const int stage = stage_of<Config>(tile), first_row = first_key_of(tile);
    if constexpr (kIsPaged) {
      if constexpr (kKeys) copy_paged(CopyK::of(fresh_thread_idx()), smem.k[stage], num_valid, smem.rows[tile & 1][0]);
      if constexpr (kValues)
        copy_paged(CopyV::of(fresh_thread_idx()), smem.v[stage], num_valid, smem.rows[tile & 1][1]);
    } else {
      const uint32_t row_idx = work.item.kv_begin + first_row;
      if constexpr (kKeys) {
        copy_even(CopyK::of(fresh_thread_idx()), smem.k[stage], num_valid, row_idx, work.k_gmem,
                  params.kv.k_page_stride);
      }
      if constexpr (kValues) {
        copy_even(CopyV::of(fresh_thread_idx()), smem.v[stage], num_valid, row_idx, work.v_gmem,
                  params.kv.v_page_stride);
      }
    }
  }

  template <class Copy>
  __device__ __forceinline__ void copy_paged(const Copy& copy, const uint8_t* tile_smem, int num_valid,
                                             const void* const* rows_smem) const {
    const void* rows[Copy::kNumPasses];  // all of them before the first copy: one wait for shared memory
    const void* const* mine_smem = rows_smem + copy.row * Copy::kNumPasses;
    if constexpr (Copy::kNumPasses % 2 == 0) {
#pragma unroll
      for (int pass = 0; pass < Copy::kNumPasses; pass += 2) {
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(mine_smem + pass);
        rows[pass] = reinterpret_cast<const void*>(two.x);
        rows[pass + 1] = reinterpret_cast<const void*>(two.y);
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < Copy::kNumPasses; ++pass) {
        rows[pass] = copy.row + pass * Copy::kRowsPerPass < Shape::kBlockN ? mine_smem[pass] : nullptr;
      }
    }
    copy(smem_address(tile_smem), num_valid, [&](int pass) { return rows[pass]; });
  }

  template <class Copy>
  __device__ __forceinline__ void copy_even(const Copy& copy, const uint8_t* tile_smem, int num_valid, uint32_t row_idx,
                                            const void* head_gmem, int64_t row_stride) const {
    const Kv* row_gmem = static_cast<const Kv*>(head_gmem) + int64_t(row_idx + copy.row) * row_stride;
    const int64_t pass_stride = row_stride * Copy::kRowsPerPass;
    copy(smem_address(tile_smem), num_valid, [&](int pass) {
      if (pass > 0) row_gmem += pass_stride;
      return row_gmem;
    });
  }
};

}  // namespace flashinfer
