// The phases of a prefill tile: what one CTA, or one warp of it, does to bring in a tile of rows and to attend to it.
//
// Geometry. A CTA owns kBlockM query rows of one KV head; a row is (token, head in group), the head innermost, so that
// the rows of a group share every KV tile whatever the query length. Warp w owns rows [w * kRowsPerWarp, +kRowsPerWarp)
// as kFragsM fragments of 16. A KV tile is kBlockN rows. Scores, probabilities and output stay in registers in the mma
// layout (device/mma.cuh): lane l holds rows l / 4 and l / 4 + 8 of a fragment.
#pragma once

#include "attention/kv_view.cuh"
#include "attention/merge.cuh"
#include "attention/prefill_params.h"
#include "attention/variant.cuh"
#include "device/cp_async.cuh"
#include "device/fp8.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/swizzle.cuh"

namespace flashinfer {

// threadIdx.x as the compiler has not seen it before: addresses made from it are computed where they are used. Made
// from threadIdx.x itself they would be hoisted out of the loop over tiles, a dozen registers that the loop does not
// have.
__device__ __forceinline__ uint32_t fresh_thread_idx() {
  uint32_t thread_idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_idx));
  return thread_idx;
}

// The same for the end of a unit. ptxas knows two reads of %tid.x for one and would keep, or spill, what the loop over
// tiles made of it; the result of a shuffle is news to it. By all lanes of a warp.
__device__ __forceinline__ uint32_t thread_idx_after_loop() {
  const uint32_t thread_idx = fresh_thread_idx();
  return __shfl_sync(0xffffffffu, thread_idx, thread_idx);
}

template <class Config>
struct PrefillShape {
  using T = typename Config::Q;
  using Kv = typename Config::Kv;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr int kNumThreads = Config::kNumThreads, kNumWarps = kNumThreads / 32;
  static constexpr int kHeadDimQk = Config::kHeadDimQk, kHeadDimVo = Config::kHeadDimVo;
  static constexpr bool kHasRope = Variant<Config>::kHasRope;
  static constexpr bool kIsFp8V = sizeof(Kv) == 1;
  static constexpr bool kIsFp8K = kIsFp8V && !kHasRope;  // rotated keys are kept in T

  // With a single stage, keys and values take turns: a tile's values come in during its Q Kᵀ, the keys of the next one
  // during P V. Otherwise whole tiles come in while others are worked on.
  static constexpr bool kTakesTurns = Config::kNumStages == 1;
  static constexpr int kNumAhead = kTakesTurns ? 1 : Config::kNumStages - 1;  // tiles in flight, or their keys

  static constexpr int kRowsPerWarp = kBlockM / kNumWarps;
  static constexpr int kFragsM = kRowsPerWarp / 16;
  static constexpr int kFragsN = kBlockN / 8;
  static constexpr int kFragsD = kHeadDimVo / 8;
  static_assert(kRowsPerWarp % 16 == 0 && kBlockN % 32 == 0 && kHeadDimQk % 32 == 0 && kHeadDimVo % 32 == 0);
  static_assert(kHeadDimVo <= kHeadDimQk, "the output is staged where the queries were");

  using QRows = SwizzledRows<kHeadDimQk * 2>;
  using OutRows = SwizzledRows<kHeadDimVo * 2>;
  using KRows = SwizzledRows<kHeadDimQk* int(sizeof(Kv))>;
  using KMmaRows = SwizzledRows<kHeadDimQk*(kIsFp8K ? 1 : 2)>;  // as the tensor cores' loads find them
  using VRows = SwizzledRows<kHeadDimVo* int(sizeof(Kv))>;
};

// One unit of work: an item for one KV head. It stays in shared memory, where it costs no registers.
struct alignas(16) PrefillWork {
  PrefillItem item;
  const void* k_gmem;  // the KV head's part of row 0
  const void* v_gmem;
  int32_t kv_head_idx;
  FastDivisor group_size;  // the same in every unit

  // Rows of the query tile that exist.
  __device__ __forceinline__ int32_t num_rows(int32_t block_m) const {
    const int32_t num_left = item.qo_len * int32_t(group_size.divisor) - item.q_tile * block_m;
    return num_left < block_m ? num_left : block_m;
  }
  // First row of a slot of partial results. Slots follow each other, within one the KV heads, within those the rows.
  __device__ __forceinline__ int64_t partial_row(int32_t slot_idx, int32_t block_m, int32_t num_kv_heads) const {
    const int64_t num_rows = this->num_rows(block_m);
    return (item.partial_row + slot_idx * num_rows) * num_kv_heads + kv_head_idx * num_rows;
  }
};

// Where a KV tile stays in shared memory.
template <class Config>
__device__ __forceinline__ uint32_t stage_of(int tile) {
  return uint32_t(tile) % Config::kNumStages;
}

// Where a row of the tile is among the request's tokens and the query heads.
struct QueryRow {
  int32_t token_idx;  // within the request
  int32_t qo_head_idx;

  template <class Shape>
  __device__ __forceinline__ static QueryRow of(const PrefillWork& work, int row) {
    const int32_t packed = work.item.q_tile * Shape::kBlockM + row, group_size = work.group_size.divisor;
    const int32_t token_idx = work.group_size.divide(packed);
    return {token_idx, work.kv_head_idx * group_size + packed - token_idx * group_size};
  }
};

// The KV tiles that one warp's rows see at all, [seen_begin, seen_end), and those they see whole, [whole_begin,
// whole_end): the others among the seen need masking.
template <class Config>
struct WarpTiles {
  using Shape = PrefillShape<Config>;
  int32_t seen_begin, seen_end, whole_begin, whole_end;

  __device__ __forceinline__ static WarpTiles of(const AttentionParams& params, const PrefillWork& work,
                                                 int first_row) {
    const int32_t last_row = min(first_row + Shape::kRowsPerWarp, work.num_rows(Shape::kBlockM)) - 1;
    if (last_row < first_row) return {0, 0, 0, 0};
    const int32_t kv_len = work.item.kv_len, offset = kv_len - work.item.qo_len;
    const int32_t first_position = offset + QueryRow::of<Shape>(work, first_row).token_idx;
    const int32_t last_position = offset + QueryRow::of<Shape>(work, last_row).token_idx;
    WarpTiles tiles = {0, ceil_div(kv_len, Shape::kBlockN), 0, kv_len / Shape::kBlockN};
    if constexpr (Config::kMask == kMaskCausal) {
      tiles.seen_end = min(tiles.seen_end, ceil_div(max(last_position + 1, 0), Shape::kBlockN));
      tiles.whole_end = min(tiles.whole_end, max(first_position + 1, 0) / Shape::kBlockN);
    }
    if constexpr (Config::kMask == kMaskCustom) tiles.whole_end = 0;
    if constexpr (Config::kHasWindow) {
      tiles.seen_begin = max(first_position - params.window_left, 0) / Shape::kBlockN;
      tiles.whole_begin = ceil_div(max(last_position - params.window_left, 0), Shape::kBlockN);
    }
    return tiles;
  }
  __device__ __forceinline__ bool sees(int tile) const {
    return tile < seen_end && (!Config::kHasWindow || tile >= seen_begin);
  }
  __device__ __forceinline__ bool sees_whole(int tile) const {
    return tile < whole_end && (!Config::kHasWindow || tile >= whole_begin);
  }
};

template <class Config>
struct PrefillSmem {
  using Shape = PrefillShape<Config>;
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;

  alignas(128) uint8_t q[Shape::kBlockM * Shape::kHeadDimQk * 2];  // later the warp's output rows
  alignas(128) uint8_t k[Config::kNumStages][Shape::kBlockN * Shape::kHeadDimQk * sizeof(typename Config::Kv)];
  alignas(128) uint8_t v[Config::kNumStages][Shape::kBlockN * Shape::kHeadDimVo * sizeof(typename Config::Kv)];
  alignas(128) uint8_t k_rotated[Shape::kHasRope ? Shape::kBlockN * Shape::kHeadDimQk * 2 : 16];
  alignas(16) const void* rows[2][2][kIsPaged ? Shape::kBlockN : 1];  // of tiles even and odd; of K and V
  PrefillWork work, next_work;
  UnitOrder order;
  WarpTiles<Config> warp_tiles[Shape::kNumWarps];
  float lse[Shape::kBlockM];
  uint32_t unit, next_unit, num_units;
  uint32_t is_last;
};

// Copies rows of 16-byte chunks into a swizzled tile, kNumThreads together. Neighbouring threads take neighbouring
// chunks of a row; a thread takes the same chunks of rows `row`, `row + kRowsPerPass`, and so on.
template <class Rows, int kNumRows, int kNumThreads>
struct RowCopy {
  static constexpr int kPowerOfTwo = Rows::kNumChunks & -Rows::kNumChunks;
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
  template <class Source>
  __device__ __forceinline__ void operator()(uint32_t tile_smem, int num_valid, const Source& source) const {
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
      for (int chunk = 0; chunk < Rows::kNumChunks; chunk += kLanesPerRow) {
        cp_async_16(row_smem + chunk * 16, src_gmem + chunk * 16, num_left > first_row);
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
    const QueryRow query = QueryRow::of<Shape>(work, warp_row + int(thread_idx % 32));
    return {work.num_rows(Shape::kBlockM) - warp_row,
            (work.item.q_begin + query.token_idx) * token_stride + query.qo_head_idx * head_stride};
  }
  // Elements from the start of the tensor to that of a row. By all lanes of the warp.
  __device__ __forceinline__ int64_t offset(int row) const { return __shfl_sync(0xffffffffu, lane_offset, row); }
};

// Each warp copies its own query rows.
template <class Config>
__device__ __forceinline__ void load_q_async(const AttentionParams& params, const PrefillWork& work,
                                             PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  using Copy = RowCopy<typename Shape::QRows, Shape::kRowsPerWarp, 32>;
  const uint32_t thread_idx = fresh_thread_idx();
  const int warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
  const auto rows = WarpRows<Shape>::of(work, thread_idx, params.q_token_stride, params.q_head_stride);
  const Copy copy = Copy::of(thread_idx);
  copy(smem_address(smem.q + warp_row * Shape::kHeadDimQk * 2), rows.num_rows, [&](int pass) {
    return static_cast<const typename Config::Q*>(params.q) + rows.offset(copy.row + pass * Copy::kRowsPerPass);
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

  const AttentionParams& params;
  const PrefillWork& work;
  PrefillSmem<Config>& smem;

  static_assert(!kIsPaged || Shape::kNumThreads % Shape::kBlockN == 0);
  // Two threads a row share the work: one finds the row of K, one that of V.
  static constexpr bool kHasThreadsForEach = Shape::kNumThreads >= 2 * Shape::kBlockN;

  // The page of this thread's row: a load whose result publish() needs only after the current tile. It is kept alone,
  // in one register; where in the page the row is costs less to compute again than to hold.
  __device__ __forceinline__ int32_t look_up(int tile) const {
    if constexpr (!kIsPaged) return 0;
    const int kv_idx = tile * Shape::kBlockN + int(threadIdx.x % Shape::kBlockN);
    if (tile < work.item.tile_begin || kv_idx >= work.item.kv_len) return 0;
    return View{params.kv, work.item.kv_begin, work.item.kv_len}.locate(kv_idx).page_idx;
  }

  // Leaves the address where one thread finds all the rows it copies side by side. Rows that do not exist get one as
  // well, which nobody reads.
  __device__ __forceinline__ void publish(int tile, int32_t page_idx) const {
    if constexpr (kIsPaged) {
      const uint32_t thread_idx = fresh_thread_idx();
      const int row = int(thread_idx % Shape::kBlockN), kv_idx = max(tile * Shape::kBlockN + row, 0);
      const FastDivisor& page_size = params.kv.page_size;
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

  // Rows of the tile that exist, or more.
  __device__ __forceinline__ int num_valid(int tile) const { return work.item.kv_len - tile * Shape::kBlockN; }

  template <bool kKeys, bool kValues>
  __device__ __forceinline__ void load_async(int tile, int num_valid) const {
    const int stage = stage_of<Config>(tile), first_row = tile * Shape::kBlockN;
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

// Rotates rows [0, num_rows) of a tile for positions first_position + position_of(row), from storage type Src to T. A
// worker takes one chunk of 8 elements of the first half of the row and its partners in the second.
template <class Config, class Src, class SrcRows, class PositionOf>
__device__ __forceinline__ void rotate_rows(const AttentionParams& params, const uint8_t* src_smem, uint8_t* dst_smem,
                                            int num_rows, int worker, int num_workers, const PositionOf& position_of) {
  using Shape = PrefillShape<Config>;
  using T = typename Config::Q;
  constexpr int kHalf = Shape::kHeadDimQk / 2, kNumPieces = kHalf / 8;
  const int piece = worker % kNumPieces;
  if (worker >= num_workers / kNumPieces * kNumPieces) return;
  float turns[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) turns[i] = rope_turns<Shape::kHeadDimQk>(params, piece * 8 + i);
#pragma unroll 1
  for (int row = worker / kNumPieces; row < num_rows; row += num_workers / kNumPieces) {
    const int32_t position = position_of(row);
    float x[8], y[8];
    const auto read = [&](int column, float (&out)[8]) {
      const int byte = column * int(sizeof(Src));
      to_floats(Vec<Src, 8>::load(reinterpret_cast<const Src*>(src_smem + SrcRows::offset(row, byte / 16) + byte % 16)),
                out);
    };
    read(piece * 8, x);
    read(piece * 8 + kHalf, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float cos, sin;
      rope_cos_sin(turns[i], position, cos, sin);
      const float rotated = x[i] * cos - y[i] * sin;
      y[i] = y[i] * cos + x[i] * sin;
      x[i] = rotated;
    }
    cast_vec<T>(x).store(reinterpret_cast<T*>(dst_smem + Shape::QRows::offset(row, piece)));
    cast_vec<T>(y).store(reinterpret_cast<T*>(dst_smem + Shape::QRows::offset(row, piece + kNumPieces)));
  }
}

// Rotates the warp's query rows, and, for keys left in fp8, reorders each 16 columns as even ones, then odd ones: the
// order in which unpack_fp8 hands out a key's elements (a dot product does not mind).
template <class Config>
__device__ __forceinline__ void prepare_q(const AttentionParams& params, const PrefillWork& work, uint8_t* q_smem,
                                          int first_row) {
  using Shape = PrefillShape<Config>;
  const int lane_idx = int(fresh_thread_idx() % 32);
  if constexpr (Shape::kHasRope) {
    uint8_t* rows_smem = q_smem + first_row * Shape::kHeadDimQk * 2;  // 16-row aligned: the swizzle does not change
    rotate_rows<Config, typename Config::Q, typename Shape::QRows>(
        params, rows_smem, rows_smem, Shape::kRowsPerWarp, lane_idx, 32, [&](int row) {
          return work.item.kv_len - work.item.qo_len + QueryRow::of<Shape>(work, first_row + row).token_idx;
        });
    __syncwarp();
  }
  if constexpr (Shape::kIsFp8K) {
    constexpr int kGroupsPerRow = Shape::kHeadDimQk / 16;
#pragma unroll 1
    for (int i = lane_idx; i < Shape::kRowsPerWarp * kGroupsPerRow; i += 32) {
      const int row = first_row + i / kGroupsPerRow, group = i % kGroupsPerRow;
      uint4* low = reinterpret_cast<uint4*>(q_smem + Shape::QRows::offset(row, 2 * group));
      uint4* high = reinterpret_cast<uint4*>(q_smem + Shape::QRows::offset(row, 2 * group + 1));
      const uint4 a = *low, b = *high;
      const auto even = [](uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); };
      const auto odd = [](uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); };
      *low = uint4{even(a.x, a.y), even(a.z, a.w), even(b.x, b.y), even(b.z, b.w)};
      *high = uint4{odd(a.x, a.y), odd(a.z, a.w), odd(b.x, b.y), odd(b.z, b.w)};
    }
    __syncwarp();
  }
}

// The keys of a tile as the tensor cores are to find them: rotated first, by all threads, if there is RoPE.
template <class Config>
__device__ __forceinline__ const uint8_t* prepare_k(const AttentionParams& params, PrefillSmem<Config>& smem,
                                                    int tile) {
  using Shape = PrefillShape<Config>;
  const uint8_t* k_smem = smem.k[stage_of<Config>(tile)];
  if constexpr (!Shape::kHasRope) return k_smem;
  const int first_kv = tile * Shape::kBlockN;
  rotate_rows<Config, typename Config::Kv, typename Shape::KRows>(params, k_smem, smem.k_rotated, Shape::kBlockN,
                                                                  fresh_thread_idx(), Shape::kNumThreads,
                                                                  [&](int row) { return first_kv + row; });
  __syncthreads();
  return smem.k_rotated;
}

// scores = Q Kᵀ of the warp's rows against one tile.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void compute_scores(float (&scores)[Shape::kFragsM][Shape::kFragsN][4], uint32_t q_smem,
                                               uint32_t k_smem) {
  using T = typename Config::Q;
  const int lane_idx = int(fresh_thread_idx() % 32);
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kFragsN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.f;
    }
  }
  // Where this lane loads its part of fragments: of step 0; 16 rows further down the permutation is the same.
  using QRows = typename Shape::QRows;
  using KRows = typename Shape::KMmaRows;
  const uint32_t q_lane_smem = q_smem + QRows::offset(lane_idx % 16, lane_idx / 16);
  const uint32_t k_lane_smem =
      k_smem +
      (Shape::kIsFp8K ? KRows::offset(lane_idx, 0) : KRows::offset(lane_idx % 8 + lane_idx / 16 * 8, lane_idx / 8 % 2));
#pragma unroll
  for (int step = 0; step < Shape::kHeadDimQk / 16; ++step) {
    uint32_t q[Shape::kFragsM][4];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
      ldmatrix_x4(q[m], QRows::advance(q_lane_smem, step * 2) + m * 16 * QRows::kNumBytes);
    }
    if constexpr (Shape::kIsFp8K) {
#pragma unroll
      for (int n = 0; n < Shape::kFragsN; n += 4) {
        uint32_t k[4];
        ldmatrix_x4(k, KRows::advance(k_lane_smem, step) + n * 8 * KRows::kNumBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Pair16<T> pair = unpack_fp8<T, typename Config::Kv>(k[i]);
#pragma unroll
          for (int m = 0; m < Shape::kFragsM; ++m) mma_m16n8k16<T>(scores[m][n + i], q[m], pair.even, pair.odd);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < Shape::kFragsN; n += 2) {
        uint32_t k[4];
        ldmatrix_x4(k, KRows::advance(k_lane_smem, step * 2) + n * 8 * KRows::kNumBytes);
#pragma unroll
        for (int m = 0; m < Shape::kFragsM; ++m) {
          mma_m16n8k16<T>(scores[m][n], q[m], k[0], k[1]);
          mma_m16n8k16<T>(scores[m][n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }
}

// out += P V, P packed from the probabilities of 16 keys, whose rows of V start at v_smem.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void accumulate_output(float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                                  const uint32_t (&p)[Shape::kFragsM][4], uint32_t v_lane_smem) {
  using T = typename Config::Q;
  using VRows = typename Shape::VRows;
  if constexpr (Shape::kIsFp8V) {
    // Transposed 16-bit units hold two neighbouring columns of V, so that an mma's 8 columns are every other one of 16.
#pragma unroll
    for (int d = 0; d < Shape::kFragsD; d += 4) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, VRows::advance(v_lane_smem, d / 2));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Pair16<T> low = unpack_fp8<T, typename Config::Kv>(v[i]);
        const Pair16<T> high = unpack_fp8<T, typename Config::Kv>(v[i + 1]);
#pragma unroll
        for (int m = 0; m < Shape::kFragsM; ++m) {
          mma_m16n8k16<T>(out[m][d + i], p[m], low.even, high.even);
          mma_m16n8k16<T>(out[m][d + i + 1], p[m], low.odd, high.odd);
        }
      }
    }
  } else {
#pragma unroll
    for (int d = 0; d < Shape::kFragsD; d += 2) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, VRows::advance(v_lane_smem, d));
#pragma unroll
      for (int m = 0; m < Shape::kFragsM; ++m) {
        mma_m16n8k16<T>(out[m][d], p[m], v[0], v[1]);
        mma_m16n8k16<T>(out[m][d + 1], p[m], v[2], v[3]);
      }
    }
  }
}

}  // namespace flashinfer
