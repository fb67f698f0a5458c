// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernel of products is given besides GroupGemmParams: where TMA finds the operands.
#pragma once

#include "device/sm90/tensor_map.h"
#include "gemm/params.h"

namespace flashinfer {

// Tensors of three axes of 16-bit elements, those of 8 bits in pairs, the innermost first: a as depth, row, 1; b as
// depth, column, weight, or column, depth, weight. A box is 128 bytes of rows.
struct Sm90GemmMaps {
  TensorMap a_map, b_map;
};

struct Sm90GroupGemmParams : Sm90GemmMaps, GroupGemmParams {
  int32_t a_box_rows;  // that one copy brings: a block's part of a tile's, or all there are in multiples of 8
  uint8_t padding[28];
};

}  // namespace flashinfer
