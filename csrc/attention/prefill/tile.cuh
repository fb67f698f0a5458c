// SPDX-License-Identifier: Apache-2.0
// A tile of prefill: its geometry, the shared memory of a block, and the products that one warp takes part in.
//
// Geometry. A block owns kBlockM query rows of one KV head; a row is (token, head in group), the head innermost, so
// that the rows of a group share every KV tile whatever the query length. Warp w owns rows [w * kRowsPerWarp,
// +kRowsPerWarp) as kFragsM fragments of 16. A KV tile is kBlockN rows. Scores, probabilities and output stay in
// registers in the mma layout (device/mma.cuh): lane l holds rows l / 4 and l / 4 + 8 of a fragment.
#pragma once

#include "attention/kv_view.cuh"
#include "attention/prefill/work.cuh"
#include "attention/score.cuh"
#include "attention/visibility.cuh"
#include "device/cp_async.cuh"
#include "device/kv_codec.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/rotary.cuh"
#include "device/swizzle.cuh"

namespace flashinfer {

// fresh_thread_idx() for the end of a unit. ptxas knows two reads of %tid.x for one and would keep, or spill, what the
// loop over tiles made of it; the result of a shuffle is news to it. By all lanes of a warp.
__device__ __forceinline__ uint32_t thread_idx_after_loop() {
  const uint32_t thread_idx = fresh_thread_idx();
  return __shfl_sync(0xffffffffu, thread_idx, thread_idx);
}

template <class Config>
struct PrefillShape {
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using Out = typename Config::Out;
  using T = typename QueryOperand<Q, Kv>::Type;  // what the tensor cores multiply
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr int kNumThreads = Config::kNumThreads, kNumWarps = kNumThreads / 32;
  static constexpr int kHeadDimQk = Config::kHeadDimQk, kHeadDimVo = Config::kHeadDimVo;
  static constexpr bool kHasRope = Score<Config>::kHasRope;
  using Codec = KvCodec<T, Kv>;
  static constexpr bool kPacksV = Codec::kPerRegister == 4;
  static constexpr bool kPacksK = kPacksV && !kHasRope;  // rotated keys are kept in T
  static constexpr bool kWidensQ = sizeof(Q) < sizeof(T);

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
  using NarrowQRows = SwizzledRows<kHeadDimQk>;  // of 8 bits, as they come in
  using OutRows = SwizzledRows<kHeadDimVo * 2>;
  using KRows = SwizzledRows<kHeadDimQk* int(sizeof(Kv))>;
  using KMmaRows = SwizzledRows<kHeadDimQk*(kPacksK ? 1 : 2)>;  // as the tensor cores' loads find them
  using VRows = SwizzledRows<kHeadDimVo* int(sizeof(Kv))>;
};

// A unit of work and what is made of it once. It stays in shared memory, where it costs no registers.
struct alignas(16) PrefillWork : PrefillUnit {
  FastDivisor group_size;  // the same in every unit
  const void* k_gmem;      // the KV head's part of row 0
  const void* v_gmem;

  __device__ __forceinline__ int32_t num_rows(int32_t block_m) const {
    return PrefillUnit::num_rows(group_size.divisor, block_m);
  }
  // `row` counts from the first of the query tile.
  template <class Shape>
  __device__ __forceinline__ QueryRow query_row(int row) const {
    return PrefillUnit::query_row(group_size, item.q_tile * Shape::kBlockM + row);
  }
};

// Where a KV tile stays in shared memory.
template <class Config>
__device__ __forceinline__ uint32_t stage_of(int tile) {
  return uint32_t(tile) % Config::kNumStages;
}

// A warp's rows, kept where a function proves tiles of them.
template <bool kExist>
struct ProvedRows : TileRows {};
template <>
struct ProvedRows<false> {
  __device__ __forceinline__ operator TileRows() const { return {}; }
};

// The KV tiles that one warp's rows see at all, and those they see whole: the others among the seen need masking.
template <class Config>
struct WarpTiles : ProvedRows<Config::Function::kProvesTiles> {
  using Shape = PrefillShape<Config>;
  using Rows = ProvedRows<Config::Function::kProvesTiles>;
  Range seen, whole;

  __device__ __forceinline__ static WarpTiles of(const PrefillParams& params, const PrefillWork& work, int first_row) {
    const int32_t last_row = min(first_row + Shape::kRowsPerWarp, work.num_rows(Shape::kBlockM)) - 1;
    if (last_row < first_row) return {{}, {0, 0}, {0, 0}};
    const auto visibility = visibility_of<Config>(params, work.item.request_idx);
    const int32_t kv_len = work.item.kv_len;
    const int32_t first = work.position(work.template query_row<Shape>(first_row));
    const int32_t last = work.position(work.template query_row<Shape>(last_row));
    Rows rows;
    if constexpr (Config::Function::kProvesTiles) {
      const int32_t group_size = work.group_size.divisor, first_head = work.kv_head_idx * group_size;
      rows = {{{first_head, first_head + group_size - 1}, {first, last}}};
    }
    return {rows, visibility.tiles_seen(first, last, kv_len, Shape::kBlockN),
            visibility.tiles_seen_whole(first, last, kv_len, Shape::kBlockN)};
  }
};

template <class Config>
struct PrefillSmem {
  using Shape = PrefillShape<Config>;
  static constexpr bool kIsPaged = Config::kKvStorage == kKvPaged;

  // Each warp's rows; those of 8 bits come into the second half of its part. Later the warp's output rows.
  alignas(128) uint8_t q[Shape::kBlockM * Shape::kHeadDimQk * 2];
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
  TileGap<Config::Function::kHasGap> gap;  // of the unit
};

// Rotates rows [0, num_rows) of a tile for positions first_position + position_of(row), from storage type Src to T. A
// worker takes one granule of 8 elements of the first half of the row and its partners in the second.
template <class Config, class Src, class SrcRows, class PositionOf>
__device__ __forceinline__ void rotate_rows(const PrefillParams& params, const uint8_t* src_smem, uint8_t* dst_smem,
                                            int num_rows, int worker, int num_workers, const PositionOf& position_of) {
  using Shape = PrefillShape<Config>;
  using T = typename Shape::T;
  constexpr int kHalf = Shape::kHeadDimQk / 2, kNumPieces = kHalf / 8;
  const int piece = worker % kNumPieces;
  if (worker >= num_workers / kNumPieces * kNumPieces) return;
  uint64_t frequencies[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) frequencies[i] = params.rope_frequencies[piece * 8 + i];
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
      const CosSin angle = rotary_cos_sin(position, frequencies[i]);
      const float rotated = x[i] * angle.cos - y[i] * angle.sin;
      y[i] = y[i] * angle.cos + x[i] * angle.sin;
      x[i] = rotated;
    }
    cast_vec<T>(x).store(reinterpret_cast<T*>(dst_smem + Shape::QRows::offset(row, piece)));
    cast_vec<T>(y).store(reinterpret_cast<T*>(dst_smem + Shape::QRows::offset(row, piece + kNumPieces)));
  }
}

// Where a warp's query rows of 8 bits come in, from the start of its part of PrefillSmem::q.
template <class Shape>
constexpr int kNarrowQOffset = Shape::kRowsPerWarp * Shape::kHeadDimQk;

// Query rows of 8 bits become those of T, over which they lie, from the first to the last. Keys left in fp8 have the
// order of prepare_q.
template <class Shape>
__device__ __forceinline__ void widen_q(uint8_t* rows_smem, int lane_idx) {
  using Codec = KvCodec<typename Shape::T, typename Shape::Q>;
  using Rows = typename Shape::NarrowQRows;
  constexpr int kNumGranules = Shape::kRowsPerWarp * Rows::kNumGranules;
  static_assert(kNumGranules % 32 == 0);
#pragma unroll 1
  for (int i = lane_idx; i < kNumGranules; i += 32) {
    const int row = i / Rows::kNumGranules, granule = i % Rows::kNumGranules;
    const uint4 x = *reinterpret_cast<const uint4*>(rows_smem + kNarrowQOffset<Shape> + Rows::offset(row, granule));
    __syncwarp();  // what is written lies where these were, or ones before
    uint4 low, high;
    if constexpr (Shape::kPacksK) {
      low = {Codec::pair(x.x, kBytes02), Codec::pair(x.y, kBytes02), Codec::pair(x.z, kBytes02),
             Codec::pair(x.w, kBytes02)};
      high = {Codec::pair(x.x, kBytes13), Codec::pair(x.y, kBytes13), Codec::pair(x.z, kBytes13),
              Codec::pair(x.w, kBytes13)};
    } else {
      low = {Codec::pair(x.x, kBytes01), Codec::pair(x.x, kBytes23), Codec::pair(x.y, kBytes01),
             Codec::pair(x.y, kBytes23)};
      high = {Codec::pair(x.z, kBytes01), Codec::pair(x.z, kBytes23), Codec::pair(x.w, kBytes01),
              Codec::pair(x.w, kBytes23)};
    }
    *reinterpret_cast<uint4*>(rows_smem + Shape::QRows::offset(row, 2 * granule)) = low;
    *reinterpret_cast<uint4*>(rows_smem + Shape::QRows::offset(row, 2 * granule + 1)) = high;
    __syncwarp();
  }
}

// Widens and rotates the warp's query rows, and, for keys left in fp8, reorders each 16 columns as even ones, then odd
// ones: the order in which the codec hands out a key's elements (a dot product does not mind).
template <class Config>
__device__ __forceinline__ void prepare_q(const PrefillParams& params, const PrefillWork& work, uint8_t* q_smem,
                                          int first_row) {
  using Shape = PrefillShape<Config>;
  const int lane_idx = int(fresh_thread_idx() % 32);
  uint8_t* rows_smem = q_smem + first_row * Shape::kHeadDimQk * 2;  // 16-row aligned: the swizzle does not change
  if constexpr (Shape::kWidensQ) widen_q<Shape>(rows_smem, lane_idx);
  if constexpr (Shape::kHasRope) {
    rotate_rows<Config, typename Shape::T, typename Shape::QRows>(
        params, rows_smem, rows_smem, Shape::kRowsPerWarp, lane_idx, 32,
        [&](int row) { return work.position(work.template query_row<Shape>(first_row + row)); });
    __syncwarp();
  }
  if constexpr (Shape::kPacksK && !Shape::kWidensQ) {
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
__device__ __forceinline__ const uint8_t* prepare_k(const PrefillParams& params, PrefillSmem<Config>& smem, int tile) {
  using Shape = PrefillShape<Config>;
  const uint8_t* k_smem = smem.k[stage_of<Config>(tile)];
  if constexpr (!Shape::kHasRope) return k_smem;
  const int first_kv = smem.gap.key_tile(tile) * Shape::kBlockN;
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
  using T = typename Shape::T;
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
      (Shape::kPacksK ? KRows::offset(lane_idx, 0) : KRows::offset(lane_idx % 8 + lane_idx / 16 * 8, lane_idx / 8 % 2));
#pragma unroll
  for (int step = 0; step < Shape::kHeadDimQk / 16; ++step) {
    uint32_t q[Shape::kFragsM][4];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
      ldmatrix_x4(q[m], QRows::advance(q_lane_smem, step * 2) + m * 16 * QRows::kNumBytes);
    }
    if constexpr (Shape::kPacksK) {
#pragma unroll
      for (int n = 0; n < Shape::kFragsN; n += 4) {
        uint32_t k[4];
        ldmatrix_x4(k, KRows::advance(k_lane_smem, step) + n * 8 * KRows::kNumBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t even = Shape::Codec::pair(k[i], kBytes02), odd = Shape::Codec::pair(k[i], kBytes13);
#pragma unroll
          for (int m = 0; m < Shape::kFragsM; ++m) mma_m16n8k16<T>(scores[m][n + i], q[m], even, odd);
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
  using T = typename Shape::T;
  using VRows = typename Shape::VRows;
  if constexpr (Shape::kPacksV) {
    // Transposed 16-bit units hold two neighbouring columns of V, so that an mma's 8 columns are every other one of 16.
#pragma unroll
    for (int d = 0; d < Shape::kFragsD; d += 4) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, VRows::advance(v_lane_smem, d / 2));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t even[2], odd[2];  // of keys 0 to 7 and 8 to 15
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          even[j] = Shape::Codec::pair(v[i + j], kBytes02);
          odd[j] = Shape::Codec::pair(v[i + j], kBytes13);
        }
#pragma unroll
        for (int m = 0; m < Shape::kFragsM; ++m) {
          mma_m16n8k16<T>(out[m][d + i], p[m], even[0], even[1]);
          mma_m16n8k16<T>(out[m][d + i + 1], p[m], odd[0], odd[1]);
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
