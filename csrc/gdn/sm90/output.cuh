// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule on Hopper: the warpgroup that writes the output, which stands in
// gdn/prefill/output.cuh.
#pragma once

#include "device/fast_math.cuh"
#include "gdn/sm90/tile.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GdnOutput {
  using Shape = GdnShape<Config>;
  using Barriers = GdnBarriers<Config>;
  using Smem = GdnSmem<Config>;
  using T = typename Config::T;

  const GdnPrefillParams& params;
  Smem& smem;
  const GdnUnit unit;
  const int warp_idx, lane_idx;

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const int stage_idx = chunk % Shape::kNumStages;
      const typename Smem::Stage& stage = smem.stages[stage_idx];
      const typename Smem::HandedOver& handed_over = smem.handed_over[chunk & 1];
      smem.full.wait_full(chunk);
      uint32_t q[kGdnDimBlocks][4];
      load_q(q, smem.q[stage_idx]);
      float scale[2] = {params.scale, params.scale};
      if constexpr (Config::kNormalize) scale_to_length_1(scale, q);
      float scores[kGdnChunk / 2], output[Shape::kBlockV / 2];
      // That what has landed is wgmma's to see the state's warps have said: a fence here would wait for the last
      // chunk's output to reach memory.
      Barriers::sync(GdnBarrier::kState, chunk);
      multiply_panels<T>(scores, q, stage.k);
      multiply_panels<T>(output, q, handed_over.state);
      if (chunk > 0 && elect_lane()) smem.empty.at(chunk - 1).arrive();  // the state has left it as well
      wgmma_wait<1>();
      pin(scores);
      uint32_t p[kGdnBlocks][4];
      decay(p, scores, scale, stage.chunk);
      pin_blocks(p);  // meanwhile
      wgmma_wait<0>();
      pin(output), pin_blocks(q);
#pragma unroll
      for (int i = 0; i < Shape::kBlockV / 2; ++i) output[i] *= scale[i / 2 % 2];
      Barriers::sync(GdnBarrier::kU, chunk);
      multiply_u(output, p, handed_over);
      wgmma_wait<0>();
      pin(output), pin_blocks(p);
      if (chunk + 2 < unit.num_chunks) Barriers::arrive(GdnBarrier::kTaken, chunk);
      store(output, chunk);
    }
  }

 private:
  __device__ __forceinline__ void load_q(uint32_t (&q)[kGdnDimBlocks][4], const uint8_t (&panels)[2][kGdnPanel]) const {
    const auto fragment = GdnFragment<GdnSquare>::as_a(lane_idx);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      ldmatrix_x4(q[i], fragment.address(smem_address(panels[i / 4]), warp_idx, i % 4));
    }
  }

  __device__ __forceinline__ void scale_to_length_1(float (&scale)[2], const uint32_t (&q)[kGdnDimBlocks][4]) const {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack_16bit<T>(q[i][j]);
        sum[j % 2] += pair.x * pair.x + pair.y * pair.y;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      scale[half] *= rsqrtf(sum[half] + kGdnNormEps);
    }
  }

  // Scores to P, and the factor of a token's scores to that of what it reads from the state.
  __device__ __forceinline__ void decay(uint32_t (&p)[kGdnBlocks][4], float (&scores)[kGdnChunk / 2], float (&scale)[2],
                                        const GdnChunk& chunk) const {
    const int first_row = warp_idx * 16 + lane_row(lane_idx);
    const float row_log[2] = {chunk.log_decay[first_row], chunk.log_decay[first_row + 8]};
#pragma unroll
    for (int tile = 0; tile < kGdnChunk / 8; ++tile) {
      const int column = tile * 8 + lane_column(lane_idx);
      const float2 column_log = reinterpret_cast<const float2&>(chunk.log_decay[column]);
      float2 key_scale = {1.f, 1.f};
      if constexpr (Config::kNormalize) key_scale = reinterpret_cast<const float2&>(chunk.key_scale[column]);
      float* x = scores + 4 * tile;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + row_of(half);
        const float low = fast_exp2(row_log[half] - column_log.x) * scale[half] * key_scale.x;
        const float high = fast_exp2(row_log[half] - column_log.y) * scale[half] * key_scale.y;
        x[2 * half] = column <= row ? x[2 * half] * low : 0.f;
        x[2 * half + 1] = column + 1 <= row ? x[2 * half + 1] * high : 0.f;
      }
    }
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) pack_columns<T>(p[block], scores, block);
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] *= fast_exp2(row_log[half]);
  }

  __device__ __forceinline__ static void multiply_u(float (&output)[Shape::kBlockV / 2], uint32_t (&p)[kGdnBlocks][4],
                                                    const typename Smem::HandedOver& handed_over) {
    const Operand u = column_major_operand(smem_address(handed_over.u), kGdnChunk);
    pin(output), pin_blocks(p);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      Wgmma<T, 64>::multiply(output, p[block], u.advanced(block * 16 * kPanelBytes), true);
    }
    wgmma_commit();
  }

  // Four lanes write 64 bytes of a row together.
  __device__ __forceinline__ void store(const float (&output)[Shape::kBlockV / 2], int chunk) const {
    const int64_t first_token =
        int64_t(unit.tokens.begin) + int64_t(chunk) * kGdnChunk + warp_idx * 16 + lane_row(lane_idx);
    T* dst = static_cast<T*>(params.output) + unit.head * params.output_strides.head + unit.first_v + lane_idx % 4 * 8 +
             first_token * params.output_strides.token;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int column = 0; column < Shape::kBlockV; column += 32) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int element = column / 4 + 2 * i;
          x[i] = pack_16bit<T>(at(output, half, element), at(output, half, element + 1));
        }
        transpose_quad(x);
        if (first_token + row_of(half) < unit.tokens.end) {
          *reinterpret_cast<uint4*>(dst + column) = {x[0], x[1], x[2], x[3]};
        }
      }
      dst += row_of(1) * params.output_strides.token;
    }
  }
};

}  // namespace flashinfer::sm90
