// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule: the warps that carry the state through the chunks of a sequence. Per chunk, with S
// the state at its start, decays 2^G and the keys' lengths apart:
//
//   U = inverse (V - K S)        S = 2^G_last S + Kᵀ (2^(G_last - G) U)
//
// All of it is computed transposed, 16 columns of the state a warp: Sᵀ [16, 128] stays in fp32 accumulators, an
// accumulator of one product is an operand of the next, and no warp waits for another but for what comes in. This is
// the one chain from end to end of a sequence: operands are read from shared memory a step ahead of their products.
#pragma once

#include "device/fast_math.cuh"
#include "gdn/prefill/block.cuh"

namespace flashinfer {

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
  float state[kGdnDimBlocks][2][4];

  __device__ void run() {
    load();
    const auto keys_as_a = GdnFragment<GdnRows>::as_a(lane_idx), keys_as_b = GdnFragment<GdnRows>::as_b(lane_idx);
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const typename Smem::Stage& stage = smem.stages[chunk % Shape::kNumStages];
      const uint32_t k_smem = smem_address(stage.k);
      if (Shape::kHasOutput && chunk >= 2) Barriers::sync(GdnBarrier::kTaken, chunk);
      Barriers::sync(GdnBarrier::kLoaded, chunk);

      float recalled[kGdnBlocks][2][4] = {};
      hand_over_and_recall(recalled, chunk, keys_as_b, k_smem);
      Barriers::arrive(GdnBarrier::kState, chunk);
      uint32_t missing[kGdnBlocks][4];
      subtract_from_values(missing, recalled, stage);
      float u[kGdnBlocks][2][4] = {};
      solve(u, missing, smem_address(stage.chunk.inverse));
      uint32_t operand[kGdnBlocks][4];
      hand_over_and_scale(operand, u, chunk, stage.chunk);
      if constexpr (Shape::kHasOutput) Barriers::arrive(GdnBarrier::kU, chunk);
      write(operand, fast_exp2(stage.chunk.log_decay[kGdnChunk - 1]), keys_as_a, k_smem);
    }
    store();
  }

 private:
  __device__ __forceinline__ void load() {
    unit.load_state<Config>(params, [&](const auto& pair_at) {
#pragma unroll
      for (int i = 0; i < kGdnDimBlocks; ++i) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 pair = pair_at(first_row() + row_of(half), first_column() + 16 * i + 8 * tile);
            state[i][tile][2 * half] = pair.x, state[i][tile][2 * half + 1] = pair.y;
          }
        }
      }
    });
  }

  __device__ __forceinline__ void store() const {
    unit.store_state<Config>(params, [&](const auto& store_pair) {
#pragma unroll
      for (int i = 0; i < kGdnDimBlocks; ++i) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float (&x)[4] = state[i][tile];
            store_pair(first_row() + row_of(half), first_column() + 16 * i + 8 * tile, x[2 * half], x[2 * half + 1]);
          }
        }
      }
    });
  }

  // Of the lane's first element of the transposed state.
  __device__ __forceinline__ int first_row() const { return warp_idx * 16 + lane_row(lane_idx); }
  __device__ __forceinline__ int first_column() const { return lane_column(lane_idx); }

  // Sᵀ Kᵀ, and the state in 16 bits for the output.
  __device__ __forceinline__ void hand_over_and_recall(float (&recalled)[kGdnBlocks][2][4], int chunk,
                                                       const GdnFragment<GdnRows>& keys, uint32_t k_smem) {
    uint32_t k[2][kGdnBlocks][4];
    const auto load = [&](int i) {
#pragma unroll
      for (int block = 0; block < kGdnBlocks; ++block) ldmatrix_x4(k[i % 2][block], keys.address(k_smem, block, i));
    };
    load(0);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      if (i + 1 < kGdnDimBlocks) load(i + 1);
      uint32_t operand[4];
      pack_block<T>(operand, state[i]);
      if constexpr (Shape::kHasOutput) {
        smem.handed_over[chunk & 1][warp_idx].state[i][lane_idx] = {operand[0], operand[2], operand[1], operand[3]};
      }
#pragma unroll
      for (int block = 0; block < kGdnBlocks; ++block) mma_block<T>(recalled[block], operand, k[i % 2][block]);
    }
  }

  __device__ __forceinline__ void subtract_from_values(uint32_t (&missing)[kGdnBlocks][4],
                                                       const float (&recalled)[kGdnBlocks][2][4],
                                                       const typename Smem::Stage& stage) const {
    using Rows = typename Shape::ValueRows;
    const auto values = GdnFragment<Rows>::as_a(lane_idx);
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      uint32_t v[4];  // tokens 0 to 7 and 8 to 15 of columns 0 to 7, the same of columns 8 to 15
      ldmatrix_x4_trans(v, values.address(smem_address(stage.v), block, warp_idx));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int token = block * 16 + tile * 8 + lane_column(lane_idx);
        const float2 scale = reinterpret_cast<const float2&>(stage.chunk.recall_scale[token]);
        const float (&x)[4] = recalled[block][tile];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = unpack_16bit<T>(v[tile + 2 * half]);
          missing[block][2 * tile + half] =
              pack_16bit<T>(value.x - x[2 * half] * scale.x, value.y - x[2 * half + 1] * scale.y);
        }
      }
    }
  }

  __device__ __forceinline__ void solve(float (&u)[kGdnBlocks][2][4], const uint32_t (&missing)[kGdnBlocks][4],
                                        uint32_t inverse_smem) const {
    const auto inverse = GdnFragment<GdnSquare>::as_a(lane_idx);
    uint32_t x[kGdnBlocks][kGdnBlocks][4];
#pragma unroll
    for (int column = 0; column < kGdnBlocks; ++column) {
#pragma unroll
      for (int row = column; row < kGdnBlocks; ++row) {
        ldmatrix_x4_trans(x[column][row], inverse.address(inverse_smem, column, row));
      }
    }
#pragma unroll
    for (int column = 0; column < kGdnBlocks; ++column) {
#pragma unroll
      for (int row = column; row < kGdnBlocks; ++row) mma_block<T>(u[row], missing[column], x[column][row]);
    }
  }

  __device__ __forceinline__ void hand_over_and_scale(uint32_t (&operand)[kGdnBlocks][4], float (&u)[kGdnBlocks][2][4],
                                                      int chunk_idx, const GdnChunk& chunk) const {
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      if constexpr (Shape::kHasOutput) {
        uint32_t plain[4];
        pack_block<T>(plain, u[block]);
        smem.handed_over[chunk_idx & 1][warp_idx].u[block][lane_idx] = {plain[0], plain[2], plain[1], plain[3]};
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int token = block * 16 + tile * 8 + lane_column(lane_idx);
        const float2 scale = reinterpret_cast<const float2&>(chunk.write_scale[token]);
        float (&x)[4] = u[block][tile];
        x[0] *= scale.x, x[1] *= scale.y, x[2] *= scale.x, x[3] *= scale.y;
      }
      pack_block<T>(operand[block], u[block]);
    }
  }

  __device__ __forceinline__ void write(const uint32_t (&operand)[kGdnBlocks][4], float decay,
                                        const GdnFragment<GdnRows>& keys, uint32_t k_smem) {
    constexpr int kAtOnce = 4, kParts = kGdnDimBlocks / kAtOnce, kSteps = kGdnBlocks * kParts;
    uint32_t k[2][kAtOnce][4];
    const auto load = [&](int step) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        ldmatrix_x4_trans(k[step % 2][i], keys.address(k_smem, step % kGdnBlocks, step / kGdnBlocks * kAtOnce + i));
      }
    };
    load(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) load(step + 1);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float (&s)[2][4] = state[step / kGdnBlocks * kAtOnce + i];
        if (step % kGdnBlocks == 0) {
#pragma unroll
          for (int j = 0; j < 4; ++j) s[0][j] *= decay, s[1][j] *= decay;
        }
        mma_block<T>(s, operand[step % kGdnBlocks], k[step % 2][i]);
      }
    }
  }
};

}  // namespace flashinfer
