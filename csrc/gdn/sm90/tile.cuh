// Prefill of the gated delta rule on Hopper: shared memory. Operands lie in panels of 128-byte rows (wgmma.cuh), so
// that the 128 dimensions of keys and queries are two panels of 64 tokens each.
#pragma once

#include "device/sm90/warpgroup.cuh"
#include "device/sm90/wgmma.cuh"
#include "gdn/prefill/block.cuh"

namespace flashinfer::sm90 {

constexpr int kGdnPanel = kGdnChunk * kPanelBytes;  // bytes

template <class Config>
struct GdnStages {
  using Shape = GdnShape<Config>;
  static_assert(Shape::kBlockV == 64 && kGdnChunk == 64 && kGdnDim == 128, "a warpgroup has 64 rows of A");
  struct alignas(1024) Stage {
    uint8_t k[2][kGdnPanel];
    uint8_t v[kGdnPanel];
    GdnChunk chunk;  // its inverse is a panel
  };
  static_assert(sizeof(Stage) == 3 * kGdnPanel + sizeof(GdnChunk) && sizeof(GdnChunk) % 1024 == 0);
  Stage stages[Shape::kNumStages];
};
template <class Config, bool kHasOutput = Config::kHasOutput>
struct GdnSmem : GdnStages<Config> {};
template <class Config>
struct GdnSmem<Config, true> : GdnStages<Config> {
  struct alignas(1024) HandedOver {
    uint8_t state[2][kGdnPanel];  // [64 columns of values, 128], at the start of a chunk
    uint8_t u[kGdnPanel];         // [64 tokens, 64 columns of values]
  };
  alignas(1024) uint8_t q[Config::kNumStages][2][kGdnPanel];
  HandedOver handed_over[2];
};

// The 64 elements from first_element on of a chunk's rows, as a panel.
template <class Config>
struct GdnPanelStream : GdnRowStream<typename Config::T, GdnSquare, kGdnChunk, GdnShape<Config>::kFeedThreads,
                                     GdnShape<Config>::kThreadsPerValue> {
  __device__ __forceinline__ GdnPanelStream(const void* base, const GdnRowStrides& strides, int head, int first_element,
                                            const GdnUnit& unit, int thread_idx)
      : GdnPanelStream::GdnRowStream(base, strides, head, first_element, unit.tokens, 0, thread_idx) {}
};

template <class Config>
struct GdnFeed {
  using Shape = GdnShape<Config>;
  using Stage = typename GdnStages<Config>::Stage;
  GdnPanelStream<Config> keys[2], values;
  const GdnChunk* chunks;
  const GdnPrefillParams& params;
  const bool has_values;
  const int thread_idx;

  __device__ __forceinline__ GdnFeed(const GdnPrefillParams& params, const GdnUnit& unit, int thread_idx)
      : keys{{params.k, params.k_strides, unit.head / params.heads_per_k, 0, unit, thread_idx},
             {params.k, params.k_strides, unit.head / params.heads_per_k, 64, unit, thread_idx}},
        values(params.v, params.v_strides, unit.head / params.heads_per_v, unit.first_v, unit, thread_idx),
        chunks(chunks_of(params, unit)),
        params(params),
        has_values(Shape::kHasOutput || !unit.is_transition),
        thread_idx(thread_idx) {}

  __device__ __forceinline__ void load_async(Stage& stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) keys[i].load_async(smem_address(stage.k[i]));
    if (has_values) values.load_async(smem_address(stage.v));
    load_chunk_async<Shape::kFeedThreads>(stage.chunk, chunks, thread_idx);
    chunks += params.num_heads;
  }
  __device__ __forceinline__ static void publish() { fence_async_proxy(); }
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
