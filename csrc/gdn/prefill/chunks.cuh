// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule, its first kernel: the triangular systems that stand between the tokens of a chunk,
// of all chunks at once.
//
//   A[i, j] = beta_i 2^(G_i - G_j) k_i·k_j  for j < i, else 0        inverse = (I + A)⁻¹ diag(beta)
//
//   k [num_tokens, heads of k, 128], gate and beta [num_tokens, num_heads]
//   -> chunks [chunk slots, num_heads] of GdnChunk (gdn/prefill/tile.cuh)
//
// A warp has a chunk of a head to itself, so that nothing waits but for its own loads, and blocks of 16x16 tokens go
// from one product into the next in registers. Those on the diagonal are inverted by substitution, a column a lane, in
// fp32; those below follow from X[b, a] = -X[b, b] (A[b, a] X[a, a] + ... + A[b, b-1] X[b-1, a]) in fp16: that has more
// bits than bf16, and neither A nor its inverse leaves its range unless the recurrence itself diverges.
#pragma once

#include "device/fast_math.cuh"
#include "device/pdl.cuh"
#include "gdn/prefill/tile.cuh"

namespace flashinfer {

constexpr float kGdnLogZero = -128.f;  // log2 of what counts as zero: the power of 2 of it is

struct GdnChunkSmem {
  using InverseRows = SwizzledRows<16 * 2>;
  struct Solved {
    GdnChunk chunk;
    alignas(128) uint8_t inverses[kGdnChunk * InverseRows::kNumBytes];  // of the diagonal blocks: fp16, transposed
    alignas(16) float diagonal[16][kGdnChunk + 4];  // these blocks of A, transposed; rows in different banks
    float beta[kGdnChunk];
  };
  union {
    alignas(128) uint8_t k[kGdnChunk * kGdnDim * 2];
    Solved solved;  // when K Kᵀ is in registers
  };
};

template <class Config>
struct GdnChunkSolver {
  using T = typename Config::T;
  using Keys = GdnRowStream<T, GdnRows, kGdnChunk, 32, 4>;
  using InverseRows = GdnChunkSmem::InverseRows;

  const GdnPrefillParams& params;
  GdnChunkSmem& smem;
  const int head, lane_idx;

  // Of the tokens of one chunk; the result is smem.solved.chunk.
  __device__ void run(const GdnSequence& tokens) {
    Keys(params.k, params.k_strides, head / params.heads_per_k, 0, tokens, 0, lane_idx)
        .load_async(smem_address(smem.k));
    const Gates gates = load_gates(tokens);
    cp_async_wait_all();
    __syncwarp();
    float products[kNumPairs][2][4] = {};
    multiply_keys(products);
    __syncwarp();  // keys are done with
    publish(gates, products);
    __syncwarp();
    uint32_t system[kNumPairs - kGdnBlocks][4];
    decay(system, products);
    finish_scalars(gates);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kGdnBlocks; i += 2) invert_diagonal(i + lane_idx / 16);
    __syncwarp();
    invert_below(system);
    __syncwarp();
  }

 private:
  static constexpr int kNumPairs = kGdnBlocks * (kGdnBlocks + 1) / 2;

  // Of blocks on the diagonal and below, and of those below alone.
  __device__ __forceinline__ static constexpr int pair_of(int row, int column) { return row * (row + 1) / 2 + column; }
  __device__ __forceinline__ static constexpr int below(int row, int column) { return row * (row - 1) / 2 + column; }

  // Of tokens 2 lane_idx and the next: beta, and running sums of log2 alpha.
  struct Gates {
    float2 beta, log_decay;
  };
  __device__ __forceinline__ Gates load_gates(const GdnSequence& tokens) const {
    float log[2], beta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = int64_t(tokens.begin) + 2 * lane_idx + i;
      const bool valid = token < tokens.end;
      float gate = Config::kLogGate ? 0.f : 1.f;
      beta[i] = valid ? 1.f : 0.f;
      if (valid && params.gate != nullptr) {
        gate = params.gate[token * params.gate_strides.token + head * params.gate_strides.head];
      }
      if (valid && params.beta != nullptr) {
        beta[i] = params.beta[token * params.beta_strides.token + head * params.beta_strides.head];
      }
      log[i] = Config::kLogGate ? gate * 1.44269504f : log2f(gate);
      log[i] = log[i] < kGdnLogZero ? kGdnLogZero : log[i];  // of -inf the differences would be NaN
    }
    float sum = log[0] + log[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane_idx >= offset) sum += before;
    }
    return {{beta[0], beta[1]}, {sum - log[1], sum}};
  }

  // As columns of B, a block of keys is what it is as A, two registers in each other's place.
  __device__ __forceinline__ void multiply_keys(float (&products)[kNumPairs][2][4]) const {
    const uint32_t k_smem = smem_address(smem.k);
    const auto fragment = GdnFragment<GdnRows>::as_a(lane_idx);
#pragma unroll 2
    for (int i = 0; i < kGdnDimBlocks; ++i) {
      uint32_t k[kGdnBlocks][4];
#pragma unroll
      for (int block = 0; block < kGdnBlocks; ++block) ldmatrix_x4(k[block], fragment.address(k_smem, block, i));
#pragma unroll
      for (int row = 0; row < kGdnBlocks; ++row) {
#pragma unroll
        for (int column = 0; column <= row; ++column) {
          const uint32_t columns[4] = {k[column][0], k[column][2], k[column][1], k[column][3]};
          mma_block<T>(products[pair_of(row, column)], k[row], columns);
        }
      }
    }
  }

  // Squares of the keys' lengths are on the diagonal of K Kᵀ.
  __device__ __forceinline__ void publish(const Gates& gates, const float (&products)[kNumPairs][2][4]) {
    reinterpret_cast<float2*>(smem.solved.beta)[lane_idx] = gates.beta;
    reinterpret_cast<float2*>(smem.solved.chunk.log_decay)[lane_idx] = gates.log_decay;
    float* key_scale = smem.solved.chunk.key_scale;
    if constexpr (Config::kNormalize) {
      const int row = lane_row(lane_idx);
      if (lane_idx % 4 != row / 2) return;
#pragma unroll
      for (int block = 0; block < kGdnBlocks; ++block) {
        const float (&squares)[2][4] = products[pair_of(block, block)];
        key_scale[block * 16 + row] = rsqrtf((row & 1 ? squares[0][1] : squares[0][0]) + kGdnNormEps);
        key_scale[block * 16 + row + 8] = rsqrtf((row & 1 ? squares[1][3] : squares[1][2]) + kGdnNormEps);
      }
    } else {
      reinterpret_cast<float2*>(key_scale)[lane_idx] = {1.f, 1.f};
    }
  }

  // From K Kᵀ to A: blocks below the diagonal as columns of B, those on it through shared memory.
  __device__ __forceinline__ void decay(uint32_t (&system)[kNumPairs - kGdnBlocks][4],
                                        const float (&products)[kNumPairs][2][4]) {
    const GdnChunk& chunk = smem.solved.chunk;
#pragma unroll
    for (int row_block = 0; row_block < kGdnBlocks; ++row_block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_block * 16 + lane_row(lane_idx) + row_of(half);
        const float row_log = chunk.log_decay[row];
        const float row_scale = smem.solved.beta[row] * (Config::kNormalize ? chunk.key_scale[row] : 1.f);
#pragma unroll
        for (int tile = 0; tile < 2 * (row_block + 1); ++tile) {
          const int column = tile * 8 + lane_column(lane_idx);
          const float2 column_log = reinterpret_cast<const float2&>(chunk.log_decay[column]);
          float2 scale = {row_scale * fast_exp2(row_log - column_log.x), row_scale * fast_exp2(row_log - column_log.y)};
          if constexpr (Config::kNormalize) {
            const float2 key_scale = reinterpret_cast<const float2&>(chunk.key_scale[column]);
            scale.x *= key_scale.x, scale.y *= key_scale.y;
          }
          const float* product = products[pair_of(row_block, tile / 2)][tile % 2] + 2 * half;
          const float2 a = {product[0] * scale.x, product[1] * scale.y};
          if (tile / 2 == row_block) {  // substitution reads what lies below the diagonal alone
            smem.solved.diagonal[column % 16][row] = a.x;
            smem.solved.diagonal[column % 16 + 1][row] = a.y;
          } else {
            system[below(row_block, tile / 2)][2 * half + tile % 2] = pack_16bit<fp16>(a.x, a.y);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void finish_scalars(const Gates& gates) {
    GdnChunk& chunk = smem.solved.chunk;
    const float2 log_decay = gates.log_decay, key_scale = reinterpret_cast<const float2*>(chunk.key_scale)[lane_idx];
    const float last = __shfl_sync(0xffffffffu, log_decay.y, 31);
    reinterpret_cast<float2*>(chunk.recall_scale)[lane_idx] = {fast_exp2(log_decay.x) * key_scale.x,
                                                               fast_exp2(log_decay.y) * key_scale.y};
    reinterpret_cast<float2*>(chunk.write_scale)[lane_idx] = {fast_exp2(last - log_decay.x) * key_scale.x,
                                                              fast_exp2(last - log_decay.y) * key_scale.y};
  }

  // A column of a block's inverse a lane. Inverses are stored transposed, here and below: as a row, which begins with
  // the zeros above the diagonal.
  __device__ __forceinline__ void invert_diagonal(int block) {
    const int first = block * 16, column = lane_idx % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < 15; ++j) {
      float a[16];  // a column of A
#pragma unroll
      for (int i = (j + 1) / 4 * 4; i < 16; i += 4) {
        const float4 part = reinterpret_cast<const float4&>(smem.solved.diagonal[j][first + i]);
        a[i] = part.x, a[i + 1] = part.y, a[i + 2] = part.z, a[i + 3] = part.w;
      }
#pragma unroll
      for (int i = j + 1; i < 16; ++i) x[i] -= a[i] * x[j];
    }
    const int row = first + column;
    const float beta = smem.solved.beta[row];
    const auto store = [](uint8_t* dst, const uint32_t* pairs) {
      *reinterpret_cast<uint4*>(dst) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    };
    uint32_t plain[8], scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      plain[i] = pack_16bit<fp16>(x[2 * i], x[2 * i + 1]);
      scaled[i] = pack_16bit<T>(x[2 * i] * beta, x[2 * i + 1] * beta);
    }
    uint8_t* inverse = smem.solved.chunk.inverse;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store(smem.solved.inverses + InverseRows::offset(row, i), plain + 4 * i);
      store(inverse + GdnSquare::offset(row, first / 8 + i), scaled + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < 2 * (kGdnBlocks - 1); ++i) {
      if (i < first / 8) *reinterpret_cast<uint4*>(inverse + GdnSquare::offset(row, i)) = uint4{};
    }
  }

  // The blocks are held transposed: an accumulator is then the next product's A fragment.
  __device__ __forceinline__ void invert_below(const uint32_t (&system)[kNumPairs - kGdnBlocks][4]) {
    constexpr int kColumns = kGdnBlocks - 1;
    const uint32_t inverses_smem = smem_address(smem.solved.inverses);
    const auto fragment = GdnFragment<InverseRows>::as_a(lane_idx);
    uint32_t inverse[kColumns][kColumns][4];  // a column of blocks each, from the diagonal down
    uint32_t diagonal[kColumns][4];           // from the second on, as columns of B
    float2 beta[kColumns];
    const int row = lane_row(lane_idx), column = lane_column(lane_idx);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      ldmatrix_x4(inverse[i][0], fragment.address(inverses_smem, i, 0));
      ldmatrix_x4_trans(diagonal[i], fragment.address(inverses_smem, i + 1, 0));
      beta[i] = {smem.solved.beta[i * 16 + row], smem.solved.beta[i * 16 + row + 8]};
    }
#pragma unroll
    for (int step = 1; step < kGdnBlocks; ++step) {
#pragma unroll
      for (int column_block = 0; column_block + step < kGdnBlocks; ++column_block) {
        const int row_block = column_block + step;
        float sum[2][4] = {}, x[2][4] = {};
#pragma unroll
        for (int i = 0; i < step; ++i) {
          mma_block<fp16>(sum, inverse[column_block][i], system[below(row_block, column_block + i)]);
        }
        uint32_t a[4];
        pack_block<fp16>(a, sum);
        mma_block<fp16>(x, a, diagonal[row_block - 1]);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[tile][i] = -x[tile][i];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float scale = half == 0 ? beta[column_block].x : beta[column_block].y;
            store_pair(column_block * 16 + row_of(half) + row, row_block * 16 + 8 * tile + column,
                       pack_16bit<T>(x[tile][2 * half] * scale, x[tile][2 * half + 1] * scale));
          }
        }
        if (step + 1 < kGdnBlocks) pack_block<fp16>(inverse[column_block][step], x);
      }
    }
  }

  __device__ __forceinline__ void store_pair(int row, int column, uint32_t pair) {
    uint8_t* granule = smem.solved.chunk.inverse + GdnSquare::offset(row, column / 8);
    *reinterpret_cast<uint32_t*>(granule + column % 8 * 2) = pair;
  }
};

// Config: T, kLogGate, kNormalize. Grid: chunk slots times heads; a warp.
template <class Config>
__device__ void gdn_prefill_chunks(const GdnPrefillParams& params) {
  static_assert(Config::kNumThreads == 32);
  __shared__ GdnChunkSmem smem;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int slot = int(blockIdx.x) / params.num_heads, head = int(blockIdx.x) % params.num_heads;
  GdnPiece piece;
  if (!piece.find(params, slot, kGdnChunk) || piece.tokens.begin == piece.tokens.end) return;
  GdnChunkSolver<Config>{params, smem, head, int(threadIdx.x)}.run(piece.tokens);
  uint4* dst = reinterpret_cast<uint4*>(static_cast<GdnChunk*>(params.chunks) + blockIdx.x);
  const uint4* src = reinterpret_cast<const uint4*>(&smem.solved.chunk);
  static_assert(sizeof(GdnChunk) / 16 % 32 == 0);
#pragma unroll
  for (int i = 0; i < int(sizeof(GdnChunk) / 16); i += 32) dst[i + threadIdx.x] = src[i + threadIdx.x];
}

}  // namespace flashinfer
