// SPDX-License-Identifier: Apache-2.0
// The warps of the Hopper kernel of products that bring in what the others multiply: one has operands, one has scales,
// by TMA as well where rows lie such that it can.
#pragma once

#include "gemm/sm90/tile.cuh"

namespace flashinfer::sm90 {

// Where a step's part of b lies: copy(offset in the stage, coordinates) for each of its boxes.
template <class Config, class Copy>
__device__ __forceinline__ void for_each_box_of_b(const GemmTile& tile, int step, const Copy& copy) {
  using Shape = GemmShape<Config>;
  if constexpr (Shape::kDepthMajor) {
    copy(0, step * (kPanelBytes / 2), tile.column, tile.weight);
  } else {
#pragma unroll
    for (int column = 0; column < Shape::kBlockN; column += Shape::kPanelColumns) {
      copy(column / Shape::kPanelColumns * Shape::kDepth * kPanelBytes, tile.column + column, step * Shape::kDepth,
           tile.weight);
    }
  }
}

template <class Config>
__device__ __forceinline__ void produce_operands(const Sm90GroupGemmParams& params, GemmSmem<Config>& smem) {
  using Shape = GemmShape<Config>;
  const GemmPart<Config> part{params};
  uint32_t turn = 0;
  part.for_each_tile(params, [&](const GemmTile& tile) {
    for (int step = part.step_begin; step < part.step_end; ++step, ++turn) {
      const int stage = turn % Shape::kNumStages;
      smem.empty.wait_empty(turn);
      if (elect_lane()) {
        constexpr int kWidth = kPanelBytes / 2;  // of a box, in elements of 16 bits
        Mbarrier& full = smem.full.at(turn);
        full.arrive_expecting(Shape::kShares * params.a_box_rows * kPanelBytes + Shape::kBBytes);
        if constexpr (Shape::kShares == 1) {
          tma_load_3d(smem_address(smem.a[stage]), params.a_map, full, step * kWidth, tile.row, 0);
        } else {
          constexpr int kRows = Shape::kBlockM / Shape::kShares;
          constexpr uint32_t kRanks = (1u << Shape::kShares) - 1;
          tma_multicast_3d(smem_address(smem.a[stage]) + part.share * kRows * kPanelBytes, params.a_map, full,
                           step * kWidth, tile.row + part.share * kRows, 0, kRanks << part.split * Shape::kShares);
        }
        for_each_box_of_b<Config>(tile, step, [&](int offset, int32_t x0, int32_t x1, int32_t x2) {
          tma_load_3d(smem_address(smem.b[stage]) + offset, params.b_map, full, x0, x1, x2);
        });
      }
      __syncwarp();
    }
  });
}

template <class Config>
__device__ __forceinline__ void produce_scales(const Sm90GroupGemmParams& params, GemmSmem<Config>& smem) {
  using Shape = GemmShape<Config>;
  const GemmPart<Config> part{params};
  const int lane_idx = threadIdx.x % 32;
  uint32_t turn = 0;
  part.for_each_tile(params, [&](const GemmTile& tile) {
    const bool by_map = params.has_a_scale_map && tile.row % 4 == 0;  // a box begins at a multiple of 16 bytes
    const float* a_scale = params.a_scale + (tile.row + lane_idx) * params.a_scale_row_stride;
    const int32_t column = tile.column + lane_idx % Shape::kScaleRuns * (Shape::kBlockN / Shape::kScaleRuns);
    const float* b_scale =
        params.b_scale + tile.weight * params.b_scale_weight_stride + column / kScaleBlock * params.b_scale_row_stride;
    for (int step = part.step_begin; step < part.step_end; ++step, ++turn) {
      const int stage = turn % Shape::kNumStages;
      Mbarrier& full = smem.scales.full.at(turn);
      smem.empty.wait_empty(turn);
      if (elect_lane()) {
        full.arrive_expecting(by_map ? Shape::kBlockM * int(sizeof(float)) : 0);
        constexpr int kBoxRows = Shape::kBlockM < 128 ? Shape::kBlockM : 128;
#pragma unroll
        for (int row = 0; by_map && row < Shape::kBlockM; row += kBoxRows) {
          tma_load_3d(smem_address(&smem.scales.a[stage][row]), params.a_scale_map, full, 2 * (tile.row + row), step,
                      0);
        }
      }
#pragma unroll
      for (int row = 0; !by_map && row < Shape::kBlockM; row += 32) {
        cp_async_4(smem_address(&smem.scales.a[stage][row + lane_idx]),
                   a_scale + row * params.a_scale_row_stride + step * params.a_scale_block_stride,
                   tile.row + row + lane_idx < tile.row_end);
      }
      if (lane_idx < Shape::kScaleRuns) {  // past the last column there are none
        cp_async_4(smem_address(&smem.scales.b[stage][lane_idx]), b_scale + step * params.b_scale_block_stride,
                   column < params.num_columns);
      }
      cp_async_arrive(full);
    }
  });
  cp_async_wait_all();  // a block may not end with copies under way
}

}  // namespace flashinfer::sm90
