// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule on Hopper: shared memory. Operands lie in panels of 128-byte rows (wgmma.cuh), so
// that the 128 dimensions of keys and queries are two panels of 64 tokens each.
#pragma once

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/warpgroup.cuh"
#include "device/sm90/wgmma.cuh"
#include "gdn/prefill/block.cuh"

namespace flashinfer::sm90 {

constexpr int kGdnPanel = kGdnChunk * kPanelBytes;  // bytes

// After the warpgroups of the state, one for every 64 columns, come that of the output, where there is one, and that
// which brings in chunks. Of registers the first two want more than an even share.
constexpr int kGdnFeedThreads = kWarpgroupSize;
constexpr int kGdnStateRegisters = 224, kGdnOutputRegisters = 208, kGdnFeedRegisters = 72;
template <class Config>
constexpr int kGdnThreads =
    GdnShape<Config>::kStateThreads + (Config::kHasOutput ? kWarpgroupSize : 0) + kGdnFeedThreads;

template <class Config>
struct GdnStages {
  using Shape = GdnShape<Config>;
  static constexpr int kStateWarpgroups = Shape::kBlockV / 64;
  static_assert(Shape::kBlockV % 64 == 0 && kGdnChunk == 64 && kGdnDim == 128, "a warpgroup has 64 rows of A");
  struct alignas(1024) Stage {
    uint8_t k[2][kGdnPanel];
    uint8_t v[kStateWarpgroups][kGdnPanel];
    GdnChunk chunk;  // its inverse is a panel
  };
  static_assert(sizeof(Stage) == (2 + kStateWarpgroups) * kGdnPanel + sizeof(GdnChunk) && sizeof(GdnChunk) % 1024 == 0);
  Stage stages[Shape::kNumStages];
  // By copies that have landed, which wgmma does not see yet: the state's warps wait for them and say
  // fence_async_proxy(). Emptied by the warps of the output, which know when the state has left a chunk, or without
  // them by those of the state.
  MbarrierRing<Shape::kNumStages> full, empty;
};
template <class Config, bool kHasOutput = Config::kHasOutput>
struct GdnSmem : GdnStages<Config> {};
template <class Config>
struct GdnSmem<Config, true> : GdnStages<Config> {
  static_assert(GdnStages<Config>::kStateWarpgroups == 1, "an output is of one warpgroup");
  struct alignas(1024) HandedOver {
    uint8_t state[2][kGdnPanel];  // [64 columns of values, 128], at the start of a chunk
    uint8_t u[kGdnPanel];         // [64 tokens, 64 columns of values]
  };
  alignas(1024) uint8_t q[Config::kNumStages][2][kGdnPanel];
  HandedOver handed_over[2];
};

// Before products that have them as A, and after: until then nothing else may be in these registers.
template <int kNumBlocks>
__device__ __forceinline__ void pin_blocks(uint32_t (&a)[kNumBlocks][4]) {
#pragma unroll
  for (int block = 0; block < kNumBlocks; ++block) pin(a[block]);
}

// d = A Bᵀ over the 128 dimensions, B in two panels.
template <class T>
__device__ __forceinline__ void multiply_panels(float (&d)[32], uint32_t (&a)[kGdnDimBlocks][4],
                                                const uint8_t (&b)[2][kGdnPanel]) {
  const Operand first = depth_major_operand(smem_address(b));
  pin(d), pin_blocks(a);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kGdnDimBlocks; ++i) {
    Wgmma<T, 64>::template multiply<false>(d, a[i], first.advanced(i / 4 * kGdnPanel + i % 4 * 32), i > 0);
  }
  wgmma_commit();
}

// 16 columns of an accumulator as an A fragment.
template <class T, int kNum>
__device__ __forceinline__ void pack_columns(uint32_t (&a)[4], const float (&d)[kNum], int block) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack_16bit<T>(d[8 * block + 2 * i], d[8 * block + 2 * i + 1]);
}

}  // namespace flashinfer::sm90
