// Prefill of the gated delta rule on Hopper: shared memory. Operands lie in panels of 128-byte rows (wgmma.cuh), so
// that the 128 dimensions of keys and queries are two panels of 64 tokens each.
#pragma once

#include "device/sm90/warpgroup.cuh"
#include "device/sm90/wgmma.cuh"
#include "gdn/prefill/block.cuh"

namespace flashinfer::sm90 {

constexpr int kGdnPanel = kGdnChunk * kPanelBytes;  // bytes

template <class Config>
struct GdnSmem {
  using Shape = GdnShape<Config>;
  static_assert(Shape::kBlockV == 64 && kGdnChunk == 64 && kGdnDim == 128, "a warpgroup has 64 rows of A");
  struct alignas(1024) Stage {
    uint8_t k[2][kGdnPanel];
    uint8_t q[2][kGdnPanel];
    uint8_t v[kGdnPanel];
    GdnChunk chunk;  // its inverse is a panel
  };
  static_assert(sizeof(Stage) == 5 * kGdnPanel + sizeof(GdnChunk) && sizeof(GdnChunk) % 1024 == 0);
  struct alignas(1024) HandedOver {
    uint8_t state[2][kGdnPanel];  // [64 columns of values, 128], at the start of a chunk
    uint8_t u[kGdnPanel];         // [64 tokens, 64 columns of values]
  };
  Stage stages[Shape::kNumStages];
  HandedOver handed_over[2];
};

// d = A Bᵀ over the 128 dimensions, both in two panels.
template <class T>
__device__ __forceinline__ void multiply_panels(float (&d)[32], const uint8_t (&a)[2][kGdnPanel],
                                                const uint8_t (&b)[2][kGdnPanel]) {
  const Operand first_a = depth_major_operand(smem_address(a)), first_b = depth_major_operand(smem_address(b));
#pragma unroll
  for (int i = 0; i < kGdnDimBlocks; ++i) {
    const int num_bytes = i / 4 * kGdnPanel + i % 4 * 32;
    Wgmma<T, 64>::multiply(d, first_a.advanced(num_bytes), first_b.advanced(num_bytes), i > 0);
  }
}

// Before products that have them as A, and after: until then nothing else may be in these registers.
__device__ __forceinline__ void pin_blocks(uint32_t (&a)[kGdnBlocks][4]) {
#pragma unroll
  for (int block = 0; block < kGdnBlocks; ++block) pin(a[block]);
}

// 16 columns of an accumulator as an A fragment.
template <class T, int kNum>
__device__ __forceinline__ void pack_columns(uint32_t (&a)[4], const float (&d)[kNum], int block) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack_16bit<T>(d[8 * block + 2 * i], d[8 * block + 2 * i + 1]);
}

}  // namespace flashinfer::sm90
