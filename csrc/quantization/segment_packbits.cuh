// Pack the booleans of every segment from a byte of its own. One thread an output byte: its segment comes from a binary
// search, its eight booleans from two aligned words, shifted together, since segments start anywhere.
#pragma once

#include "device/pdl.cuh"
#include "device/search.cuh"
#include "quantization/pack_byte.cuh"
#include "quantization/params.h"

namespace flashinfer {

// Booleans [begin, begin + 8) as one word; those from `end` on are zero. Reads nothing outside [0, num_elements).
template <bool kAligned>
__device__ __forceinline__ uint64_t load_booleans(const uint8_t* input, int64_t begin, int64_t end,
                                                  int64_t num_elements) {
  const int64_t aligned_begin = begin / 8 * 8;
  const int num_valid = end - begin < 8 ? int(end - begin) : 8;
  uint64_t word = 0;
  if (kAligned && aligned_begin + 16 <= num_elements) {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(input + aligned_begin);
    const int shift = 8 * int(begin - aligned_begin);
    word = shift == 0 ? words[0] : (words[0] >> shift) | (words[1] << (64 - shift));
    return num_valid == 8 ? word : word & ((uint64_t(1) << (8 * num_valid)) - 1);
  }
  for (int i = 0; i < num_valid; ++i) word |= uint64_t(input[begin + i]) << (8 * i);
  return word;
}

template <class Config>
__device__ __forceinline__ void segment_packbits(const SegmentPackbitsParams& params) {
  using Index = typename Config::Index;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t byte_idx = int64_t(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  if (byte_idx >= params.num_bytes) return;
  const Index* indptr = static_cast<const Index*>(params.indptr);
  const Index* packed_indptr = static_cast<const Index*>(params.packed_indptr);
  const int segment_idx = find_segment(packed_indptr, params.num_segments, byte_idx);
  uint8_t packed = 0;
  if (segment_idx < params.num_segments) {
    const int64_t begin = int64_t(indptr[segment_idx]) + (byte_idx - packed_indptr[segment_idx]) * 8;
    packed = pack_byte<Config::kBigEndian>(
        load_booleans<Config::kAligned>(params.input, begin, indptr[segment_idx + 1], params.num_elements));
  }
  params.output[byte_idx] = packed;
}

}  // namespace flashinfer
