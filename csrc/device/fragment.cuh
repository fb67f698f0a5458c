// Accumulators of tensor-core products by row and column.
//
// Of every 8 columns of C, lane l holds two in each of two rows: rows l / 4 and l / 4 + 8 of the 16 of a warp, columns
// 2 (l % 4) and the next. mma.sync leaves them so in c[4] of every m16n8 tile, wgmma in one array for all of its
// columns. Loops go over the two rows, `half` 0 and 1, and within a row over this lane's elements, `i`.
#pragma once

#include "common.h"

namespace flashinfer {

// Of the lane's first element in the tile; its others are row_of(half) and column_of(i) further.
__device__ __forceinline__ int lane_row(int lane_idx) {
  return lane_idx / 4;
}
__device__ __forceinline__ int lane_column(int lane_idx) {
  return lane_idx % 4 * 2;
}
__device__ __forceinline__ constexpr int row_of(int half) {
  return half * 8;
}
__device__ __forceinline__ constexpr int column_of(int i) {
  return i / 2 * 8 + i % 2;
}

// Element i of the lane's row `half`.
template <int kNumTiles>
__device__ __forceinline__ float& at(float (&tiles)[kNumTiles][4], int half, int i) {
  return tiles[i / 2][2 * half + i % 2];
}
template <int kNumTiles>
__device__ __forceinline__ const float& at(const float (&tiles)[kNumTiles][4], int half, int i) {
  return tiles[i / 2][2 * half + i % 2];
}
template <int kNum>
__device__ __forceinline__ float& at(float (&elements)[kNum], int half, int i) {
  return elements[i / 2 * 4 + 2 * half + i % 2];
}
template <int kNum>
__device__ __forceinline__ const float& at(const float (&elements)[kNum], int half, int i) {
  return elements[i / 2 * 4 + 2 * half + i % 2];
}

}  // namespace flashinfer
