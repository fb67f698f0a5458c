// Request and position of every row of a ragged batch (CPU).
#pragma once

#include <algorithm>

#include "page/params.h"

namespace flashinfer::cpu {

template <class Config>
void token_positions(const TokenPositionsParams& params) {
  using Index = typename Config::Index;
  const Index* append_indptr = static_cast<const Index*>(params.append_indptr);
  const Index* seq_lens = static_cast<const Index*>(params.seq_lens);
  const int64_t num_rows = std::min<int64_t>(params.num_tokens, append_indptr[params.batch_size]);

  for (int batch_idx = 0; batch_idx < params.batch_size; ++batch_idx) {
    const int64_t end = append_indptr[batch_idx + 1];
    for (int64_t i = append_indptr[batch_idx]; i < std::min(end, num_rows); ++i) {
      params.batch_indices[i] = batch_idx;
      params.positions[i] = int32_t(seq_lens[batch_idx] - end + i);
    }
  }
  std::fill(params.batch_indices + num_rows, params.batch_indices + params.num_tokens, -1);
  std::fill(params.positions + num_rows, params.positions + params.num_tokens, 0);
}

}  // namespace flashinfer::cpu
