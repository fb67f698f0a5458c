// SPDX-License-Identifier: Apache-2.0
// Accumulators of tensor-core products by row and column.
//
// Of every 8 columns of C, lane l holds two in each of two rows: rows l / 4 and l / 4 + 8 of the 16 of a warp, columns
// 2 (l % 4) and the next. mma.sync leaves them so in c[4] of every m16n8 tile, wgmma in one array for all of its
// columns. Loops go over the two rows, `half` 0 and 1, and within a row over this lane's elements, `i`.
#pragma once

#include "device/thread_idx.cuh"

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

// Of four lanes that share a row: x[i], a pair of columns of the i-th 8, becomes the i-th pair of the 8 of this lane,
// who then has 16 bytes in one place.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const int lane = fresh_thread_idx() % 4;
  const auto swap_if = [](bool condition, uint32_t& a, uint32_t& b) {
    const uint32_t old_a = a;
    a = condition ? b : a, b = condition ? old_a : b;
  };
  const auto reorder = [&] {  // x[i] becomes x[i ^ lane]
    swap_if(lane & 1, x[0], x[1]), swap_if(lane & 1, x[2], x[3]);
    swap_if(lane & 2, x[0], x[2]), swap_if(lane & 2, x[1], x[3]);
  };
  reorder();
#pragma unroll
  for (int i = 1; i < 4; ++i) x[i] = __shfl_xor_sync(0xffffffffu, x[i], i);
  reorder();
}

}  // namespace flashinfer
