// SPDX-License-Identifier: Apache-2.0
// The warps of the Hopper kernel of products that bring in what the others multiply: one has operands and scales, by
// TMA; one has scales of rows that lie otherwise than TMA takes them.
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

// The scales of b for a tile: a lane has those of every 32nd step.
template <class Config, bool kExist = GemmShape<Config>::kIsScaled>
struct ScalesOfB {
  using Shape = GemmShape<Config>;
  const Sm90GroupGemmParams& params;
  const GemmTile& tile;
  const int lane_idx = int(threadIdx.x % 32);
  float scales[Shape::kScaleRuns];

  // Loads those of 32 steps, once in as many; past the last column there are none.
  __device__ __forceinline__ void look_ahead(int step, const GemmPart<Config>& part) {
    if ((step - part.step_begin) % 32 != 0) return;
#pragma unroll
    for (int run = 0; run < Shape::kScaleRuns; ++run) {
      const int32_t column = tile.column + run * (Shape::kBlockN / Shape::kScaleRuns);
      const bool exists = column < params.num_columns && step + lane_idx < part.step_end;
      scales[run] = exists ? params.b_scale[tile.weight * params.b_scale_weight_stride +
                                            column / kScaleBlock * params.b_scale_row_stride +
                                            (step + lane_idx) * params.b_scale_block_stride]
                           : 0.f;
    }
  }
  __device__ __forceinline__ void put(int step, const GemmPart<Config>& part, GemmSmem<Config>& smem, int stage) const {
    if ((step - part.step_begin) % 32 == lane_idx) {
#pragma unroll
      for (int run = 0; run < Shape::kScaleRuns; ++run) smem.scales.b[stage][run] = scales[run];
    }
    __syncwarp();
  }
};
template <class Config>
struct ScalesOfB<Config, false> {
  const Sm90GroupGemmParams& params;
  const GemmTile& tile;
  __device__ __forceinline__ void look_ahead(int, const GemmPart<Config>&) const {}
  __device__ __forceinline__ void put(int, const GemmPart<Config>&, GemmSmem<Config>&, int) const {}
};

template <class Config>
__device__ __forceinline__ void produce_operands(const Sm90GroupGemmParams& params, GemmSmem<Config>& smem) {
  using Shape = GemmShape<Config>;
  const GemmPart<Config> part{params};
  const bool brings_scales = Shape::kIsScaled && params.a_scale == nullptr;
  const int num_bytes = Shape::kShares * params.a_box_rows * kPanelBytes + Shape::kBBytes +
                        (brings_scales ? Shape::kBlockM * int(sizeof(float)) : 0);
  uint32_t turn = 0;
  part.for_each_tile(params, [&](const GemmTile& tile) {
    ScalesOfB<Config> scales{params, tile};
    for (int step = part.step_begin; step < part.step_end; ++step, ++turn) {
      const int stage = turn % Shape::kNumStages;
      scales.look_ahead(step, part);
      smem.empty.wait_empty(turn);
      scales.put(step, part, smem, stage);
      if (elect_lane()) {
        constexpr int kWidth = kPanelBytes / 2;  // of a box, in elements of 16 bits
        Mbarrier& full = smem.full.at(turn);
        full.arrive_expecting(num_bytes);
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
        if constexpr (Shape::kIsScaled) {
          if (brings_scales) {
            constexpr int kBoxRows = Shape::kBlockM < 128 ? Shape::kBlockM : 128;
#pragma unroll
            for (int row = 0; row < Shape::kBlockM; row += kBoxRows) {
              tma_load_3d(smem_address(&smem.scales.a[stage][row]), params.a_scale_map, full, 2 * (tile.row + row),
                          step, 0);
            }
          }
        }
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
    const float* a_scale = params.a_scale + (tile.row + lane_idx) * params.a_scale_row_stride;
    for (int step = part.step_begin; step < part.step_end; ++step, ++turn) {
      const int stage = turn % Shape::kNumStages;
      smem.empty.wait_empty(turn);
#pragma unroll
      for (int row = 0; row < Shape::kBlockM; row += 32) {
        cp_async_4(smem_address(&smem.scales.a[stage][row + lane_idx]),
                   a_scale + row * params.a_scale_row_stride + step * params.a_scale_block_stride,
                   tile.row + row + lane_idx < tile.row_end);
      }
      cp_async_arrive(smem.full.at(turn));
    }
  });
  cp_async_wait_all();  // a block may not end with copies under way
}

}  // namespace flashinfer::sm90
