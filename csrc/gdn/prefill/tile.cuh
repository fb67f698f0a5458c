// SPDX-License-Identifier: Apache-2.0
// Prefill of the gated delta rule: geometry, what the two kernels hand over, fragments, and how rows come in.
#pragma once

#include "device/cp_async.cuh"
#include "device/fragment.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/swizzle.cuh"
#include "gdn/prefill/params.h"

namespace flashinfer {

constexpr int kGdnDim = 128, kGdnChunk = 64, kGdnBlocks = kGdnChunk / 16, kGdnDimBlocks = kGdnDim / 16;
constexpr float kGdnNormEps = 1e-6f;

using GdnRows = SwizzledRows<kGdnDim * 2>;      // of q and k
using GdnSquare = SwizzledRows<kGdnChunk * 2>;  // of a matrix of tokens by tokens

// What is known of a chunk before the state is: the same for all columns of the state. G is the sum of log2 alpha from
// the chunk's first token on, |k| the length of a key or 1.
struct alignas(128) GdnChunk {
  uint8_t inverse[kGdnChunk * kGdnChunk * 2];  // (I + A)⁻¹ diag(beta), transposed, 16 bits, as GdnSquare
  float log_decay[kGdnChunk];                  // G_i
  float key_scale[kGdnChunk];                  // 1 / |k_i|
  float recall_scale[kGdnChunk];               // 2^G_i / |k_i|
  float write_scale[kGdnChunk];                // 2^(G_last - G_i) / |k_i|
};

// What is known of a segment of a sequence, some chunks, that was looked at apart from those before it: with the state
// S_0 before the first token, S = S_0 transition + state, all of them as [V, K], after the last. Once that has been
// followed from segment to segment (scan.cuh), `state` is S_0 itself.
struct GdnSegment {
  float state[kGdnDim * kGdnDim], transition[kGdnDim * kGdnDim];
};

// A chunk or a segment: `size` tokens of a sequence, or its last ones. Sequence i has its pieces in a row of slots,
// never those of another sequence, whatever the lengths; one without tokens has an empty piece.
struct GdnPiece {
  int32_t seq_idx, num_before;  // pieces of the sequence
  GdnSequence tokens;
  bool is_last;

  __device__ __forceinline__ static int32_t first_slot(const GdnSequence& tokens, int32_t seq_idx, int32_t size) {
    return tokens.begin / size + seq_idx;
  }
  __device__ __forceinline__ static int32_t count(const GdnSequence& tokens, int32_t size) {
    return max(1, ceil_div(tokens.end - tokens.begin, size));
  }

  // Whether there is one in this slot.
  __device__ __forceinline__ bool find(const GdnPrefillParams& params, int32_t slot, int32_t size) {
    seq_idx = 0;  // the last sequence that begins at this slot or before
    if (params.cu_seqlens != nullptr) {
      int end = params.num_seqs;
      while (end - seq_idx > 1) {
        const int middle = (seq_idx + end) / 2;
        if (first_slot(GdnSequence::of(params, middle), middle, size) <= slot) {
          seq_idx = middle;
        } else {
          end = middle;
        }
      }
    }
    const GdnSequence sequence = GdnSequence::of(params, seq_idx);
    num_before = slot - first_slot(sequence, seq_idx, size);
    const int32_t num_pieces = count(sequence, size);
    if (num_before < 0 || num_before >= num_pieces) return false;
    is_last = num_before == num_pieces - 1;
    tokens.begin = sequence.begin + num_before * size;
    tokens.end = min(tokens.begin + size, sequence.end);
    return true;
  }
};

// Where a lane finds its part of 16x16 blocks of 16-bit elements in shared memory, for ldmatrix.
//
// as_a: an A fragment; or, transposed, 16 columns of B whose rows are the block's rows.
// as_b: 16 columns of B that are the block's rows.
template <class Rows>
struct GdnFragment {
  uint32_t lane_offset;

  __device__ __forceinline__ static GdnFragment as_a(int lane_idx) {
    return {uint32_t(Rows::offset(lane_idx % 16, lane_idx / 16))};
  }
  __device__ __forceinline__ static GdnFragment as_b(int lane_idx) {
    return {uint32_t(Rows::offset(lane_idx / 16 * 8 + lane_idx % 8, lane_idx / 8 % 2))};
  }
  __device__ __forceinline__ uint32_t address(uint32_t tile_smem, int row_block, int column_block) const {
    return Rows::advance(tile_smem + lane_offset, column_block * 2) + row_block * 16 * Rows::kNumBytes;
  }
};

// c += a b, of 16x16 blocks.
template <class T>
__device__ __forceinline__ void mma_block(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16<T>(c[0], a, b[0], b[1]);
  mma_m16n8k16<T>(c[1], a, b[2], b[3]);
}

// An accumulator as an A fragment. As columns of B, of its transpose, the two in the middle change places.
template <class T>
__device__ __forceinline__ void pack_block(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = pack_16bit<T>(c[0][0], c[0][1]), a[1] = pack_16bit<T>(c[0][2], c[0][3]);
  a[2] = pack_16bit<T>(c[1][0], c[1][1]), a[3] = pack_16bit<T>(c[1][2], c[1][3]);
}

template <class T>
__device__ __forceinline__ float2 unpack_16bit(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_16bit<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_16bit<fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Rows of one operand that a group of threads brings in, chunk after chunk; those past the sequence become zero.
// kThreadsPerRow threads share a row; each has the same granules of every row that it meets.
template <class T, class Rows, int kNumRows, int kNumThreads, int kThreadsPerRow>
struct GdnRowStream {
  static constexpr int kRowsAtOnce = kNumThreads / kThreadsPerRow;
  static constexpr int kRounds = kNumRows / kRowsAtOnce, kGranulesPerThread = Rows::kNumGranules / kThreadsPerRow;
  static_assert(kNumRows % kRowsAtOnce == 0 && Rows::permutation(kRowsAtOnce) == 0, "one permutation a thread");

  const T* next;  // of the chunk to come
  int64_t token_stride;
  int num_left;  // rows, from the thread's first on
  uint32_t offset_smem;

  __device__ __forceinline__ GdnRowStream(const void* base, const GdnRowStrides& strides, int head, int first_element,
                                          const GdnSequence& tokens, int first_row, int thread_idx)
      : token_stride(strides.token) {
    const int row = thread_idx / kThreadsPerRow, granule = thread_idx % kThreadsPerRow;
    next = static_cast<const T*>(base) + (int64_t(tokens.begin) + first_row + row) * token_stride +
           head * strides.head + first_element + granule * 8;
    num_left = tokens.end - tokens.begin - first_row - row;
    offset_smem = Rows::offset(row, granule);
  }

  __device__ __forceinline__ void load_async(uint32_t dst_smem) {
    const T* src = next;
    const uint32_t dst = dst_smem + offset_smem;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const bool valid = i * kRowsAtOnce < num_left;
#pragma unroll
      for (int j = 0; j < kGranulesPerThread; ++j) {
        const int granule = j * kThreadsPerRow;
        cp_async_16(Rows::advance(dst, granule) + i * kRowsAtOnce * Rows::kNumBytes, src + granule * 8, valid);
      }
      src += kRowsAtOnce * token_stride;
    }
    next += kGdnChunk * token_stride;
    num_left -= kGdnChunk;
  }
};

}  // namespace flashinfer
