// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernel of products is given besides GroupGemmParams: where TMA finds the operands.
#pragma once

#include "device/sm90/tensor_map.h"
#include "gemm/params.h"

namespace flashinfer {

// Tensors of three axes of 16-bit elements, those of 8 bits in pairs and those of 32 in halves, the innermost first: a
// as depth, row, 1; b as depth, column, weight, or column, depth, weight, in boxes of rows of 128 bytes; the output as
// column, row, 1, in boxes of 16 such rows; scales of a as row, block of the depth, 1, in boxes of up to 128 rows.
struct Sm90GemmMaps {
  TensorMap a_map, b_map, output_map, a_scale_map;
};

struct Sm90GroupGemmParams : Sm90GemmMaps, GroupGemmParams {
  int32_t a_box_rows;       // that one copy brings: a block's part of a tile's, or all there are in multiples of 8
  int32_t has_a_scale_map;  // whether rows of a_scale lie as TMA takes them
  uint8_t padding[24];
};

}  // namespace flashinfer
