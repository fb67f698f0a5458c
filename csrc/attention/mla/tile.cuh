// SPDX-License-Identifier: Apache-2.0
// A tile of latent attention on mma.sync: its geometry, the shared memory of a block, and the two products.
//
// Geometry. A block owns kBlockM query rows and all columns of their output, which fill the registers of its warps: a
// warp has all rows of kNumColumns columns. Scores are shared out otherwise (MlaSplit): a product of a few rows with a
// few keys over a part of the columns, so that shared memory is read less. The parts are added up in shared memory, and
// there the probabilities become known to all. Keys are values: a KV tile comes in once.
#pragma once

#include "attention/mla/params.h"
#include "attention/prefill/load.cuh"
#include "device/fragment.cuh"
#include "device/named_barrier.cuh"

namespace flashinfer {

template <class Config>
struct MlaShape {
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using Kpe = typename Config::Kpe;
  using T = typename CheapestOperand<Q, Kv>::Type;  // what is multiplied
  static constexpr bool kHasScales = Config::kScaleBlock > 0;
  using PeT = typename CheapestOperand<Q, Kpe>::Type;  // of the part that has positions
  using Codec = KvCodec<T, Kv>;
  static constexpr bool kPacksV = Codec::kPerRegister == 4;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kNumStages = Config::kNumStages;
  static constexpr int kNumAhead = kNumStages - 1;  // KV tiles in flight
  static constexpr int kNumThreads = Config::kNumThreads, kNumWarps = kNumThreads / 32;
  static constexpr int kHeadDimCkv = Config::kHeadDimCkv, kHeadDimKpe = Config::kHeadDimKpe;
  static constexpr bool kReadsOnce = kBlockM == 16;  // of most requests one query tile: no other will ask for its keys
  static constexpr bool kKeepsQ = Config::kKeepsQ;   // the queries stay in registers

  static constexpr int kNumColumns = kHeadDimCkv / kNumWarps;  // of the output, of a warp
  static constexpr int kFragsM = kBlockM / 16, kFragsD = kNumColumns / 8;
  // Scores are made of panels of 64 columns.
  static constexpr int kCkvPanels = kHeadDimCkv / 64, kPePanels = kHeadDimKpe / 64, kPanels = kCkvPanels + kPePanels;
  static_assert(kNumColumns % 32 == 0 && kHeadDimCkv % 64 == 0 && kHeadDimKpe % 64 == 0);

  // Where 64 rows fill the registers, addresses are made where they are used; else once.
  __device__ __forceinline__ static uint32_t thread_idx() {
    if constexpr (kBlockM == 64) return fresh_thread_idx();
    return threadIdx.x;
  }

  using QRows = SwizzledRows<kHeadDimCkv * 2>;
  using QPeRows = SwizzledRows<128>;
  using KvRows = SwizzledRows<kHeadDimCkv* int(sizeof(Kv))>;
  using KpeRows = SwizzledRows<64 * int(sizeof(Kpe))>;
  static constexpr int kQBytes = kBlockM * kHeadDimCkv * 2, kQPeBytes = kBlockM * kHeadDimKpe * 2;
  static constexpr int kCkvBytes = kBlockN * kHeadDimCkv * int(sizeof(Kv)),
                       kKpeBytes = kBlockN * kHeadDimKpe * int(sizeof(Kpe));
  // Of a key with scales, 16 bytes: one for each column block of 128.
  static constexpr int kScalesOffset = kCkvBytes + kKpeBytes, kScalesBytes = kHasScales ? kBlockN * 16 : 0;
  static constexpr int kStageBytes = kScalesOffset + kScalesBytes;
  static_assert(!kHasScales || (Config::kScaleBlock == 128 && kHeadDimCkv == 4 * 128 && kHeadDimKpe > 0 && kPacksV &&
                                sizeof(Kpe) == 2));
};

// How scores are shared out: warps by rows, by keys, and by columns of queries and keys. Those that differ in the
// latter alone are a group. Of its fragments of 8 keys, each warp in the end owns kNumOwned, or, where there are too
// few, none.
template <class Config>
struct MlaSplit {
  using Shape = MlaShape<Config>;
  static constexpr int kWarpsM = Shape::kBlockM < 32 ? 1 : 2, kWarpsK = Shape::kBlockM < 64 ? 4 : 2,
                       kWarpsN = Shape::kNumWarps / (kWarpsM * kWarpsK);
  static constexpr int kFragsM = Shape::kBlockM / 16 / kWarpsM, kFragsN = Shape::kBlockN / 8 / kWarpsN;
  static constexpr int kNumFrags = kFragsM * kFragsN, kNumOwned = ceil_div(kNumFrags, kWarpsK);
  static constexpr int kNumOwners = kNumFrags / kNumOwned;  // of a group
  static constexpr int kSteps = 4 / kWarpsK;                // of 16 columns, of a panel
  static_assert(kFragsM >= 1 && kFragsN % kNumOwned == 0, "what a warp owns is of 16 rows");
  static_assert(kNumOwners * kNumOwned == kNumFrags && kFragsN % (Shape::kPacksV ? 4 : 2) == 0);

  // A warp's columns, in steps of 16: the same of every panel; of ckv with scales panel after panel, so that the scales
  // are few.
  static constexpr int kCkvSteps = Shape::kCkvPanels * kSteps, kPeSteps = Shape::kPePanels * kSteps;
  static constexpr int kStepsOfPanel = Shape::kHasScales ? 4 : kSteps;
  static constexpr int kScalesOfWarp = 4 / kWarpsK, kStepsOfScale = 8;
  // Where those of ckv and of kpe begin.
  __device__ __forceinline__ int first_ckv_step() const { return k * (Shape::kHasScales ? kCkvSteps : kSteps); }
  __device__ __forceinline__ int first_pe_step() const { return k * kSteps; }

  // The fragments that a group passes on at a time, then its probabilities.
  static constexpr int kNumRounds = kNumOwned >= 4 ? 2 : 1, kNumPassed = kNumOwned / kNumRounds;
  using PRows = SwizzledRows<kFragsN * 16>;
  static constexpr int kFragBytes = 32 * 16, kSlotsBytes = kNumOwners * kNumPassed * (kWarpsK - 1) * kFragBytes,
                       kPBytes = kFragsM * 16 * PRows::kNumBytes;
  // Of few rows, which leave room, probabilities have a place of their own, and wait for no reader of the fragments.
  static constexpr bool kPIsApart = Shape::kBlockM == 16;
  static constexpr int kPOffset = kPIsApart ? kSlotsBytes : 0;
  static constexpr int kGroupBytes = kPIsApart ? kSlotsBytes + kPBytes : kSlotsBytes > kPBytes ? kSlotsBytes : kPBytes;
  static constexpr int kBytes = kWarpsM * kWarpsN * kGroupBytes;
  // Warps that own keys of one row.
  static constexpr int kNumParts = Shape::kBlockN / (8 * kNumOwned);

  int m, n, k;  // of this warp

  __device__ __forceinline__ static MlaSplit of(uint32_t warp_idx) {
    return {int(warp_idx / (kWarpsN * kWarpsK)), int(warp_idx / kWarpsK % kWarpsN), int(warp_idx % kWarpsK)};
  }
  __device__ __forceinline__ int group() const { return m * kWarpsN + n; }
  __device__ __forceinline__ bool is_owner() const { return kNumOwners == kWarpsK || k < kNumOwners; }
  // Where what this warp owns begins: among the group's fragments of 16 rows and of 8 keys.
  __device__ __forceinline__ int owned_m() const { return k * kNumOwned / kFragsN; }
  __device__ __forceinline__ int owned_n() const { return k * kNumOwned % kFragsN; }
  // In the tile.
  __device__ __forceinline__ int owned_row() const { return (m * kFragsM + owned_m()) * 16; }
  __device__ __forceinline__ int owned_key() const { return (n * kFragsN + owned_n()) * 8; }
  __device__ __forceinline__ int part() const { return owned_key() / (8 * kNumOwned); }
};

template <class Config>
struct MlaSmem {
  using Shape = MlaShape<Config>;
  using Split = MlaSplit<Config>;

  alignas(128) uint8_t q[Shape::kKeepsQ ? 128 : Shape::kQBytes + Shape::kQPeBytes];  // ckv's columns, then kpe's
  alignas(128) uint8_t kv[Shape::kNumStages][Shape::kStageBytes];                    // likewise
  alignas(128) uint8_t exchange[Split::kBytes];
  PrefillUnit work, next_work;
  FastDivisor group_size;
  uint32_t has_work, has_next, has_late;
  float max_of_row[Shape::kBlockM];         // of the unscaled scores; lags behind
  float factor_of_row[Shape::kBlockM];      // of the output
  uint32_t largest_of_row[Shape::kBlockM];  // the largest magnitude in it, as bits: those of floats are in their order
  float stats[Split::kNumParts * Shape::kBlockM];

  __device__ __forceinline__ uint8_t* stage(int tile) { return kv[uint32_t(tile) % Shape::kNumStages]; }
  // Where the queries come in. Before they are kept in registers, they have the place of the first tile that is sent
  // for in the loop.
  __device__ __forceinline__ uint8_t* queries(int last_tile) {
    static_assert(!Shape::kKeepsQ || Shape::kQBytes + Shape::kQPeBytes <= Shape::kStageBytes);
    return Shape::kKeepsQ ? stage(last_tile + 1) : q;
  }
};

// Of the queries, what a warp multiplies: of all steps, where they are kept.
template <class Config, class Shape = MlaShape<Config>, class Split = MlaSplit<Config>>
struct MlaQueries {
  static constexpr int kNumKept = Shape::kKeepsQ ? Split::kCkvSteps + Split::kPeSteps : 1;
  uint32_t kept[kNumKept][Split::kFragsM][4];

  // i: the warp's steps of ckv, then those of kpe.
  __device__ __forceinline__ static void load(uint32_t (&q)[Split::kFragsM][4], uint32_t q_smem, const Split& split,
                                              int i) {
    const int lane_idx = int(Shape::thread_idx() % 32), row = split.m * Split::kFragsM * 16 + lane_idx % 16;
#pragma unroll
    for (int m = 0; m < Split::kFragsM; ++m) {
      if (i < Split::kCkvSteps) {
        using Rows = typename Shape::QRows;
        const int panel = i / Split::kStepsOfPanel, step = i % Split::kStepsOfPanel;
        const uint32_t lane_smem = q_smem + Rows::offset(row, split.first_ckv_step() * 2 + lane_idx / 16);
        ldmatrix_x4(q[m], Rows::advance(lane_smem, panel * 8 + step * 2) + m * 16 * Rows::kNumBytes);
      } else {
        using Rows = typename Shape::QPeRows;
        const int step = i - Split::kCkvSteps;
        const uint32_t lane_smem =
            q_smem + Shape::kQBytes + Rows::offset(row, split.first_pe_step() * 2 + lane_idx / 16);
        ldmatrix_x4(q[m], Rows::advance(lane_smem, step * 2) + m * 16 * Rows::kNumBytes);
      }
    }
  }
  __device__ __forceinline__ void keep(uint32_t q_smem, const Split& split) {
#pragma unroll
    for (int i = 0; i < kNumKept; ++i) load(kept[i], q_smem, split, i);
  }
};

// A scale of a key of the tile.
__device__ __forceinline__ float load_scale(uint32_t scales_smem, int key, int block) {
  float scale;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(scales_smem + key * 16 + block * 4));
  return scale;
}

// scores = Q Kᵀ of the warp's rows, keys and columns.
template <class Config>
struct LatentScores {
  using Shape = MlaShape<Config>;
  using Split = MlaSplit<Config>;
  using Scores = float[Split::kNumFrags][4];
  static constexpr bool kPacksPe = Shape::kPacksV && !Shape::kHasScales;

  const MlaQueries<Config>& queries;
  uint32_t q_smem, kv_smem;
  const Split& split;

  __device__ __forceinline__ void compute(Scores& scores) const {
    clear(scores);
    if constexpr (Shape::kHasScales) {
      static_assert(Split::kScalesOfWarp <= 2);
      const int first_block = split.k * Split::kScalesOfWarp;
      add_ckv(scores, 0, Split::kStepsOfScale);
      if constexpr (Split::kScalesOfWarp == 1) {
        scale(scores, [&](int key) { return scale_of(key, first_block); });
      } else {  // x a + y b = (x a / b + y) b, in place: there are no registers for x besides y
        scale(scores, [&](int key) { return __fdividef(scale_of(key, first_block), divisor_of(key, first_block)); });
        add_ckv(scores, Split::kStepsOfScale, 2 * Split::kStepsOfScale);
        scale(scores, [&](int key) { return divisor_of(key, first_block); });
      }
    } else {
      add_ckv(scores, 0, Split::kCkvSteps);
    }
    if constexpr (Shape::kPePanels > 0) add_pe(scores);
  }

 private:
  __device__ __forceinline__ static int lane_idx() { return int(Shape::thread_idx() % 32); }
  __device__ __forceinline__ static void clear(Scores& scores) {
#pragma unroll
    for (int i = 0; i < Split::kNumFrags; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0.f;
    }
  }
  // The key and the granule of the lane's row in the first load.
  template <bool kPacks>
  __device__ __forceinline__ int lane_key() const {
    return split.n * Split::kFragsN * 8 + (kPacks ? lane_idx() : lane_idx() % 8 + lane_idx() / 16 * 8);
  }
  template <bool kPacks>
  __device__ __forceinline__ static int lane_granule(int first_step) {
    return first_step * (kPacks ? 1 : 2) + (kPacks ? 0 : lane_idx() / 8 % 2);
  }

  __device__ __forceinline__ void add_ckv(Scores& scores, int first, int end) const {
    constexpr int kGranulesPerStep = Shape::kPacksV ? 1 : 2, kStepsOfPanel = Split::kStepsOfPanel;
    using Rows = typename Shape::KvRows;
    const uint32_t lane_smem =
        kv_smem + Rows::offset(lane_key<Shape::kPacksV>(), lane_granule<Shape::kPacksV>(split.first_ckv_step()));
#pragma unroll
    for (int i = first; i < end; ++i) {
      const int distance = (i / kStepsOfPanel * 4 + i % kStepsOfPanel) * kGranulesPerStep;
      add_step<typename Shape::T, Rows, Shape::kPacksV>(scores, i, lane_smem, distance);
    }
  }
  __device__ __forceinline__ void add_pe(Scores& scores) const {
    using Rows = typename Shape::KpeRows;
    const uint32_t lane_smem =
        kv_smem + Shape::kCkvBytes + Rows::offset(lane_key<kPacksPe>(), lane_granule<kPacksPe>(split.first_pe_step()));
#pragma unroll
    for (int i = 0; i < Split::kPeSteps; ++i) {
      add_step<typename Shape::PeT, Rows, kPacksPe>(scores, Split::kCkvSteps + i, lane_smem, i * (kPacksPe ? 1 : 2));
    }
  }

  // The i-th step, of keys that lie `distance` granules behind those of the first.
  template <class T, class Rows, bool kPacks>
  __device__ __forceinline__ void add_step(Scores& scores, int i, uint32_t lane_smem, int distance) const {
    uint32_t q[Split::kFragsM][4];
    if constexpr (!Shape::kKeepsQ) MlaQueries<Config>::load(q, q_smem, split, i);
    const auto& a = Shape::kKeepsQ ? queries.kept[Shape::kKeepsQ ? i : 0] : q;
    const auto multiply = [&](int n, uint32_t b0, uint32_t b1) {
#pragma unroll
      for (int m = 0; m < Split::kFragsM; ++m) mma_m16n8k16<T>(scores[m * Split::kFragsN + n], a[m], b0, b1);
    };
#pragma unroll
    for (int n = 0; n < Split::kFragsN; n += kPacks ? 4 : 2) {
      uint32_t k[4];
      ldmatrix_x4(k, Rows::advance(lane_smem, distance) + n * 8 * Rows::kNumBytes);
      if constexpr (kPacks) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply(n + j, Shape::Codec::pair(k[j], kBytes02), Shape::Codec::pair(k[j], kBytes13));
        }
      } else {
        multiply(n, k[0], k[1]);
        multiply(n + 1, k[2], k[3]);
      }
    }
  }

  __device__ __forceinline__ float scale_of(int key, int block) const {
    return load_scale(kv_smem + Shape::kScalesOffset, key, block);
  }
  // That of the second of two blocks, or, where it is next to nothing beside that of the first, something else that is.
  __device__ __forceinline__ float divisor_of(int key, int block) const {
    return fmaxf(fmaxf(scale_of(key, block + 1), scale_of(key, block) * 0x1p-60f), 0x1p-120f);
  }
  // scores *= factor_of(their key)
  template <class Factor>
  __device__ __forceinline__ void scale(Scores& scores, const Factor& factor_of) const {
    const int first_key = split.n * Split::kFragsN * 8 + lane_column(lane_idx());
#pragma unroll
    for (int n = 0; n < Split::kFragsN; ++n) {
      const float factors[2] = {factor_of(first_key + n * 8), factor_of(first_key + n * 8 + 1)};
#pragma unroll
      for (int m = 0; m < Split::kFragsM; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[m * Split::kFragsN + n][j] *= factors[j % 2];
      }
    }
  }
};

// out += P V of the warp's columns.
// weigh(p, step) multiplies the probabilities of 16 keys.
template <class Config, class Weigh, class Shape = MlaShape<Config>>
__device__ __forceinline__ void accumulate_latent_output(float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                                         uint32_t p_smem, uint32_t kv_smem, const Weigh& weigh) {
  using T = typename Shape::T;
  using Split = MlaSplit<Config>;
  using PRows = typename Split::PRows;
  using VRows = typename Shape::KvRows;
  const uint32_t thread_idx = Shape::thread_idx();
  const int lane_idx = int(thread_idx % 32);
  const int first_granule = int(thread_idx / 32) * (VRows::kNumGranules / Shape::kNumWarps);
  const uint32_t p_lane_smem = p_smem + Split::kPOffset + PRows::offset(lane_idx % 16, lane_idx / 16);
  const uint32_t v_lane_smem = kv_smem + VRows::offset(lane_idx % 16, first_granule + lane_idx / 16);
#pragma unroll
  for (int step = 0; step < Shape::kBlockN / 16; ++step) {
    constexpr int kStepsOfGroup = Split::kFragsN / 2;
    uint32_t p[Shape::kFragsM][4];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
      const int group = m / Split::kFragsM * Split::kWarpsN + step / kStepsOfGroup;
      ldmatrix_x4(p[m], PRows::advance(p_lane_smem, step % kStepsOfGroup * 2) + group * Split::kGroupBytes +
                            m % Split::kFragsM * 16 * PRows::kNumBytes);
    }
    weigh(p, step);
    const uint32_t step_smem = v_lane_smem + step * 16 * VRows::kNumBytes;
    const auto multiply = [&](int d, uint32_t b0, uint32_t b1) {
#pragma unroll
      for (int m = 0; m < Shape::kFragsM; ++m) mma_m16n8k16<T>(out[m][d], p[m], b0, b1);
    };
    if constexpr (Shape::kPacksV) {  // as in prefill/tile.cuh
#pragma unroll
      for (int d = 0; d < Shape::kFragsD; d += 4) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, VRows::advance(step_smem, d / 2));
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          multiply(d + i, Shape::Codec::pair(v[i], kBytes02), Shape::Codec::pair(v[i + 1], kBytes02));
          multiply(d + i + 1, Shape::Codec::pair(v[i], kBytes13), Shape::Codec::pair(v[i + 1], kBytes13));
        }
      }
    } else {
#pragma unroll
      for (int d = 0; d < Shape::kFragsD; d += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, VRows::advance(step_smem, d));
        multiply(d, v[0], v[1]);
        multiply(d + 1, v[2], v[3]);
      }
    }
  }
}

}  // namespace flashinfer
