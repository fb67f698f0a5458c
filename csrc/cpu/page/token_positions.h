// SPDX-License-Identifier: Apache-2.0
// Request and position of every row of a ragged batch on the CPU: the equations and shapes of page/token_positions.cuh.
// Request by request, after all rows have been marked as rows of none.
#pragma once

#include "page/params.h"

namespace flashinfer::cpu {

template <class Config>
void token_positions(const TokenPositionsParams& params) {
  using Index = typename Config::Index;
  const Index* append_indptr = static_cast<const Index*>(params.append_indptr);
  const Index* seq_lens = static_cast<const Index*>(params.seq_lens);
  for (int64_t i = 0; i < params.num_tokens; ++i) {
    params.batch_indices[i] = -1;
    params.positions[i] = 0;
  }
  for (int batch_idx = 0; batch_idx < params.batch_size; ++batch_idx) {
    const int64_t begin = append_indptr[batch_idx], end = append_indptr[batch_idx + 1];
    for (int64_t i = begin > 0 ? begin : 0; i < end && i < params.num_tokens; ++i) {
      params.batch_indices[i] = batch_idx;
      params.positions[i] = int32_t(uint64_t(seq_lens[batch_idx]) - uint64_t(end) + uint64_t(i));
    }
  }
}

}  // namespace flashinfer::cpu
