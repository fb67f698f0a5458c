// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// Eight booleans to a byte, the last byte of a row filled up with zeros.
struct PackbitsParams {
  const uint8_t* input;  // [num_elements]; each 0 or 1
  uint8_t* output;       // [ceil(num_elements / 8)]
  int64_t num_elements;
};

// Bytes that each segment takes when it starts on a byte of its own.
struct PackedIndptrParams {
  const void* indptr;   // [num_segments + 1] Index; elements
  void* packed_indptr;  // [num_segments + 1] Index; bytes
  int32_t num_segments;
};

// packbits of every segment, each from a byte of its own.
struct SegmentPackbitsParams {
  const uint8_t* input;       // [num_elements]; each 0 or 1
  uint8_t* output;            // [num_bytes]; zeros past the last segment
  const void* indptr;         // [num_segments + 1] Index; elements
  const void* packed_indptr;  // [num_segments + 1] Index; bytes
  int64_t num_elements, num_bytes;
  int32_t num_segments;
};

}  // namespace flashinfer
