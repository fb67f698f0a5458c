// SPDX-License-Identifier: Apache-2.0
// Products of segments of rows with weights (gemm/params.h) on Hopper: TMA, wgmma, warps that specialize.
//
//   output[r, n] = sum_k a[r, k] b[w, n, k]        of a segment's rows r and its weight w
//   output[r, n] = sum_j a_scale[r, j] b_scale[w, n / 128, j] sum_(k in block j) a[r, k] b[w, n, k]
//
//   a [num_rows, depth] T, b [num_weights, num_columns, depth] or [num_weights, depth, num_columns] T
//   -> output [num_rows, num_columns] Out
//
// A block computes tiles of the output, one after the other; operands of the next come while one is stored. What the
// tensor cores sum of 8-bit operands is good to some 13 bits: 128 products at a time, scaled and added in fp32.
//
//   gemm/sm90/producer.cuh  brings in operands and scales, a step of 128 bytes of every row at a time
//   gemm/sm90/consumer.cuh  multiplies, scales, adds, stores
//   gemm/sm90/tile.cuh      shared memory, and how a cluster divides its work
//   gemm/tiles.cuh          which tiles there are
#pragma once

#include "device/pdl.cuh"
#include "gemm/sm90/consumer.cuh"
#include "gemm/sm90/producer.cuh"

namespace flashinfer {

// Config: T, Out, kDepthMajor, kScaleColumns, and the tile: kBlockM, kBlockN, kNumStages, kShares, kSplits. Grid: any
// number of clusters; of several splits, a cluster for each tile.
template <class Config>
__device__ void group_gemm(const Sm90GroupGemmParams& params) {
  using Shape = sm90::GemmShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  static_assert(sizeof(sm90::GemmSmem<Config>) <= Config::kSmemBytes);
  auto& smem = *reinterpret_cast<sm90::GemmSmem<Config>*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.init();
    fence_mbarrier_init();
    prefetch_tensor_map(params.a_map);
    prefetch_tensor_map(params.b_map);
  }
  Mailbox<Shape::kClusterSize>::open(&smem.mailbox, 1);
  __syncthreads();
  cluster_await<Shape::kClusterSize>();
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  wait_for_previous_kernel();
  allow_next_kernel();

  if (warp_idx >= Shape::kNumConsumers * 4) {
    if constexpr (Shape::kMovesRegisters) shrink_registers<Shape::kProducerRegisters>();
    if (warp_idx == Shape::kNumConsumers * 4) {
      sm90::produce_operands<Config>(params, smem);
    } else if constexpr (Shape::kIsScaled) {
      if (warp_idx == Shape::kNumConsumers * 4 + 1) sm90::produce_scales<Config>(params, smem);
    }
  } else {
    if constexpr (Shape::kMovesRegisters) grow_registers<Shape::kConsumerRegisters>();
    // Where shared memory is, in a register: the compiler would ask for it ahead of every step.
    const uint32_t smem_begin = __shfl_sync(0xffffffffu, smem_address(smem_bytes), 0);
    auto& same_smem = *static_cast<sm90::GemmSmem<Config>*>(__cvta_shared_to_generic(smem_begin));
    sm90::GemmConsumer<Config>{params, same_smem, warp_idx / 4}.run();
  }
  // Other blocks arrive at barriers here, and TMA writes what they have brought.
  if constexpr (Shape::kShares > 1) {
    __syncwarp();
    cluster_announce<Shape::kClusterSize>();
    cluster_await<Shape::kClusterSize>();
  }
}

}  // namespace flashinfer
