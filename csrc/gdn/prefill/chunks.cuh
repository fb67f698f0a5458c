// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule, its first kernel: the triangular systems that stand between the tokens of a chunk,
// of all chunks at once.
//
//   A[i, j] = beta_i 2^(G_i - G_j) k_i·k_j  for j < i, else 0        inverse = (I + A)⁻¹ diag(beta)
//
//   k [num_tokens, heads of k, 128], gate and beta [num_tokens, num_heads]
//   -> chunks [chunk slots, num_heads] of GdnChunk (gdn/prefill/tile.cuh)
//
// In blocks of 16x16 tokens. Blocks on the diagonal are inverted by substitution, a column a lane, in fp32; those below
// follow from X[b, a] = -X[b, b] (A[b, a] X[a, a] + ... + A[b, b-1] X[b-1, a]), a column of blocks a warp, in fp16:
// that has more bits than bf16, and neither A nor its inverse leaves its range unless the recurrence itself diverges.
#pragma once

#include "device/fast_math.cuh"
#include "device/pdl.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

constexpr float kGdnLogZero = -128.f;  // log2 of what counts as zero: the power of 2 of it is

struct GdnChunkSmem {
  struct Blocks {
    alignas(128) uint8_t system[kGdnChunk * kGdnChunk * 2];  // fp16: A below the diagonal blocks, on it their inverses,
                                                             // transposed
    alignas(16) float diagonal[kGdnBlocks][16][16];          // of A, transposed
  };
  union {
    alignas(128) uint8_t k[kGdnChunk * kGdnDim * 2];
    Blocks blocks;  // when K Kᵀ is in registers
  };
  float beta[kGdnChunk];
  GdnChunk chunk;
};

template <class Config>
struct GdnChunkSolver {
  using T = typename Config::T;
  using Keys = GdnRowStream<T, GdnRows, kGdnChunk, 128, 16>;
  static_assert(kGdnBlocks == 4, "the blocks of A are dealt out to four warps");

  const GdnPrefillParams& params;
  GdnChunkSmem& smem;
  const int head, warp_idx, lane_idx;

  // Of the tokens of one chunk.
  __device__ void run(const GdnSequence& tokens) {
    Keys(params.k, params.k_strides, head / params.heads_per_k, 0, tokens, 0, threadIdx.x)
        .load_async(smem_address(smem.k));
    if (warp_idx == 3) load_gates(tokens);
    clear_inverse();
    cp_async_wait_all();
    __syncthreads();
    float products[3][2][4] = {};
    if (warp_idx == 0) multiply_keys<0>(products);
    if (warp_idx == 1) multiply_keys<1>(products);
    if (warp_idx == 2) multiply_keys<2>(products);
    if (warp_idx == 3) multiply_keys<3>(products);
    __syncthreads();  // keys are done with, and lengths known
    if (warp_idx == 0) store_blocks<0>(products);
    if (warp_idx == 1) store_blocks<1>(products);
    if (warp_idx == 2) store_blocks<2>(products);
    if (warp_idx == 3) store_blocks<3>(products);
    __syncthreads();
    invert_diagonal();
    __syncthreads();
    if (warp_idx < 3) {
      invert_below();
    } else {  // has no blocks below
      finish_scalars();
    }
  }

 private:
  // Of what is above the diagonal some read every block.
  __device__ __forceinline__ void clear_inverse() {
    constexpr int kNumVecs = sizeof(GdnChunk::inverse) / 16;
#pragma unroll
    for (int i = 0; i < kNumVecs; i += 128) reinterpret_cast<uint4*>(smem.chunk.inverse)[i + threadIdx.x] = uint4{};
  }

  // By one warp: running sums of log2 alpha, of tokens 2 lane_idx and the next.
  __device__ __forceinline__ void load_gates(const GdnSequence& tokens) {
    float log[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = int64_t(tokens.begin) + 2 * lane_idx + i;
      const bool valid = token < tokens.end;
      float gate = Config::kLogGate ? 0.f : 1.f, beta = valid ? 1.f : 0.f;
      if (valid && params.gate != nullptr) {
        gate = params.gate[token * params.gate_strides.token + head * params.gate_strides.head];
      }
      if (valid && params.beta != nullptr) {
        beta = params.beta[token * params.beta_strides.token + head * params.beta_strides.head];
      }
      smem.beta[2 * lane_idx + i] = beta;
      log[i] = Config::kLogGate ? gate * 1.44269504f : log2f(gate);
      log[i] = log[i] < kGdnLogZero ? kGdnLogZero : log[i];  // of -inf the differences would be NaN
    }
    float sum = log[0] + log[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane_idx >= offset) sum += before;
    }
    reinterpret_cast<float2*>(smem.chunk.log_decay)[lane_idx] = {sum - log[1], sum};
  }

  __device__ __forceinline__ void finish_scalars() {
    GdnChunk& chunk = smem.chunk;
    const float last = chunk.log_decay[kGdnChunk - 1];
#pragma unroll
    for (int token = lane_idx; token < kGdnChunk; token += 32) {
      const float log_decay = chunk.log_decay[token];
      const float key_scale = Config::kNormalize ? chunk.key_scale[token] : 1.f;
      chunk.key_scale[token] = key_scale;
      chunk.recall_scale[token] = fast_exp2(log_decay) * key_scale;
      chunk.write_scale[token] = fast_exp2(last - log_decay) * key_scale;
    }
  }

  // Of K Kᵀ each warp has two or three blocks that share rows.
  //   warp 0: (3, 0), (3, 1)   warp 1: (3, 2), (3, 3)   warp 2: (2, 0), (2, 1), (2, 2)   warp 3: (1, 0), (1, 1), (0, 0)
  template <int kWarp>
  struct Blocks {
    static constexpr int kRow = kWarp < 2 ? 3 : 4 - kWarp, kColumn = kWarp == 1 ? 2 : 0;  // the first
    static constexpr bool kHasDiagonal = kWarp != 0;                                      // the second: (kRow, kRow)
    static constexpr bool kHasNext = kWarp % 2 == 0, kHasTop = kWarp == 3;  // the third: (kRow, 1), (0, 0)
  };

  template <int kWarp>
  __device__ __forceinline__ void multiply_keys(float (&products)[3][2][4]) {
    using Mine = Blocks<kWarp>;
    const uint32_t k_smem = smem_address(smem.k);
    const auto as_a = GdnFragment<GdnRows>::as_a(lane_idx), as_b = GdnFragment<GdnRows>::as_b(lane_idx);
#pragma unroll
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      uint32_t rows[4], columns[4];
      ldmatrix_x4(rows, as_a.address(k_smem, Mine::kRow, i));
      ldmatrix_x4(columns, as_b.address(k_smem, Mine::kColumn, i));
      mma_block<T>(products[0], rows, columns);
      if constexpr (Mine::kHasTop) {
        uint32_t top[4];
        ldmatrix_x4(top, as_a.address(k_smem, 0, i));
        mma_block<T>(products[2], top, columns);
      }
      if constexpr (Mine::kHasDiagonal) {
        ldmatrix_x4(columns, as_b.address(k_smem, Mine::kRow, i));
        mma_block<T>(products[1], rows, columns);
      }
      if constexpr (Mine::kHasNext) {
        ldmatrix_x4(columns, as_b.address(k_smem, 1, i));
        mma_block<T>(products[2], rows, columns);
      }
    }
    if constexpr (Config::kNormalize) {
      if (Mine::kHasDiagonal) publish_lengths(Mine::kRow, products[1]);
      if (Mine::kHasTop) publish_lengths(0, products[2]);
    }
  }

  template <int kWarp>
  __device__ __forceinline__ void store_blocks(const float (&products)[3][2][4]) {
    using Mine = Blocks<kWarp>;
    store_block<Mine::kRow, Mine::kColumn>(products[0]);
    if constexpr (Mine::kHasDiagonal) store_block<Mine::kRow, Mine::kRow>(products[1]);
    if constexpr (Mine::kHasNext) store_block<Mine::kRow, 1>(products[2]);
    if constexpr (Mine::kHasTop) store_block<0, 0>(products[2]);
  }

  // Squares of the keys' lengths are on the diagonal of K Kᵀ.
  __device__ __forceinline__ void publish_lengths(int block, const float (&products)[2][4]) {
    const int row = lane_row(lane_idx);
    if (lane_idx % 4 != row / 2) return;
    float* key_scale = smem.chunk.key_scale + block * 16 + row;
    key_scale[0] = rsqrtf((row & 1 ? products[0][1] : products[0][0]) + kGdnNormEps);
    key_scale[8] = rsqrtf((row & 1 ? products[1][3] : products[1][2]) + kGdnNormEps);
  }

  template <int kRowBlock, int kColumnBlock>
  __device__ __forceinline__ void store_block(const float (&products)[2][4]) {
    const GdnChunk& chunk = smem.chunk;
    const int first_row = kRowBlock * 16 + lane_row(lane_idx);
    const int first_column = kColumnBlock * 16 + lane_column(lane_idx);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + row_of(half);
      const float row_log = chunk.log_decay[row];
      const float row_scale = smem.beta[row] * (Config::kNormalize ? chunk.key_scale[row] : 1.f);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int column = first_column + 8 * tile;
        const float2 column_log = reinterpret_cast<const float2&>(chunk.log_decay[column]);
        float2 scale = {row_scale * fast_exp2(row_log - column_log.x), row_scale * fast_exp2(row_log - column_log.y)};
        if constexpr (Config::kNormalize) {
          const float2 key_scale = reinterpret_cast<const float2&>(chunk.key_scale[column]);
          scale.x *= key_scale.x, scale.y *= key_scale.y;
        }
        const float2 a = {products[tile][2 * half] * scale.x, products[tile][2 * half + 1] * scale.y};
        if constexpr (kRowBlock == kColumnBlock) {  // substitution reads what lies below the diagonal alone
          smem.blocks.diagonal[kRowBlock][column % 16][row % 16] = a.x;
          smem.blocks.diagonal[kRowBlock][column % 16 + 1][row % 16] = a.y;
        } else {
          store_pair(smem.blocks.system, row, column, pack_16bit<fp16>(a.x, a.y));
        }
      }
    }
  }

  __device__ __forceinline__ static void store_pair(uint8_t* tile, int row, int column, uint32_t pair) {
    *reinterpret_cast<uint32_t*>(tile + GdnSquare::offset(row, column / 8) + column % 8 * 2) = pair;
  }

  // A block on the diagonal a warp, a column of its inverse a lane; the upper lanes store what is given to the state.
  // Inverses are stored transposed, here and below.
  __device__ __forceinline__ void invert_diagonal() {
    const int column = lane_idx % 16, first = warp_idx * 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < 15; ++j) {
      float below[16];  // a column of A
#pragma unroll
      for (int i = (j + 1) / 4 * 4; i < 16; i += 4) {
        const float4 part = reinterpret_cast<const float4&>(smem.blocks.diagonal[warp_idx][j][i]);
        below[i] = part.x, below[i + 1] = part.y, below[i + 2] = part.z, below[i + 3] = part.w;
      }
#pragma unroll
      for (int i = j + 1; i < 16; ++i) x[i] -= below[i] * x[j];
    }
    const bool is_upper = lane_idx >= 16;
    const float beta = smem.beta[first + column];
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pairs[i] =
          is_upper ? pack_16bit<T>(x[2 * i] * beta, x[2 * i + 1] * beta) : pack_16bit<fp16>(x[2 * i], x[2 * i + 1]);
    }
    uint8_t* tile = is_upper ? smem.chunk.inverse : smem.blocks.system;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(tile + GdnSquare::offset(first + column, first / 8 + i)) = {
          pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
    }
  }

  // A column of blocks a warp. The blocks are held transposed: an accumulator is then the next product's A fragment.
  __device__ __forceinline__ void invert_below() {
    const uint32_t system_smem = smem_address(smem.blocks.system);
    const auto as_a = GdnFragment<GdnSquare>::as_a(lane_idx), as_b = GdnFragment<GdnSquare>::as_b(lane_idx);
    const int column_block = warp_idx, row = lane_row(lane_idx), column = lane_column(lane_idx);
    uint32_t column_blocks[kGdnBlocks - 1][4];  // those of the inverse, from the diagonal down
    ldmatrix_x4(column_blocks[0], as_a.address(system_smem, column_block, column_block));
    const float beta[2] = {smem.beta[column_block * 16 + row], smem.beta[column_block * 16 + row + 8]};
#pragma unroll
    for (int step = 1; step < kGdnBlocks; ++step) {
      const int row_block = column_block + step;
      if (row_block >= kGdnBlocks) break;
      float sum[2][4] = {}, x[2][4] = {};
      uint32_t b[4], a[4];
#pragma unroll
      for (int i = 0; i < step; ++i) {
        ldmatrix_x4(b, as_b.address(system_smem, row_block, column_block + i));
        mma_block<fp16>(sum, column_blocks[i], b);
      }
      pack_block<fp16>(a, sum);
      ldmatrix_x4_trans(b, as_a.address(system_smem, row_block, row_block));
      mma_block<fp16>(x, a, b);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[tile][i] = -x[tile][i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_pair(smem.chunk.inverse, column_block * 16 + 8 * half + row, row_block * 16 + 8 * tile + column,
                     pack_16bit<T>(x[tile][2 * half] * beta[half], x[tile][2 * half + 1] * beta[half]));
        }
      }
      if (step + 1 < kGdnBlocks) pack_block<fp16>(column_blocks[step], x);
    }
  }
};

// Config: T, kLogGate, kNormalize. Grid: chunk slots times heads.
template <class Config>
__device__ void gdn_prefill_chunks(const GdnPrefillParams& params) {
  __shared__ GdnChunkSmem smem;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int slot = int(blockIdx.x) / params.num_heads, head = int(blockIdx.x) % params.num_heads;
  GdnPiece piece;
  if (!piece.find(params, slot, kGdnChunk) || piece.tokens.begin == piece.tokens.end) return;
  GdnChunkSolver<Config>{params, smem, head, int(threadIdx.x) / 32, int(threadIdx.x) % 32}.run(piece.tokens);
  __syncthreads();
  uint4* dst = reinterpret_cast<uint4*>(static_cast<GdnChunk*>(params.chunks) + blockIdx.x);
  const uint4* src = reinterpret_cast<const uint4*>(&smem.chunk);
  for (int i = threadIdx.x; i < int(sizeof(GdnChunk) / 16); i += Config::kNumThreads) dst[i] = src[i];
}

}  // namespace flashinfer
