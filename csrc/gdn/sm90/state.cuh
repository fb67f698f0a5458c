// Prefill of the gated delta rule on Hopper: the warpgroup that carries the state through the chunks of a sequence.
// What it computes stands in gdn/prefill/state.cuh: transposed, so that the 64 columns of the state are the rows of a
// warpgroup's products, the state stays in fp32 accumulators, and an accumulator is the next product's A.
#pragma once

#include "device/fast_math.cuh"
#include "device/vec.cuh"
#include "gdn/sm90/tile.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GdnState {
  using Shape = GdnShape<Config>;
  using Barriers = GdnBarriers<Config>;
  using Smem = GdnSmem<Config>;
  using T = typename Config::T;
  using State = typename Config::State;

  const GdnPrefillParams& params;
  Smem& smem;
  const GdnUnit unit;
  const int warp_idx, lane_idx;

  __device__ __forceinline__ void run() {
    float state[kGdnDim / 2];
    load(state);
#pragma unroll 1
    for (int chunk = 0; chunk < unit.num_chunks; ++chunk) {
      const typename Smem::Stage& stage = smem.stages[chunk % Shape::kNumStages];
      typename Smem::HandedOver& handed_over = smem.handed_over[chunk & 1];
      if (chunk >= 2) Barriers::sync(GdnBarrier::kTaken, chunk);
      hand_over_state(state, handed_over);
      Barriers::arrive(GdnBarrier::kState, chunk);
      Barriers::sync(GdnBarrier::kLoaded, chunk);

      float recalled[kGdnChunk / 2];
      pin(recalled);
      wgmma_fence();
      multiply_panels<T>(recalled, handed_over.state, stage.k);
      wgmma_commit();
      const float decay = fast_exp2(stage.chunk.log_decay[kGdnChunk - 1]);
#pragma unroll
      for (int i = 0; i < kGdnDim / 2; ++i) state[i] *= decay;
      wgmma_wait<0>();
      pin(recalled);

      uint32_t missing[kGdnBlocks][4];
      subtract_from_values(missing, recalled, stage);
      float u[kGdnChunk / 2];
      multiply<64>(u, missing, column_major_operand(smem_address(stage.chunk.inverse), kGdnChunk), false);
      wgmma_wait<0>();
      pin(u), pin_blocks(missing);

      uint32_t written[kGdnBlocks][4];
      scale(written, u, stage.chunk);
      multiply<128>(state, written, column_major_operand(smem_address(stage.k), kGdnChunk), true);
      hand_over_u(u, handed_over);
      Barriers::arrive(GdnBarrier::kU, chunk);
      wgmma_wait<0>();
      pin(state), pin_blocks(written);
    }
    store(state);
  }

 private:
  __device__ __forceinline__ int64_t first_element() const {
    return int64_t(unit.first_v + warp_idx * 16 + lane_row(lane_idx)) * kGdnDim + lane_column(lane_idx);
  }

  __device__ __forceinline__ void load(float (&state)[kGdnDim / 2]) const {
    const State* initial = initial_state_of<State>(params, unit.seq_idx, unit.head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kGdnDim / 4; i += 2) {
        float2 pair = {0.f, 0.f};
        if (initial != nullptr) {
          const auto vec = Vec<State, 2>::load(initial + first_element() + row_of(half) * kGdnDim + column_of(i));
          pair = {to_float(vec[0]), to_float(vec[1])};
        }
        at(state, half, i) = pair.x, at(state, half, i + 1) = pair.y;
      }
    }
  }

  __device__ __forceinline__ void store(const float (&state)[kGdnDim / 2]) const {
    State* final_state = final_state_of<State>(params, unit.seq_idx, unit.head);
    if (final_state == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kGdnDim / 4; i += 2) {
        Vec<State, 2> vec;
        vec[0] = from_float<State>(at(state, half, i)), vec[1] = from_float<State>(at(state, half, i + 1));
        vec.store(final_state + first_element() + row_of(half) * kGdnDim + column_of(i));
      }
    }
  }

  // In 16 bits, as A of the product here and as B of the output's.
  __device__ __forceinline__ void hand_over_state(const float (&state)[kGdnDim / 2],
                                                  typename Smem::HandedOver& handed_over) const {
    const auto fragment = GdnFragment<GdnSquare>::as_a(lane_idx);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      uint32_t packed[4];
      pack_columns<T>(packed, state, i);
      stmatrix_x4(fragment.address(smem_address(handed_over.state[i / 4]), warp_idx, i % 4), packed);
    }
    fence_async_proxy();
    Barriers::sync_state();
  }

  __device__ __forceinline__ void hand_over_u(const float (&u)[kGdnChunk / 2],
                                              typename Smem::HandedOver& handed_over) const {
    const auto fragment = GdnFragment<GdnSquare>::as_b(lane_idx);
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      uint32_t packed[4];
      pack_columns<T>(packed, u, block);
      stmatrix_x4_trans(fragment.address(smem_address(handed_over.u), block, warp_idx), packed);
    }
    fence_async_proxy();
  }

  __device__ __forceinline__ void subtract_from_values(uint32_t (&missing)[kGdnBlocks][4],
                                                       const float (&recalled)[kGdnChunk / 2],
                                                       const typename Smem::Stage& stage) const {
    const auto fragment = GdnFragment<GdnSquare>::as_a(lane_idx);
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
      uint32_t v[4];  // tokens 0 to 7 and 8 to 15 of columns 0 to 7, the same of columns 8 to 15
      ldmatrix_x4_trans(v, fragment.address(smem_address(stage.v), block, warp_idx));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int token = block * 16 + tile * 8 + lane_column(lane_idx);
        const float2 factor = reinterpret_cast<const float2&>(stage.chunk.recall_scale[token]);
        const float* x = recalled + block * 8 + tile * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = unpack_16bit<T>(v[tile + 2 * half]);
          missing[block][2 * tile + half] =
              pack_16bit<T>(value.x - x[2 * half] * factor.x, value.y - x[2 * half + 1] * factor.y);
        }
      }
    }
  }

  __device__ __forceinline__ void scale(uint32_t (&written)[kGdnBlocks][4], const float (&u)[kGdnChunk / 2],
                                        const GdnChunk& chunk) const {
#pragma unroll
    for (int block = 0; block < kGdnBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int token = block * 16 + tile * 8 + lane_column(lane_idx);
        const float2 factor = reinterpret_cast<const float2&>(chunk.write_scale[token]);
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
