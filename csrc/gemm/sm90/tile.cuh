// SPDX-License-Identifier: Apache-2.0
// Geometry of the Hopper kernel of products, and its shared memory.
#pragma once

#include "device/mailbox.cuh"
#include "device/sm90/tma.cuh"
#include "device/sm90/warpgroup.cuh"
#include "device/sm90/wgmma.cuh"
#include "gemm/sm90/params.h"
#include "gemm/tiles.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GemmShape {
  using T = typename Config::T;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kNumStages = Config::kNumStages;
  static constexpr bool kDepthMajor = Config::kDepthMajor, kIsScaled = Config::kScaleColumns != 0;

  // Blocks of a cluster: kShares neighbours along the columns, each of which brings in a part of the rows that all of
  // them multiply, and kSplits along the depth, who add up their sums.
  static constexpr int kShares = Config::kShares, kSplits = Config::kSplits, kClusterSize = Config::kClusterSize;
  static_assert(kClusterSize == kShares * kSplits && kBlockM % (8 * kShares) == 0);

  // Warpgroups 0 to kNumConsumers - 1 compute kWaves times 64 rows each, the last one brings in what they need.
  static constexpr int kNumConsumers = kBlockM > 64 ? 2 : 1, kWaves = kBlockM / 64 / kNumConsumers;
  static_assert(kBlockM == 64 * kNumConsumers * kWaves && kBlockM <= 256 && kBlockN <= 256);
  static_assert(Config::kNumThreads == (kNumConsumers + 1) * kWarpgroupSize);
  static constexpr int kNumSums = kBlockN / 2;  // of a thread, of 64 rows
  // The products of a step while those of the one before are scaled. Two waves, or more columns, have no registers for
  // it.
  static constexpr bool kOverlaps = kIsScaled && kWaves == 1 && kBlockN <= 128;

  static constexpr int kLaunchRegisters = 65536 / (Config::kNumThreads * Config::kMinBlocksPerSm) / 8 * 8;
  static constexpr bool kMovesRegisters = kLaunchRegisters < 256;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMostRegisters =
      (kLaunchRegisters * (kNumConsumers + 1) - kProducerRegisters) / kNumConsumers / 8 * 8;
  static constexpr int kConsumerRegisters = kMostRegisters < 240 ? kMostRegisters : 240;

  // A step is 128 bytes of a row: four products of 32 bytes.
  static constexpr int kDepth = kPanelBytes / sizeof(T), kProducts = 4;
  static constexpr int kABytes = kBlockM * kPanelBytes, kBBytes = kBlockN * kPanelBytes;
  static constexpr int kPanelColumns = kPanelBytes / sizeof(T);  // of b, where its rows are steps of the depth
  static_assert(kDepthMajor || (sizeof(T) == 2 && kBlockN % kPanelColumns == 0));
  static_assert(!kIsScaled || (kDepth == kScaleBlock && Config::kScaleColumns == kScaleBlock));

  // Runs of a tile's columns that share scales of b.
  static constexpr int kScaleRuns = kBlockN <= kScaleBlock ? 1 : kBlockN / 64;
  static_assert(!kIsScaled || kScaleBlock % (kBlockN / kScaleRuns) == 0);

  // Of the sums, each split has the columns of a slice to finish: groups of 8.
  static constexpr int kSliceGroups = kBlockN / 8 / kSplits;
  static_assert(kSplits == 1 || (kWaves == 1 && kBlockN % (8 * kSplits) == 0));

  // Whether TMA stores sums: it takes 0.3 us longer, while a block of few rows has nothing else to do.
  static constexpr bool kTmaStores = kBlockM > 64;
  static constexpr int kStoredPanels = kBlockN * int(sizeof(typename Config::Out)) / kPanelBytes;

  using Tiles = GemmTiles<kBlockM, kBlockN * kShares>;
};

template <class Shape, bool kExist = Shape::kIsScaled>
struct GemmScales {
  __device__ __forceinline__ void init() {}
};
template <class Shape>
struct GemmScales<Shape, true> {
  alignas(128) float a[Shape::kNumStages][Shape::kBlockM];
  float b[Shape::kNumStages][Shape::kScaleRuns];
  MbarrierRing<Shape::kNumStages> full;

  __device__ __forceinline__ void init() { full.init(33); }  // the warp that brings them, and who has TMA bring some
};

// Where sums go on their way out: 16 rows of a warp, as TMA takes them; or those that the other splits have of this
// one's slice.
template <class Shape, bool kExchanges = (Shape::kSplits > 1)>
struct GemmExchange {
  alignas(1024) uint8_t rows[Shape::kWaves][Shape::kStoredPanels][Shape::kNumConsumers * 4][16 * kPanelBytes];
};
template <class Shape>
struct GemmExchange<Shape, true> {
  float2 sums[Shape::kSplits - 1][2 * Shape::kSliceGroups][Shape::kNumConsumers * kWarpgroupSize];
};

template <class Config>
struct GemmSmem {
  using Shape = GemmShape<Config>;
  alignas(1024) uint8_t a[Shape::kNumStages][Shape::kABytes];
  alignas(1024) uint8_t b[Shape::kNumStages][Shape::kBBytes];
  GemmExchange<Shape> exchange;
  GemmScales<Shape> scales;
  MbarrierRing<Shape::kNumStages> full, empty;  // a turn a step
  Mailbox<Shape::kClusterSize> mailbox;

  __device__ __forceinline__ void init() {
    scales.init();
    full.init(1);                                           // who copies
    empty.init(Shape::kShares * Shape::kNumConsumers * 4);  // warps that multiply these rows
  }
};

// A block's part of the work: every so many tiles, and steps of the depth.
template <class Config>
struct GemmPart {
  using Shape = GemmShape<Config>;
  int share = cluster_rank<Shape::kClusterSize>() % Shape::kShares;
  int split = cluster_rank<Shape::kClusterSize>() / Shape::kShares;
  int step_begin, step_end;

  __device__ __forceinline__ explicit GemmPart(const GroupGemmParams& params) {
    const int num_steps = ceil_div(params.depth, Shape::kDepth);
    step_begin = num_steps * split / Shape::kSplits, step_end = num_steps * (split + 1) / Shape::kSplits;
  }

  __device__ __forceinline__ uint32_t first_tile() const { return blockIdx.x / Shape::kClusterSize; }

  // visit(tile) for the tiles of this block.
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(const GroupGemmParams& params, const Visit& visit) const {
    typename Shape::Tiles tiles{params};
    GemmTile tile;
#pragma unroll 1
    for (uint32_t index = first_tile(); tiles.find(index, tile); index += gridDim.x / Shape::kClusterSize) {
      tile.column += share * Shape::kBlockN;
      visit(tile);
    }
  }
};

}  // namespace flashinfer::sm90
