// SPDX-License-Identifier: Apache-2.0
// Products of segments of rows with weights (gemm/params.h) on every GPU from sm_80 on, by mma.sync.
//
//   output[r, n] = sum_k a[r, k] b[w, n, k]        of a segment's rows r and its weight w
//   output[r, n] = sum_j a_scale[r, j] b_scale[w, n / 128, j] sum_(k in block j) a[r, k] b[w, n, k]
//
//   a [num_rows, depth] T, b [num_weights, num_columns, depth] or [num_weights, depth, num_columns] T
//   -> output [num_rows, num_columns] Out
//
// A block computes tiles of the output, one after the other, and brings in 128 bytes of each of their rows of a and b
// at a time. Operands of 8 bits become fp16 on the way to the tensor cores, which is exact; 128 of them are summed,
// scaled and added in fp32.
#pragma once

#include "device/cp_async.cuh"
#include "device/kv_codec.cuh"
#include "device/ldmatrix.cuh"
#include "device/pdl.cuh"
#include "device/swizzle.cuh"
#include "gemm/tiles.cuh"

namespace flashinfer {

template <class Config>
struct GemmShape {
  using T = typename Config::T;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kNumStages = Config::kNumStages;
  static constexpr int kWarpsM = Config::kWarpsM, kWarpsN = Config::kNumThreads / 32 / kWarpsM;
  static constexpr int kRowsPerWarp = kBlockM / kWarpsM, kColumnsPerWarp = kBlockN / kWarpsN;
  static constexpr int kFragsM = kRowsPerWarp / 16, kFragsN = kColumnsPerWarp / 8;
  static constexpr int kStepBytes = 128, kDepth = kStepBytes / sizeof(T);  // of a step
  static constexpr int kGranule = 16 / sizeof(T);
  static constexpr bool kDepthMajor = Config::kDepthMajor, kIsScaled = Config::kScaleColumns != 0;
  static_assert(kFragsM > 0 && kColumnsPerWarp % 32 == 0);
  static_assert(kDepthMajor || sizeof(T) == 2, "ldmatrix transposes 16-bit elements");
  static_assert(!kIsScaled || kDepth == kScaleBlock);

  using ARows = SwizzledRows<kStepBytes>;
  using BRows = SwizzledRows<kDepthMajor ? kStepBytes : kBlockN * int(sizeof(T))>;
  static constexpr int kBRows = kDepthMajor ? kBlockN : kDepth;
  static constexpr int kABytes = kBlockM * kStepBytes, kBBytes = kBlockN * kStepBytes;
};

template <class Config>
struct GemmBlock {
  using Shape = GemmShape<Config>;
  using T = typename Shape::T;
  using ARows = typename Shape::ARows;
  using BRows = typename Shape::BRows;
  using Sums = float[Shape::kFragsM][Shape::kFragsN][4];

  const GroupGemmParams& params;
  const uint32_t smem;
  const GemmTile tile;

  __device__ __forceinline__ uint32_t a_smem(int step) const {
    return smem + step % Shape::kNumStages * (Shape::kABytes + Shape::kBBytes);
  }
  __device__ __forceinline__ uint32_t b_smem(int step) const { return a_smem(step) + Shape::kABytes; }
  __device__ __forceinline__ int num_steps() const { return ceil_div(params.depth, Shape::kDepth); }

  // What lies outside of the tile becomes zeros. One group of copies, of nothing past the last step.
  __device__ __forceinline__ void load(int step) const {
    if (step < num_steps()) {
      constexpr int kGranules = Shape::kStepBytes / 16, kBGranules = BRows::kNumGranules;
      const int depth = step * Shape::kDepth;
      const T* a = static_cast<const T*>(params.a);
      const T* b = static_cast<const T*>(params.b) + tile.weight * params.b_weight_stride;
      static_assert(Shape::kBlockM * kGranules % Config::kNumThreads == 0);
      static_assert(Shape::kBRows * kBGranules % Config::kNumThreads == 0);
#pragma unroll
      for (int turn = 0; turn < Shape::kBlockM * kGranules / Config::kNumThreads; ++turn) {
        const int i = turn * Config::kNumThreads + int(threadIdx.x);
        const int row = i / kGranules, k = depth + i % kGranules * Shape::kGranule;
        const bool exists = tile.row + row < tile.row_end && k < params.depth;
        cp_async_16(a_smem(step) + ARows::offset(row, i % kGranules), a + (tile.row + row) * params.a_row_stride + k,
                    exists);
      }
#pragma unroll
      for (int turn = 0; turn < Shape::kBRows * kBGranules / Config::kNumThreads; ++turn) {
        const int i = turn * Config::kNumThreads + int(threadIdx.x);
        const int row = i / kBGranules, along = i % kBGranules * Shape::kGranule;
        const int column = tile.column + (Shape::kDepthMajor ? row : along);
        const int k = depth + (Shape::kDepthMajor ? along : row);
        const bool exists = column < params.num_columns && k < params.depth;
        const int64_t offset = Shape::kDepthMajor ? column * params.b_row_stride + k : k * params.b_row_stride + column;
        cp_async_16(b_smem(step) + BRows::offset(row, i % kBGranules), b + offset, exists);
      }
    }
    cp_async_commit();
  }

  // Adds the products of a step.
  __device__ __forceinline__ void multiply(int step, Sums& sums) const {
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
    const int first_row = warp_idx / Shape::kWarpsN * Shape::kRowsPerWarp;
    const int first_column = warp_idx % Shape::kWarpsN * Shape::kColumnsPerWarp;
#pragma unroll
    for (int granule = 0; granule < Shape::kStepBytes / 16; granule += 2) {
      uint32_t a[Shape::kFragsM][4];
#pragma unroll
      for (int i = 0; i < Shape::kFragsM; ++i) {
        ldmatrix_x4(a[i], a_smem(step) + ARows::offset(first_row + 16 * i + lane_idx % 16, granule + lane_idx / 16));
      }
#pragma unroll
      for (int j = 0; j < Shape::kFragsN; j += 2) {  // 16 columns
        uint32_t b[4];
        const int column = first_column + 8 * j;
        if constexpr (Shape::kDepthMajor) {
          const int row = column + lane_idx % 8 + lane_idx / 16 * 8;
          ldmatrix_x4(b, b_smem(step) + BRows::offset(row, granule + lane_idx / 8 % 2));
        } else {
          const int row = granule * 8 + lane_idx % 16;
          ldmatrix_x4_trans(b, b_smem(step) + BRows::offset(row, column / 8 + lane_idx / 16));
        }
#pragma unroll
        for (int i = 0; i < Shape::kFragsM; ++i) {
          multiply_16_columns(sums[i][j], sums[i][j + 1], a[i], b);
        }
      }
    }
  }

  // 32 bytes deep. Of 8-bit elements a register holds four of a row: the first two stand for elements 2q and 2q + 1 of
  // a product 16 deep, the others for 2q + 8 and 2q + 9, in a and b alike.
  __device__ __forceinline__ static void multiply_16_columns(float (&left)[4], float (&right)[4],
                                                             const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    if constexpr (sizeof(T) == 2) {
      mma_m16n8k16<T>(left, a, b[0], b[1]);
      mma_m16n8k16<T>(right, a, b[2], b[3]);
    } else {
      using Codec = KvCodec<fp16, T>;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t upper = a[2 * half], lower = a[2 * half + 1];
        const uint32_t pairs[4] = {Codec::pair(upper, kBytes01), Codec::pair(lower, kBytes01),
                                   Codec::pair(upper, kBytes23), Codec::pair(lower, kBytes23)};
        mma_m16n8k16<fp16>(left, pairs, Codec::pair(b[half], kBytes01), Codec::pair(b[half], kBytes23));
        mma_m16n8k16<fp16>(right, pairs, Codec::pair(b[2 + half], kBytes01), Codec::pair(b[2 + half], kBytes23));
      }
    }
  }

  // totals += products, each times the scales of its row and its column in this step.
  __device__ __forceinline__ void add_scaled(int step, Sums& totals, const Sums& products) const {
    const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
    const int row = tile.row + warp_idx / Shape::kWarpsN * Shape::kRowsPerWarp + lane_row(lane_idx);
    const int column = tile.column + warp_idx % Shape::kWarpsN * Shape::kColumnsPerWarp + lane_column(lane_idx);
    float of_rows[Shape::kFragsM][2];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int this_row = min(row + 16 * m + row_of(half), tile.row_end - 1);
        of_rows[m][half] =
            __ldg(params.a_scale + this_row * params.a_scale_row_stride + step * params.a_scale_block_stride);
      }
    }
    const float* b_scale =
        params.b_scale + tile.weight * params.b_scale_weight_stride + step * params.b_scale_block_stride;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kFragsN; ++i) {
      // One of all columns of the warp, or each its own.
      const int among = Config::kScaleColumns >= Shape::kBlockN ? 0 : column_of(i);
      const int this_column = min(column + among, params.num_columns - 1);
      const float of_column = __ldg(b_scale + this_column / Config::kScaleColumns * params.b_scale_row_stride);
#pragma unroll
      for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          at(totals[m], half, i) += at(products[m], half, i) * (of_rows[m][half] * of_column);
        }
      }
    }
  }

  __device__ __forceinline__ void run() const {
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int step = 0; step < Shape::kNumStages - 1; ++step) load(step);
    Sums totals{};
#pragma unroll 1
    for (int step = 0; step < num_steps(); ++step) {
      cp_async_wait<Shape::kNumStages - 2>();
      __syncthreads();
      load(step + Shape::kNumStages - 1);
      if constexpr (Shape::kIsScaled) {
        Sums products{};
        multiply(step, products);
        add_scaled(step, totals, products);
      } else {
        multiply(step, totals);
      }
    }
    const int warp_idx = threadIdx.x / 32;
    const int row = tile.row + warp_idx / Shape::kWarpsN * Shape::kRowsPerWarp + lane_row(threadIdx.x % 32);
    const int column = tile.column + warp_idx % Shape::kWarpsN * Shape::kColumnsPerWarp;
#pragma unroll
    for (int i = 0; i < Shape::kFragsM; ++i) {
      store_sums<typename Config::Out, Shape::kColumnsPerWarp>(params, totals[i], row + 16 * i, tile.row_end, column);
    }
  }
};

// Config: T, Out, kDepthMajor, kScaleColumns, and the tile: kBlockM, kBlockN, kWarpsM, kNumStages. Grid: any number of
// blocks.
template <class Config>
__device__ __forceinline__ void group_gemm(const GroupGemmParams& params) {
  using Shape = GemmShape<Config>;
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  static_assert(Shape::kNumStages * (Shape::kABytes + Shape::kBBytes) <= Config::kSmemBytes);
  wait_for_previous_kernel();
  allow_next_kernel();
  GemmTiles<Shape::kBlockM, Shape::kBlockN> tiles{params};
  GemmTile tile;
  for (uint32_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x) {
    GemmBlock<Config>{params, smem_address(smem_bytes), tile}.run();
  }
  cp_async_wait_all();
}

}  // namespace flashinfer
