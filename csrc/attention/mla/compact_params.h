// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/prefill/params.h"

namespace flashinfer {

// A list of rows for each query, some of which are none, becomes one without gaps: a request for each query.
struct CompactIndicesParams {
  const int32_t* indices;  // [num_lists, max_len] rows; what is no row of the cache is left out
  int32_t* qo_indptr;      // [num_lists + 1] 0, 1, 2, ...
  int32_t* kv_indptr;      // [num_lists + 1] 0, max_len, 2 * max_len, ...
  int32_t* compacted;      // [num_lists, max_len] the others, in order; what follows them is left as it is
  int32_t* lengths;        // [num_lists] how many
  // On a GPU: the schedule of attention over them (prefill/params.h), in place of a planner's, which would wait for
  // this kernel. Of each list all query tiles, in num_splits runs each, as if lists were full: most are.
  PrefillItem* items;  // [num_splits, num_lists, query tiles of a list]
  PrefillSchedule* schedule;
  uint32_t* counters;   // [num_lists, query tiles of a list]
  int64_t list_stride;  // entries between lists of indices
  int32_t num_lists, max_len;
  int32_t num_rows;          // of the cache
  int32_t num_heads;         // query rows of a list
  int32_t block_m, block_n;  // rows of a query tile and of a KV tile
  int32_t num_splits;
};

}  // namespace flashinfer
