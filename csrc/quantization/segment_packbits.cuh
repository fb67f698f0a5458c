// SPDX-License-Identifier: Apache-2.0
// The booleans of every segment s, packed from a byte of its own; those behind its end count as 0:
//
//   output[packed_indptr[s] + i] = sum_{j < 8} input[indptr[s] + 8 i + j] · 2^j           kBigEndian: 2^(7 − j)
//
//   input [num_elements] bytes, each 0 or 1      both offsets [num_segments + 1] Index      output [num_bytes] bytes
//
// A thread makes four neighbouring output bytes, which mostly lie in one segment: one binary search, five aligned words
// of eight booleans shifted to where the segment starts, one store. At the ends of segments it goes byte by byte.
#pragma once

#include "device/pdl.cuh"
#include "device/search.cuh"
#include "quantization/pack_byte.cuh"
#include "quantization/params.h"

namespace flashinfer {

// Where in the input the byte at byte_idx of a segment begins. No segment begins outside the input, whatever the
// offsets say.
template <class Index>
__device__ __forceinline__ int64_t first_element(const SegmentPackbitsParams& params, int segment_idx,
                                                 int64_t byte_idx) {
  const int64_t begin = static_cast<const Index*>(params.indptr)[segment_idx];
  const int64_t packed_begin = static_cast<const Index*>(params.packed_indptr)[segment_idx];
  return min(max(begin, int64_t(0)), params.num_elements) + (byte_idx - packed_begin) * 8;
}

// The byte at byte_idx, whatever segment it is in; reads nothing outside the segment. Zero past the last segment.
template <class Config>
__device__ __forceinline__ uint8_t pack_one_byte(const SegmentPackbitsParams& params, int64_t byte_idx) {
  using Index = typename Config::Index;
  const Index* indptr = static_cast<const Index*>(params.indptr);
  const Index* packed_indptr = static_cast<const Index*>(params.packed_indptr);
  const int segment_idx = find_segment(packed_indptr, params.num_segments, byte_idx);
  if (segment_idx == params.num_segments) return 0;
  const int64_t begin = first_element<Index>(params, segment_idx, byte_idx);
  const int64_t end = min(int64_t(indptr[segment_idx + 1]), params.num_elements);
  uint64_t booleans = 0;
  for (int i = 0; i < 8 && begin + i < end; ++i) booleans |= uint64_t(params.input[begin + i]) << (8 * i);
  return pack_byte<Config::kBigEndian>(booleans);
}

template <class Config>
__device__ __forceinline__ void segment_packbits(const SegmentPackbitsParams& params) {
  using Index = typename Config::Index;
  constexpr int kBytesPerThread = Config::kBytesPerThread;
  static_assert(kBytesPerThread == 4, "one 32-bit store");
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t byte_idx = (int64_t(blockIdx.x) * Config::kNumThreads + threadIdx.x) * kBytesPerThread;
  if (byte_idx >= params.num_bytes) return;
  const Index* indptr = static_cast<const Index*>(params.indptr);
  const Index* packed_indptr = static_cast<const Index*>(params.packed_indptr);
  const int segment_idx = find_segment(packed_indptr, params.num_segments, byte_idx);

  if (Config::kAligned && segment_idx < params.num_segments) {
    const int64_t begin = first_element<Index>(params, segment_idx, byte_idx);
    const int64_t aligned_begin = begin / 8 * 8;
    const bool is_whole = begin + 8 * kBytesPerThread <= int64_t(indptr[segment_idx + 1]);
    const bool is_inside = aligned_begin + 8 * (kBytesPerThread + 1) <= params.num_elements &&
                           byte_idx + kBytesPerThread <= params.num_bytes;  // it is, where offsets end inside the input
    if (is_whole && is_inside) {
      const uint64_t* words_gmem = reinterpret_cast<const uint64_t*>(params.input + aligned_begin);
      const int shift = 8 * int(begin - aligned_begin);
      uint64_t words[kBytesPerThread + 1];
#pragma unroll
      for (int i = 0; i <= kBytesPerThread; ++i) words[i] = words_gmem[i];
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kBytesPerThread; ++i) {
        // In two steps: a shift by 64 is undefined.
        const uint64_t booleans = (words[i] >> shift) | (words[i + 1] << 1 << (63 - shift));
        packed |= uint32_t(pack_byte<Config::kBigEndian>(booleans)) << (8 * i);
      }
      *reinterpret_cast<uint32_t*>(params.output + byte_idx) = packed;
      return;
    }
  }
  for (int i = 0; i < kBytesPerThread && byte_idx + i < params.num_bytes; ++i) {
    params.output[byte_idx + i] = pack_one_byte<Config>(params, byte_idx + i);
  }
}

}  // namespace flashinfer
