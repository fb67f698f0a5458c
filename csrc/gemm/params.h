// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// Elements that have a scale in common, along the depth of the product and along the rows of a weight.
constexpr int kScaleBlock = 128;

// Products of segments of rows with matrices of weights, those of every segment with one matrix:
//
//   output[r, :] = sum_k a[r, k] b[w(g), :, k]        indptr[g] <= r < indptr[g + 1], w(g) = weight_indices[g], or g
//
// Of 8-bit operands each block of kScaleBlock elements of the depth is multiplied by scales before it is added:
//
//   output[r, n] = sum_j a_scale[r, j] b_scale[w(g), n / 128 or n, j] sum_(k in block j) a[r, k] b[w(g), n, k]
//
// Strides are in elements; an axis without one is dense.
struct GroupGemmParams {
  const void* a;               // [num_rows, depth]
  const void* b;               // [num_weights, num_columns, depth], or [num_weights, depth, num_columns]
  const float* a_scale;        // [num_rows, ceil(depth / 128)], or null
  const float* b_scale;        // [num_weights, ceil(num_columns / 128) or num_columns, ceil(depth / 128)], or null
  const void* indptr;          // [num_groups + 1], or null: one group of all rows
  const void* weight_indices;  // [num_groups], or null: group i has weight i
  void* output;                // [num_rows, num_columns]
  int64_t a_row_stride, b_weight_stride, b_row_stride, output_row_stride;
  int64_t a_scale_row_stride, a_scale_block_stride;
  int64_t b_scale_weight_stride, b_scale_row_stride, b_scale_block_stride;
  int32_t num_rows, num_columns, depth;
  int32_t num_groups, num_weights;
  int32_t has_long_indptr, has_long_indices;  // whether these are int64
  int32_t reserved;
};

// Rows of a group and its weight. Rows are confined to those that there are, and a group whose weight does not exist
// has none.
struct GemmGroup {
  int32_t begin, end, weight;

  FLASHINFER_HOST_DEVICE static GemmGroup of(const GroupGemmParams& params, int32_t group_idx) {
    if (params.indptr == nullptr) return {0, params.num_rows, 0};
    const auto index_at = [](const void* indices, int32_t i, bool is_long) {
      return is_long ? static_cast<const int64_t*>(indices)[i] : int64_t(static_cast<const int32_t*>(indices)[i]);
    };
    const auto offset = [&](int32_t i) {
      const int64_t row = index_at(params.indptr, i, params.has_long_indptr);
      return int32_t(row < 0 ? 0 : row > params.num_rows ? params.num_rows : row);
    };
    const int64_t weight = params.weight_indices == nullptr
                               ? group_idx
                               : index_at(params.weight_indices, group_idx, params.has_long_indices);
    const int32_t begin = offset(group_idx), end = offset(group_idx + 1);
    const bool exists = begin < end && weight >= 0 && weight < params.num_weights;
    return {begin, exists ? end : begin, exists ? int32_t(weight) : 0};
  }
};

// Of elements up to `largest` in size, where they become e4m3: its largest number is 448. Not so small that a quotient
// would overflow; of zeros it is anything.
FLASHINFER_HOST_DEVICE inline float scale_of_block(float largest) {
  return (largest > 1e-30f ? largest : 1e-30f) / 448.f;
}

// Rows of 16 or 32 bits to 8, with a scale for each 128 elements: x is about scale · output.
struct QuantizeGroupsParams {
  const void* input;  // [num_rows, num_columns], of a multiple of 128
  void* output;       // [num_rows, num_columns]
  float* scale;       // [num_columns / 128, num_rows]
  int64_t input_row_stride;
  int32_t num_rows, num_columns;
};

}  // namespace flashinfer
