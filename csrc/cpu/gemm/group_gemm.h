// SPDX-License-Identifier: Apache-2.0
// Products of segments of rows with weights on the CPU: the equations and shapes of gemm/group_gemm.cuh.
//
// A thread has a tile of the output at a time. Of each 128 elements of the depth, what it multiplies is first made
// floats.
#pragma once

#include "cpu/scratch.h"
#include "cpu/types.h"
#include "gemm/params.h"

namespace flashinfer::cpu {

constexpr int kGemmRows = 16, kGemmColumns = 32;

struct GemmTile {
  float a[kGemmRows][kScaleBlock], b[kGemmColumns][kScaleBlock], sums[kGemmRows][kGemmColumns];
};

// Elements [first, first + num) of the depth, of rows of a.
template <class T>
inline void load_gemm_rows(const T* src, int64_t row_stride, int num_rows, int num, float (*dst)[kScaleBlock]) {
  for (int row = 0; row < num_rows; ++row) {
#pragma omp simd
    for (int i = 0; i < num; ++i) dst[row][i] = to_float(src[row * row_stride + i]);
  }
}

template <class Config>
inline void group_gemm_tile(const GroupGemmParams& params, const GemmGroup& group, int32_t first_row,
                            int32_t first_column, GemmTile& tile) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  const int num_rows = group.end - first_row < kGemmRows ? group.end - first_row : kGemmRows;
  const int columns_left = params.num_columns - first_column;
  const int num_columns = columns_left < kGemmColumns ? columns_left : kGemmColumns;
  const T* a = static_cast<const T*>(params.a) + first_row * params.a_row_stride;
  const T* b = static_cast<const T*>(params.b) + group.weight * params.b_weight_stride;
  for (auto& row : tile.sums) {
    for (float& sum : row) sum = 0.f;
  }
  for (int32_t first = 0; first < params.depth; first += kScaleBlock) {
    const int num = params.depth - first < kScaleBlock ? params.depth - first : kScaleBlock;
    load_gemm_rows(a + first, params.a_row_stride, num_rows, num, tile.a);
    if constexpr (Config::kDepthMajor) {
      load_gemm_rows(b + first_column * params.b_row_stride + first, params.b_row_stride, num_columns, num, tile.b);
    } else {
      for (int i = 0; i < num; ++i) {
        const T* row = b + (first + i) * params.b_row_stride + first_column;
        for (int column = 0; column < num_columns; ++column) tile.b[column][i] = to_float(row[column]);
      }
    }
    const int32_t block = first / kScaleBlock;
    for (int row = 0; row < num_rows; ++row) {
      const float a_scale =
          Config::kScaleColumns == 0
              ? 1.f
              : params.a_scale[(first_row + row) * params.a_scale_row_stride + block * params.a_scale_block_stride];
      for (int column = 0; column < num_columns; ++column) {
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < num; ++i) sum += tile.a[row][i] * tile.b[column][i];
        if constexpr (Config::kScaleColumns != 0) {
          sum *= a_scale * params.b_scale[group.weight * params.b_scale_weight_stride +
                                          (first_column + column) / Config::kScaleColumns * params.b_scale_row_stride +
                                          block * params.b_scale_block_stride];
        }
        tile.sums[row][column] += sum;
      }
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    Out* output = static_cast<Out*>(params.output) + (first_row + row) * params.output_row_stride + first_column;
    for (int column = 0; column < num_columns; ++column) output[column] = from_float<Out>(tile.sums[row][column]);
  }
}

// Config: T, Out, kDepthMajor, kScaleColumns. Returns whether there was memory for the tiles.
template <class Config>
bool group_gemm(const GroupGemmParams& params) {
  const int64_t num_column_tiles = ceil_div(params.num_columns, kGemmColumns);
  bool has_memory = true;
#pragma omp parallel if (int64_t(params.num_rows) * params.num_columns * params.depth >= 16 * kMinParallelElements)
  {
    const Scratch<GemmTile> tile;
    if (tile.data == nullptr) {
#pragma omp atomic write
      has_memory = false;
    }
    for (int32_t group_idx = 0; group_idx < params.num_groups; ++group_idx) {
      const GemmGroup group = GemmGroup::of(params, group_idx);
      const int64_t num_row_tiles = ceil_div(group.end - group.begin, kGemmRows);
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < num_row_tiles * num_column_tiles; ++i) {
        if (tile.data == nullptr) continue;
        const int32_t first_row = group.begin + int32_t(i % num_row_tiles) * kGemmRows;
        group_gemm_tile<Config>(params, group, first_row, int32_t(i / num_row_tiles) * kGemmColumns, *tile.data);
      }
    }
  }
  return has_memory;
}

}  // namespace flashinfer::cpu
