// SPDX-License-Identifier: Apache-2.0
// Booleans, eight to a byte; those behind the end count as 0:
//
//   output[i] = sum_{j < 8} input[8 i + j] · 2^j           kBigEndian: 2^(7 − j)
//
//   input [num_elements] bytes, each 0 or 1      output [ceil(num_elements / 8)] bytes
//
// A thread turns 16 input bytes into 2 output bytes, kVectorsPerThread times, a block's width apart, so that loads are
// 16 bytes wide, coalesced, and several in flight.
#pragma once

#include "device/pdl.cuh"
#include "quantization/pack_byte.cuh"
#include "quantization/params.h"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void packbits(const PackbitsParams& params) {
  constexpr int kVectors = Config::kVectorsPerThread;
  const int64_t first = int64_t(blockIdx.x) * (Config::kNumThreads * kVectors) + threadIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t num_full = Config::kAligned ? params.num_elements / 16 : 0;

  ulonglong2 booleans[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector_idx = first + i * Config::kNumThreads;
    if (vector_idx < num_full) booleans[i] = reinterpret_cast<const ulonglong2*>(params.input)[vector_idx];
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector_idx = first + i * Config::kNumThreads;
    if (vector_idx < num_full) {
      reinterpret_cast<uchar2*>(params.output)[vector_idx] =
          uchar2{pack_byte<Config::kBigEndian>(booleans[i].x), pack_byte<Config::kBigEndian>(booleans[i].y)};
    } else {
      // The ragged end, and tensors that do not start on 16 bytes.
      for (int64_t byte_idx = 2 * vector_idx; byte_idx < 2 * vector_idx + 2; ++byte_idx) {
        if (byte_idx * 8 >= params.num_elements) break;
        uint64_t word = 0;
        for (int j = 0; j < 8 && byte_idx * 8 + j < params.num_elements; ++j) {
          word |= uint64_t(params.input[byte_idx * 8 + j]) << (8 * j);
        }
        params.output[byte_idx] = pack_byte<Config::kBigEndian>(word);
      }
    }
  }
}

}  // namespace flashinfer
