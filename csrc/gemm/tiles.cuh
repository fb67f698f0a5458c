// SPDX-License-Identifier: Apache-2.0
// Which tiles of the output a block computes, and how it stores them.
#pragma once

#include "device/fragment.cuh"
#include "device/mma.cuh"
#include "gemm/params.h"

namespace flashinfer {

// Rows [row, row_end) of a group, at most as many as a tile has, and columns from `column` on.
struct GemmTile {
  int32_t row, row_end, column, weight;
};

// Tiles in an order in which blocks that run at the same time share rows and weights. A tile may be as wide as several
// blocks that work side by side: kTileColumns.
//
// How many tiles groups have is found on the way, by a warp, 32 groups at a time: all of its lanes ask for the same
// tile, each time for a later one.
template <int kTileRows, int kTileColumns>
struct GemmTiles {
  static constexpr uint32_t kStrip = 8;  // tiles of rows, of a single group, whose columns are done before the next

  const GroupGemmParams& params;
  uint32_t num_column_tiles = ceil_div(params.num_columns, kTileColumns);
  int32_t next_group = 0;                          // after those at hand
  uint32_t end_of_groups = 0;                      // tiles of rows up to there
  GemmGroup group{0, 0, 0};                        // the lane's
  uint32_t first_row_tile = 0, num_row_tiles = 0;  // of it

  // False if there is none.
  __device__ __forceinline__ bool find(uint32_t index, GemmTile& tile) {
    return params.indptr == nullptr ? find_in_one(index, tile) : find_in_groups(index, tile);
  }

 private:
  __device__ __forceinline__ bool find_in_one(uint32_t index, GemmTile& tile) const {
    const uint32_t num_rows = ceil_div(uint32_t(params.num_rows), uint32_t(kTileRows));
    if (index >= num_rows * num_column_tiles) return false;
    const uint32_t first = index / (kStrip * num_column_tiles) * kStrip, height = min(kStrip, num_rows - first);
    const uint32_t place = index - first * num_column_tiles;
    const int32_t row = int32_t(first + place % height) * kTileRows;
    tile = {row, min(row + kTileRows, params.num_rows), int32_t(place / height) * kTileColumns, 0};
    return true;
  }

  __device__ __forceinline__ bool find_in_groups(uint32_t index, GemmTile& tile) {
    const uint32_t row_tile = index / num_column_tiles;
    while (row_tile >= end_of_groups) {
      if (next_group >= params.num_groups) return false;
      load_groups();
    }
    const bool is_here = row_tile - first_row_tile < num_row_tiles;
    const int source = __ffs(__ballot_sync(0xffffffffu, is_here)) - 1;
    const auto of_source = [&](int32_t value) { return __shfl_sync(0xffffffffu, value, source); };
    const int32_t row = of_source(group.begin) + int32_t(row_tile - of_source(first_row_tile)) * kTileRows;
    tile.row = row, tile.row_end = min(row + kTileRows, of_source(group.end));
    tile.column = int32_t(index % num_column_tiles) * kTileColumns;
    tile.weight = of_source(group.weight);
    return true;
  }

  __device__ __forceinline__ void load_groups() {
    const int lane_idx = threadIdx.x % 32, group_idx = next_group + lane_idx;
    group = group_idx < params.num_groups ? GemmGroup::of(params, group_idx) : GemmGroup{0, 0, 0};
    num_row_tiles = ceil_div(group.end - group.begin, kTileRows);
    uint32_t sum = num_row_tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, sum, step);
      sum += lane_idx >= step ? before : 0;
    }
    first_row_tile = end_of_groups + sum - num_row_tiles;
    end_of_groups += __shfl_sync(0xffffffffu, sum, 31);
    next_group += 32;
  }
};

// Stores kNumColumns columns, from `column` on, of the 16 rows of a warp whose first of this lane is `row`: `sums` as
// device/fragment.cuh has them.
template <class Out, int kNumColumns, class Sums>
__device__ __forceinline__ void store_sums(const GroupGemmParams& params, const Sums& sums, int32_t row,
                                           int32_t row_end, int32_t column) {
  constexpr int kWide = kNumColumns / 32 * 32;
  const int lane_in_row = fresh_thread_idx() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t this_row = row + row_of(half);
    Out* output = static_cast<Out*>(params.output) + this_row * params.output_row_stride;
    const auto pair = [&](int first) {
      return pack_16bit<Out>(at(sums, half, first / 4), at(sums, half, first / 4 + 1));
    };
#pragma unroll
    for (int first = 0; first < kWide; first += 32) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pair(first + 8 * i);
      transpose_quad(x);
      const int32_t this_column = column + first + 8 * lane_in_row;
      if (this_row < row_end && this_column < params.num_columns) {
        *reinterpret_cast<uint4*>(output + this_column) = {x[0], x[1], x[2], x[3]};
      }
    }
#pragma unroll
    for (int first = kWide; first < kNumColumns; first += 8) {
      const int32_t this_column = column + first + 2 * lane_in_row;
      const uint32_t x = pair(first);
      if (this_row < row_end && this_column < params.num_columns) {
        *reinterpret_cast<uint32_t*>(output + this_column) = x;
      }
    }
  }
}

}  // namespace flashinfer
