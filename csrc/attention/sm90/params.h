// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernel of prefill is given besides PrefillParams: where TMA finds K and V.
#pragma once

#include "attention/prefill/params.h"
#include "device/sm90/tensor_map.h"

namespace flashinfer {

// K and V as tensors of five axes, the innermost first: element of the row, row of a box, head, page, shift. The shift
// moves on by rows as well, and the tensor starts box_rows before the first row. A box at row box_rows - n, shift s + n
// is thus rows s to s + box_rows of the page, of which TMA reads the first n and fills the others with zeros: what lies
// beyond the end of a request, or in the unused part of a page, may be anything, and a probability of zero times NaN is
// NaN. Single and ragged KV are one page.
struct Sm90PrefillMaps {
  TensorMap k_map, v_map;
};

struct Sm90PrefillParams : Sm90PrefillMaps, PrefillParams {
  int32_t box_rows;  // rows that one copy brings: kBlockN without pages, else a divisor of it and of the page size
  uint8_t reserved[4];
};

}  // namespace flashinfer
