// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule on Hopper: the warpgroup that carries the state through the chunks of a sequence.
// What it computes stands in gdn/prefill/state.cuh: transposed, so that the 64 columns of the state are the rows of a
// warpgroup's products, the state stays in fp32 accumulators, and an accumulator is the next product's A.
#pragma once

#include "device/fast_math.cuh"
#include "gdn/sm90/tile.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GdnState {
  using Shape = GdnShape<Config>;
  using Barriers = GdnBarriers<Config>;
  using Smem = GdnSmem<Config>;
  using T = typename Config::T;

  const GdnPrefillParams& params;
  Smem& smem;
  const GdnUnit unit;
  const int warp_idx, lane_idx;

  __device__ __forceinline__ void run() {
    float state[kGdnDim / 2];
    load(state);
    if constexpr (!Shape::kHasOutput) wait_for_chunk(0);
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const typename Smem::Stage& stage = smem.stages[chunk % Shape::kNumStages];
      uint32_t operand[kGdnDimBlocks][4];
#pragma unroll
      for (int i = 0; i < kGdnDimBlocks; ++i) pack_columns<T>(operand[i], state, i);
      if constexpr (Shape::kHasOutput) {
        if (chunk >= 2) Barriers::sync(GdnBarrier::kTaken, chunk);
        hand_over_state(operand, chunk);
        wait_for_chunk(chunk);
        Barriers::arrive(GdnBarrier::kState, chunk);
      } else {
        if (chunk > 0 && elect_lane()) smem.empty.at(chunk - 1).arrive();
      }
      const float decay = fast_exp2(stage.chunk.log_decay[kGdnChunk - 1]);

      // What the next step reads from shared memory it reads while a product is under way.
      float recalled[kGdnChunk / 2];
      multiply_panels<T>(recalled, operand, stage.k);
#pragma unroll
      for (int i = 0; i < kGdnDim / 2; ++i) state[i] *= decay;
      uint32_t values[kGdnBlocks][4];
      load_values(values, stage.v[warp_idx / 4]);
      const Factors of_recalled = load_factors(stage.chunk.recall_scale);
      wgmma_wait<0>();
      pin(recalled), pin_blocks(operand);

      uint32_t missing[kGdnBlocks][4];
      subtract(missing, values, recalled, of_recalled);
      float u[kGdnChunk / 2];
      multiply<64>(u, missing, column_major_operand(smem_address(stage.chunk.inverse), kGdnChunk), false);
      const Factors of_written = load_factors(stage.chunk.write_scale);
      wgmma_wait<0>();
      pin(u), pin_blocks(missing);

      uint32_t written[kGdnBlocks][4];
      scale(written, u, of_written);
      multiply<128>(state, written, column_major_operand(smem_address(stage.k), kGdnChunk), true);
      if constexpr (Shape::kHasOutput) {
        hand_over_u(u, chunk);
      } else {
        wait_for_chunk(chunk + 1);  // and the fence passes under a product
      }
      wgmma_wait<0>();
      pin(state), pin_blocks(written);
    }
    store(state);
  }

 private:
  // Of the lane's first element of the transposed state.
  __device__ __forceinline__ int first_row() const { return warp_idx * 16 + lane_row(lane_idx); }
  __device__ __forceinline__ int first_column() const { return lane_column(lane_idx); }

  __device__ __forceinline__ void load(float (&state)[kGdnDim / 2]) const {
    unit.load_state<Config>(params, [&](const auto& pair_at) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kGdnDim / 4; i += 2) {
          const float2 pair = pair_at(first_row() + row_of(half), first_column() + column_of(i));
          at(state, half, i) = pair.x, at(state, half, i + 1) = pair.y;
        }
      }
    });
  }

  __device__ __forceinline__ void store(const float (&state)[kGdnDim / 2]) const {
    unit.store_state<Config>(params, [&](const auto& store_pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kGdnDim / 4; i += 2) {
          store_pair(first_row() + row_of(half), first_column() + column_of(i), at(state, half, i),
                     at(state, half, i + 1));
        }
      }
    });
  }

  // Until it has landed, if there is one, and wgmma sees it and what was handed over before.
  __device__ __forceinline__ void wait_for_chunk(int chunk) const {
    if (chunk < unit.num_chunks) smem.full.wait_full(chunk);
    fence_async_proxy();
  }

  // In 16 bits, as B of the output's product.
  __device__ __forceinline__ void hand_over_state(const uint32_t (&operand)[kGdnDimBlocks][4], int chunk) const {
    const auto fragment = GdnFragment<GdnSquare>::as_a(lane_idx);
    const auto& panels = smem.handed_over[chunk & 1].state;
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      stmatrix_x4(fragment.address(smem_address(panels[i / 4]), warp_idx, i % 4), operand[i]);
    }
  }

  __device__ __forceinline__ void hand_over_u(const float (&u)[kGdnChunk / 2], int chunk) const {
    const auto fragment = GdnFragment<GdnSquare>::as_b(lane_idx);
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      uint32_t packed[4];
      pack_columns<T>(packed, u, block);
      stmatrix_x4_trans(fragment.address(smem_address(smem.handed_over[chunk & 1].u), block, warp_idx), packed);
    }
    fence_async_proxy();
    Barriers::arrive(GdnBarrier::kU, chunk);
  }

  // Of the tokens that are the lane's columns.
  struct Factors {
    float2 of[kGdnBlocks][2];
  };
  __device__ __forceinline__ Factors load_factors(const float (&of_tokens)[kGdnChunk]) const {
    Factors factors;
#pragma unroll
    for (int i = 0; i < kGdnChunk / 8; ++i) {
      factors.of[i / 2][i % 2] = reinterpret_cast<const float2&>(of_tokens[i * 8 + lane_column(lane_idx)]);
    }
    return factors;
  }

  // Tokens 0 to 7 and 8 to 15 of columns 0 to 7, the same of columns 8 to 15.
  __device__ __forceinline__ void load_values(uint32_t (&values)[kGdnBlocks][4],
                                              const uint8_t (&panel)[kGdnPanel]) const {
    const auto fragment = GdnFragment<GdnSquare>::as_a(lane_idx);
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      ldmatrix_x4_trans(values[block], fragment.address(smem_address(panel), block, warp_idx % 4));
    }
  }

  __device__ __forceinline__ static void subtract(uint32_t (&missing)[kGdnBlocks][4],
                                                  const uint32_t (&values)[kGdnBlocks][4],
                                                  const float (&recalled)[kGdnChunk / 2], const Factors& factors) {
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float2 factor = factors.of[block][tile];
        const float* x = recalled + block * 8 + tile * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = unpack_16bit<T>(values[block][tile + 2 * half]);
          missing[block][2 * tile + half] =
              pack_16bit<T>(value.x - x[2 * half] * factor.x, value.y - x[2 * half + 1] * factor.y);
        }
      }
    }
  }

  __device__ __forceinline__ static void scale(uint32_t (&written)[kGdnBlocks][4], const float (&u)[kGdnChunk / 2],
                                               const Factors& factors) {
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float2 factor = factors.of[block][tile];
        const float* x = u + block * 8 + tile * 4;
        written[block][2 * tile] = pack_16bit<T>(x[0] * factor.x, x[1] * factor.y);
        written[block][2 * tile + 1] = pack_16bit<T>(x[2] * factor.x, x[3] * factor.y);
      }
    }
  }

  // d (+)= A B over the tokens of a chunk.
  template <int kN>
  __device__ __forceinline__ static void multiply(float (&d)[kN / 2], uint32_t (&a)[kGdnBlocks][4], Operand b,
                                                  bool accumulate) {
    pin(d), pin_blocks(a);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      Wgmma<T, kN>::multiply(d, a[block], b.advanced(block * 16 * kPanelBytes), accumulate || block > 0);
    }
    wgmma_commit();
  }
};

}  // namespace flashinfer::sm90
