// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule: the warps that bring in chunks and write the output, 16 tokens of a chunk each:
//
//   O = scale (2^G Q S + P U)        P[i, j] = 2^(G_i - G_j) q_i·k_j  for j <= i, else 0
//
// with the state S at the chunk's start and U in 16 bits from the warps that have them (state.cuh).
#pragma once

#include "device/fast_math.cuh"
#include "gdn/prefill/block.cuh"

namespace flashinfer {

template <class Config>
struct GdnOutput {
  using Shape = GdnShape<Config>;
  using Barriers = GdnBarriers<Config>;
  using Smem = GdnSmem<Config>;
  using T = typename Config::T;
  static constexpr int kStateWarps = Shape::kStateWarps;

  const GdnPrefillParams& params;
  Smem& smem;
  const GdnUnit unit;
  const int row_block, lane_idx;

  __device__ void run() {
    const int thread_idx = row_block * 32 + lane_idx;
    GdnFeed<Config> feed(params, unit, thread_idx);
    Queries queries(params.q, params.q_strides, unit.head / params.heads_per_q, 0, unit.tokens, row_block * 16,
                    lane_idx);
    const auto load_async = [&](int chunk) {
      if (chunk < unit.num_chunks) feed.load_async(smem.stages[chunk % Shape::kNumStages]);
    };
    const auto load_q_async = [&](int chunk) {
      if (chunk < unit.num_chunks) queries.load_async(q_smem());
    };

    // Of copies in flight, queries of the next chunk come before what is further ahead.
    constexpr int kNumAhead = Shape::kNumStages - 1, kNewest = kNumAhead > 1 ? 1 : 0;
    constexpr bool kIsEarly = kNumAhead > 2;  // the state may have a chunk before it is this one's turn
    load_q_async(0);
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < kNumAhead; ++i) {
      load_async(i);
      cp_async_commit();
    }
    cp_async_wait<kNumAhead - 1>();
    if (unit.num_chunks > 0) Barriers::arrive(GdnBarrier::kLoaded, 0);
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const typename Smem::Stage& stage = smem.stages[chunk % Shape::kNumStages];
      cp_async_wait<kNewest>();
      if (kIsEarly && chunk + 1 < unit.num_chunks) Barriers::arrive(GdnBarrier::kLoaded, chunk + 1);
      Barriers::sync_output();  // the chunk is there for all, and all have left the one before
      uint32_t q[kGdnDimBlocks][4];
      load_q(q);
      load_q_async(chunk + 1);
      cp_async_commit();
      float scale[2] = {params.scale, params.scale};
      if constexpr (Config::kNormalize) scale_to_length_1(scale, q);
      float scores[kGdnBlocks][2][4] = {};
      const uint32_t k_smem = smem_address(stage.k);
      if (row_block == 0) multiply_keys<1>(scores, q, k_smem);  // code without branches in it hides its latencies
      if (row_block == 1) multiply_keys<2>(scores, q, k_smem);
      if (row_block == 2) multiply_keys<3>(scores, q, k_smem);
      if (row_block == 3) multiply_keys<4>(scores, q, k_smem);
      uint32_t p[kGdnBlocks][4];
      decay(p, scores, scale, stage.chunk);

      float output[kStateWarps][2][4] = {};
      Barriers::sync(GdnBarrier::kState, chunk);
      load_async(chunk + kNumAhead);  // in place of the last chunk, which the state has left as well
      cp_async_commit();
      multiply_state(output, q, chunk);
#pragma unroll
      for (int warp = 0; warp < kStateWarps; ++warp) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[warp][0][i] *= scale[i / 2], output[warp][1][i] *= scale[i / 2];
      }
      Barriers::sync(GdnBarrier::kU, chunk);
      multiply_u(output, p, chunk);
      if constexpr (!kIsEarly) {
        cp_async_wait<2 * kNewest>();
        if (chunk + 1 < unit.num_chunks) Barriers::arrive(GdnBarrier::kLoaded, chunk + 1);
      }
      if (chunk + 2 < unit.num_chunks) Barriers::arrive(GdnBarrier::kTaken, chunk);
      store(output, chunk);
    }
    cp_async_wait_all();
  }

 private:
  using Queries = GdnRowStream<T, GdnRows, 16, 32, 4>;  // the warp's rows, which nobody else reads

  __device__ __forceinline__ uint32_t q_smem() const { return smem_address(smem.q) + row_block * 16 * kGdnDim * 2; }

  __device__ __forceinline__ void load_q(uint32_t (&q)[kGdnDimBlocks][4]) const {
    const auto rows = GdnFragment<GdnRows>::as_a(lane_idx);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) ldmatrix_x4(q[i], rows.address(q_smem(), 0, i));
    __syncwarp();
  }

  __device__ __forceinline__ void scale_to_length_1(float (&scale)[2], const uint32_t (&q)[kGdnDimBlocks][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kGdnDimBlocks; ++i) {
        const float2 low = unpack_16bit<T>(q[i][half]), high = unpack_16bit<T>(q[i][half + 2]);
        sum += low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y;
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      scale[half] *= rsqrtf(sum + kGdnNormEps);
    }
  }

  template <int kNumColumns>
  __device__ __forceinline__ void multiply_keys(float (&scores)[kGdnBlocks][2][4],
                                                const uint32_t (&q)[kGdnDimBlocks][4], uint32_t k_smem) const {
    const auto keys = GdnFragment<GdnRows>::as_b(lane_idx);
    uint32_t k[2][kNumColumns][4];
    const auto load = [&](int i) {
#pragma unroll
      for (int block = 0; block < kNumColumns; ++block) ldmatrix_x4(k[i % 2][block], keys.address(k_smem, block, i));
    };
    load(0);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      if (i + 1 < kGdnDimBlocks) load(i + 1);
#pragma unroll
      for (int block = 0; block < kNumColumns; ++block) mma_block<T>(scores[block], q[i], k[i % 2][block]);
    }
  }

  // Scores to P, and the factor of a token's scores to that of what it reads from the state.
  __device__ __forceinline__ void decay(uint32_t (&p)[kGdnBlocks][4], float (&scores)[kGdnBlocks][2][4],
                                        float (&scale)[2], const GdnChunk& chunk) const {
    const int first_row = row_block * 16 + lane_row(lane_idx);
    const float row_log[2] = {chunk.log_decay[first_row], chunk.log_decay[first_row + 8]};
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int column = block * 16 + tile * 8 + lane_column(lane_idx);
        const float2 column_log = reinterpret_cast<const float2&>(chunk.log_decay[column]);
        float2 key_scale = {1.f, 1.f};
        if constexpr (Config::kNormalize) key_scale = reinterpret_cast<const float2&>(chunk.key_scale[column]);
        float (&x)[4] = scores[block][tile];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + row_of(half);
          const float low = fast_exp2(row_log[half] - column_log.x) * scale[half] * key_scale.x;
          const float high = fast_exp2(row_log[half] - column_log.y) * scale[half] * key_scale.y;
          x[2 * half] = column <= row ? x[2 * half] * low : 0.f;
          x[2 * half + 1] = column + 1 <= row ? x[2 * half + 1] * high : 0.f;
        }
      }
      pack_block<T>(p[block], scores[block]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] *= fast_exp2(row_log[half]);
  }

  __device__ __forceinline__ static void take(uint32_t (&b)[4], const uint4& handed_over) {
    b[0] = handed_over.x, b[1] = handed_over.y, b[2] = handed_over.z, b[3] = handed_over.w;
  }

  __device__ __forceinline__ void multiply_state(float (&output)[kStateWarps][2][4],
                                                 const uint32_t (&q)[kGdnDimBlocks][4], int chunk) const {
    const auto& handed_over = smem.handed_over[chunk & 1];
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
#pragma unroll
      for (int warp = 0; warp < kStateWarps; ++warp) {
        uint32_t s[4];
        take(s, handed_over[warp].state[i][lane_idx]);
        mma_block<T>(output[warp], q[i], s);
      }
    }
  }

  __device__ __forceinline__ void multiply_u(float (&output)[kStateWarps][2][4], const uint32_t (&p)[kGdnBlocks][4],
                                             int chunk) const {
    const auto& handed_over = smem.handed_over[chunk & 1];
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
#pragma unroll
      for (int warp = 0; warp < kStateWarps; ++warp) {
        uint32_t u[4];
        take(u, handed_over[warp].u[block][lane_idx]);
        mma_block<T>(output[warp], p[block], u);
      }
    }
  }

  // Four lanes write 16 bytes of a row together.
  __device__ __forceinline__ void store(const float (&output)[kStateWarps][2][4], int chunk) const {
    const int64_t first_token =
        int64_t(unit.tokens.begin) + int64_t(chunk) * kGdnChunk + row_block * 16 + lane_row(lane_idx);
    T* dst = static_cast<T*>(params.output) + unit.head * params.output_strides.head + unit.first_v +
             lane_column(lane_idx) + first_token * params.output_strides.token;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_token + row_of(half) >= unit.tokens.end) break;
#pragma unroll
      for (int tile = 0; tile < 2 * kStateWarps; ++tile) {
        const float (&x)[4] = output[tile / 2][tile % 2];
        *reinterpret_cast<uint32_t*>(dst + tile * 8) = pack_16bit<T>(x[2 * half], x[2 * half + 1]);
      }
      dst += row_of(1) * params.output_strides.token;
    }
  }
};

}  // namespace flashinfer
