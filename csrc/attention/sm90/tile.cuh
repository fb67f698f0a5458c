// SPDX-License-Identifier: Apache-2.0
// Geometry of the Hopper kernel of prefill, its shared memory, and the unit of work that the roles pass on.
#pragma once

#include "attention/kv_view.cuh"
#include "attention/prefill/work.cuh"
#include "attention/score.cuh"
#include "attention/sm90/params.h"
#include "attention/visibility.cuh"
#include "device/kv_codec.cuh"
#include "device/sm90/mbarrier.cuh"
#include "device/sm90/warpgroup.cuh"
#include "device/sm90/wgmma.cuh"

namespace flashinfer::sm90 {

// What the tensor cores multiply: 8 bits if all of q, k and v have them, else 16.
template <class Q, class Kv>
struct OperandOf : CheapestOperand<Q, Kv> {};
template <>
struct OperandOf<fp8_e4m3, fp8_e4m3> {
  using Type = fp8_e4m3;
};

constexpr int kNumProducerWarps = kWarpgroupSize / 32;

template <class Config>
struct Shape {
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using T = typename OperandOf<Q, Kv>::Type;
  using Out = typename Config::Out;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr int kHeadDimQk = Config::kHeadDimQk, kHeadDimVo = Config::kHeadDimVo;
  static constexpr int kNumStages = Config::kNumStages, kNumQueryStages = Config::kNumQueryStages;

  // Warpgroups 0 to kNumConsumers - 1 compute 64 rows each, the last one brings in what they need. Of 16 bits they
  // overlap their own products and softmax, for which three have the registers if 128 are enough for scores,
  // probabilities and output, and where there are several they take turns at the tensor cores.
  static constexpr int kNumConsumers = kBlockM / 64, kRowsPerConsumer = 64, kRowsPerWarp = 16;
  static constexpr bool kOverlaps = sizeof(T) == 2;
  static_assert(!kOverlaps || kNumConsumers <= 2 || kBlockN / 2 + kBlockN / 4 + kHeadDimVo / 2 <= 128);
  static constexpr bool kTakesTurns = sizeof(T) == 2 && kNumConsumers > 1;
  // Scores that nothing happens to but a scale, of tiles that all rows see whole, are exponentiated by the maximum of
  // the tiles before, and not searched for a larger one: a fifth fewer instructions a tile. Short queries wait for
  // memory instead, but where others read the same KV: blocks of 16 x 16 523 TFLOP/s, else 486.
  static constexpr bool kTrustsLastMax =
      (kTakesTurns || Config::kSharesKv) && Score<Config>::kIsPlain && !Config::Function::kProvesTiles;
  // Where there is room for the queries of one unit, those of the next come as soon as the last scores are there, and
  // the output is not staged in their place.
  static constexpr bool kReleasesQueriesEarly = kNumQueryStages == 1;
  static constexpr int kNumConsumerThreads = kNumConsumers * kWarpgroupSize;
  static_assert(Config::kNumThreads == kNumConsumerThreads + kWarpgroupSize);
  // The tensor cores take 8-bit values along the keys only: a pair of the producers' warps transposes them.
  static constexpr bool kTransposesValues = sizeof(T) == 1;
  static constexpr int kNumTransposers = 2;
  // All of the producers' warps gather rows of KV (gather.cuh), or widen 8-bit keys and values under 16-bit queries
  // (widen.cuh), each its part of a tile.
  static constexpr bool kGathers = Config::kGathersKv, kWidens = sizeof(Kv) < sizeof(T);
  static constexpr bool kTogether = kGathers || kWidens;
  static constexpr int kRowsPerPart = kBlockN / kNumProducerWarps;
  static_assert(!kWidens || kNumConsumers <= 2, "it takes registers");
  static_assert(!(kGathers && kTransposesValues) || kRowsPerPart % 32 == 0);
  static_assert(!kWidens || kRowsPerPart % 8 == 0);
  // Whether consumers read what cp.async wrote.
  static constexpr bool kReadsCopies = kGathers && !kWidens;

  // Consumers wait for queries that cannot come ahead: the warp that has the schedule brings those of every other one.
  static constexpr int kNumQueryWarps = kReleasesQueriesEarly && !kTogether && !kTransposesValues ? 2 : 1;

  // Of a thread, in steps of 8: those that it starts with, and what becomes of them when producers give theirs away.
  // One block of two warpgroups starts with all that a thread can have. Widening takes what a short output leaves it.
  static constexpr int kLaunchRegisters = 65536 / (Config::kNumThreads * Config::kMinBlocksPerSm) / 8 * 8;
  static constexpr bool kMovesRegisters = kLaunchRegisters < 256;
  static constexpr bool kProvesTiles = Config::Function::kProvesTiles;
  static constexpr int kProducerRegisters = kWidens && kHeadDimVo <= 128 ? 72
                                            : kTogether || kProvesTiles  ? 56
                                            : kNumConsumers <= 2         ? 40
                                                                         : 32;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * (kNumConsumers + 1) - kProducerRegisters) / kNumConsumers / 8 * 8;

  static constexpr int kPanelColumns = kPanelBytes / sizeof(T), kProductDepth = 32 / sizeof(T);
  // Of 8-bit elements the last panel may be half empty: TMA fills it with zeros, which nobody multiplies.
  static constexpr int kQkPanels = ceil_div(kHeadDimQk, kPanelColumns);
  static constexpr int kVoPanels = ceil_div(kHeadDimVo, kPanelColumns);
  static constexpr int kQBytes = kRowsPerConsumer * kQkPanels * kPanelBytes;  // of one consumer
  static constexpr int kKBytes = kBlockN * kQkPanels * kPanelBytes, kVBytes = kBlockN * kVoPanels * kPanelBytes;
  static constexpr int kTransposedBytes = ceil_div(kBlockN, kPanelColumns) * kHeadDimVo * kPanelBytes;
  static constexpr int kNumScores = kBlockN / 2, kNumOutputs = kHeadDimVo / 2;  // of a thread
  static constexpr int kNumProbabilityRegisters = kNumScores * sizeof(T) / 4;
  static_assert(kBlockM % 64 == 0 && kBlockN % kProductDepth == 0);
  static_assert(kHeadDimQk % 64 == 0 && kHeadDimVo % 64 == 0);
  static_assert(!Score<Config>::kHasRope);
  static_assert(kHeadDimVo <= kHeadDimQk || kTransposesValues || kReleasesQueriesEarly,
                "the output is staged where the queries were");
};

__device__ __forceinline__ int consumer_idx() {
  return int(fresh_thread_idx() / kWarpgroupSize);
}

// A compile-time argument.
template <bool kValue>
struct Constant {
  __device__ __forceinline__ constexpr operator bool() const { return kValue; }
};

struct Work : PrefillUnit {
  int32_t is_end;  // no more work
};

constexpr int kNumWorkSlots = 2;  // the unit at hand and the next one

// Keys or values as they come in, where they are widened or transposed before the consumers see them.
template <int kNumStages, int kNumBytes>
struct Rows {
  alignas(1024) uint8_t stages[kNumStages][kNumBytes];
};
template <int kNumBytes>
struct Rows<0, kNumBytes> {};

// Where each warp that gathers finds the rows it copies.
template <class Shape, bool kExist = Shape::kReadsCopies>
struct RowAddresses {};
template <class Shape>
struct RowAddresses<Shape, true> {
  uint64_t of_warp[kNumProducerWarps][Shape::kRowsPerPart];
};

// What is left out of the units that are in the slots for them.
template <bool kExist>
struct Gaps {
  TileGap<true> of_slot[kNumWorkSlots];
};
template <>
struct Gaps<false> {};

// What the function proves of the tiles of the units in the slots, a bit each from first_tile on (proofs.cuh).
template <class Config, bool kExist = Config::Function::kProvesTiles>
struct Proofs {
  static constexpr int kMaxTiles = 1024;  // nothing is known of those behind them
  uint32_t some[kNumWorkSlots][kMaxTiles / 32], all[kNumWorkSlots][kMaxTiles / 32];
  Range range[kNumWorkSlots];  // key tiles inside of which the function alone hides keys
  int32_t first_tile[kNumWorkSlots];
  // What each look at entries found by the keys of a tile, two numbers, in one of so many places; not one where there
  // is no room.
  struct Remembered {
    int32_t request_idx, first_key, a, b;
  };
  static constexpr int kNumLooks = Config::Function::kNumLooksByKeys, kNumPlaces = Config::kNumRemembered;
  Remembered remembered[kNumLooks > 0 ? kNumLooks : 1][kNumPlaces > 0 ? kNumPlaces : 1];
};
template <class Config>
struct Proofs<Config, false> {};

template <class Config>
struct Smem {
  using Shape = sm90::Shape<Config>;
  alignas(1024)
      uint8_t q[Shape::kNumQueryStages][Shape::kNumConsumers][Shape::kQBytes];  // later, it may be, the output rows
  alignas(1024) uint8_t k[Shape::kNumStages][Shape::kKBytes];
  alignas(1024) uint8_t v[Shape::kNumStages][Shape::kTransposesValues ? Shape::kTransposedBytes : Shape::kVBytes];
  Rows<Shape::kTransposesValues ? Shape::kNumStages : Shape::kWidens,
       Shape::kTransposesValues ? Shape::kVBytes : Shape::kBlockN * Shape::kHeadDimVo>
      value_rows;
  Rows<Shape::kWidens, Shape::kBlockN * Shape::kHeadDimQk> key_rows;
  MbarrierRing<Shape::kNumQueryStages> q_full[Shape::kNumConsumers], q_empty[Shape::kNumConsumers];  // a turn a unit
  MbarrierRing<Shape::kNumStages> k_full, k_empty, v_full, v_empty;                                  // a turn a KV tile
  MbarrierRing<Shape::kNumStages> rows_full, rows_empty;  // likewise; of values that are transposed
  MbarrierRing<kNumWorkSlots> work_full, work_empty;      // a turn a unit
  Work work[kNumWorkSlots];
  RowAddresses<Shape> row_addresses;
  static constexpr bool kHasGap = Config::Function::kHasGap;
  [[no_unique_address]] Gaps<kHasGap> gaps;
  static constexpr bool kProvesTiles = Shape::kProvesTiles;
  // Not where tiles are sent for three ahead.
  static constexpr bool kSkipsTiles = kProvesTiles && !Shape::kWidens;
  [[no_unique_address]] Proofs<Config> proofs;
  FastDivisor group_size;
  uint32_t is_last;  // of the splits of a query tile to be done: merges
  Mbarrier key_part_full[kNumProducerWarps], value_part_full[kNumProducerWarps];  // a turn a KV tile, if it is widened

  // The producers' warps that go through the units: of queries, keys and values; or of queries, of keys and values, and
  // those that transpose; or all.
  static constexpr int kNumUnitProducers = Shape::kTogether           ? kNumProducerWarps
                                           : Shape::kTransposesValues ? 2 + Shape::kNumTransposers
                                                                      : 2 + Shape::kNumQueryWarps;

  __device__ __forceinline__ uint8_t* q_of(uint32_t unit_turn, int consumer_idx) {
    return q[unit_turn % Shape::kNumQueryStages][consumer_idx];
  }

  // Of the turn-th unit.
  __device__ __forceinline__ TileGap<kHasGap> gap_of(uint32_t turn) const {
    if constexpr (kHasGap) {
      return gaps.of_slot[turn % kNumWorkSlots];
    } else {
      return {};
    }
  }

  // Of the turn-th unit the tile that comes after this one: below it, and not proved to be hidden.
  __device__ __forceinline__ int tile_below(uint32_t turn, int tile) const {
    if constexpr (kSkipsTiles) {
      const int slot = turn % kNumWorkSlots, first_tile = proofs.first_tile[slot], idx = tile - 1 - first_tile;
      if (tile <= work[slot].item.tile_begin || idx >= proofs.kMaxTiles) return tile - 1;
      int word = idx / 32;
      uint32_t left = proofs.some[slot][word] & (0xffffffffu >> (31 - idx % 32));
      while (left == 0) left = proofs.some[slot][--word];  // that at tile_begin is not hidden
      return first_tile + word * 32 + 31 - __clz(left);
    }
    return tile - 1;
  }
  // Whether it is proved that the function hides nothing of the tile.
  __device__ __forceinline__ bool shows_all(uint32_t turn, int tile) const {
    if constexpr (!kProvesTiles) return false;
    const int slot = turn % kNumWorkSlots, idx = tile - proofs.first_tile[slot];
    return idx < proofs.kMaxTiles && (proofs.all[slot][idx / 32] >> idx % 32 & 1);
  }

  // By a consumer, until a stage of queries, keys or values is full.
  template <class Ring>
  __device__ __forceinline__ static void await(Ring& full, uint32_t turn) {
    full.wait_full(turn);
    if constexpr (Shape::kReadsCopies) fence_async_proxy();
  }
  // Both at once, for one fence.
  template <class Ring, class OtherRing>
  __device__ __forceinline__ static void await(Ring& full, uint32_t turn, OtherRing& other_full, uint32_t other_turn) {
    full.wait_full(turn);
    await(other_full, other_turn);
  }

  // By one thread, before any role starts.
  __device__ __forceinline__ void init(const Sm90PrefillParams& params) {
    constexpr int kNumConsumerWarps = Shape::kNumConsumers * 4;
    work_full.init(1);
    for (int i = 0; i < Shape::kNumConsumers; ++i) {
      q_full[i].init(Shape::kTogether ? kWarpgroupSize : 1);
      q_empty[i].init(kWarpgroupSize / 32);
    }
    constexpr int kNumKeyWriters = Shape::kWidens ? kNumProducerWarps : Shape::kGathers ? kWarpgroupSize : 1;
    constexpr int kNumTransposers = Shape::kGathers ? kNumProducerWarps : Shape::kNumTransposers;
    k_full.init(kNumKeyWriters);
    v_full.init(Shape::kTransposesValues ? kNumTransposers : kNumKeyWriters);
    rows_full.init(1);
    rows_empty.init(Shape::kNumTransposers);
    for (int i = 0; Shape::kWidens && i < kNumProducerWarps; ++i) {
      key_part_full[i].init(Shape::kGathers ? 32 : 1);
      value_part_full[i].init(Shape::kGathers ? 32 : 1);
    }
    k_empty.init(kNumConsumerWarps);
    v_empty.init(kNumConsumerWarps);
    work_empty.init(kNumConsumerWarps + kNumUnitProducers);
    fence_mbarrier_init();
    group_size = FastDivisor::of(params.num_qo_heads / params.num_kv_heads);
  }
};

// Named barriers.
enum Barrier : int { kTurnOfConsumer = 1, kConsumer = 5, kAllConsumers = 9 };

// Byte of a 16-byte granule of a row in a tile of panels, num_rows high.
__device__ __forceinline__ uint32_t granule_offset(int row, int granule, int num_rows) {
  return granule / 8 * (num_rows * kPanelBytes) + row * kPanelBytes + ((granule % 8 ^ row % 8) << 4);
}

}  // namespace flashinfer::sm90
