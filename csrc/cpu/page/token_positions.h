// Request and position of every row of a ragged batch on the CPU: the equations and shapes of page/token_positions.cuh.
// Request by request, after all rows have been marked as rows of none.
#pragma once

#include <algorithm>

#include "page/params.h"

namespace flashinfer::cpu {

template <class Config>
void token_positions(const TokenPositionsParams& params) {
  using Index = typename Config::Index;
  const Index* append_indptr = static_cast<const Index*>(params.append_indptr);
  const Index* seq_lens = static_cast<const Index*>(params.seq_lens);
  std::fill_n(params.batch_indices, params.num_tokens, -1);
  std::fill_n(params.positions, params.num_tokens, 0);
  for (int batch_idx = 0; batch_idx < params.batch_size; ++batch_idx) {
    const int64_t begin = std::max<int64_t>(append_indptr[batch_idx], 0), end = append_indptr[batch_idx + 1];
    for (int64_t i = begin; i < std::min<int64_t>(end, params.num_tokens); ++i) {
      params.batch_indices[i] = batch_idx;
      params.positions[i] = int32_t(uint64_t(seq_lens[batch_idx]) - uint64_t(end) + uint64_t(i));
    }
  }
}

}  // namespace flashinfer::cpu
