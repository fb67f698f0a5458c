// SPDX-License-Identifier: Apache-2.0
// Lists of rows without their gaps, on the CPU: the equation of attention/mla/compact_indices.cuh. A list a thread.
#pragma once

#include "attention/mla/compact_params.h"

namespace flashinfer::cpu {

template <class Config>
void compact_indices(const CompactIndicesParams& params) {
  params.qo_indptr[0] = params.kv_indptr[0] = 0;
#pragma omp parallel for
  for (int32_t list_idx = 0; list_idx < params.num_lists; ++list_idx) {
    const int32_t* list = params.indices + list_idx * params.list_stride;
    int32_t* compacted = params.compacted + int64_t(list_idx) * params.max_len;
    int32_t num_kept = 0;
    for (int32_t i = 0; i < params.max_len; ++i) {
      if (list[i] >= 0 && list[i] < params.num_rows) compacted[num_kept++] = list[i];
    }
    params.lengths[list_idx] = num_kept;
    params.qo_indptr[list_idx + 1] = list_idx + 1;
    params.kv_indptr[list_idx + 1] = (list_idx + 1) * params.max_len;
  }
}

}  // namespace flashinfer::cpu
