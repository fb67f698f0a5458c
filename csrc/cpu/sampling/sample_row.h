// SPDX-License-Identifier: Apache-2.0
// Draws one token from each row on the CPU: the rules and shapes of sampling/sample_row.cuh. A row a thread, which
// finds the threshold by quickselect and the token by inverse CDF; sums are taken in double.
#pragma once

#include "cpu/sampling/row.h"

namespace flashinfer::cpu {

template <class Config>
bool sample_row(const SampleParams& params) {
  using T = typename Config::T;
  const int vocab_size = params.vocab_size;
  bool fits = true;
#pragma omp parallel reduction(&& : fits)
  {
    RowBuffer row(vocab_size);
    fits = row.scores != nullptr;
#pragma omp for
    for (int row_idx = 0; row_idx < params.num_rows; ++row_idx) {
      if (!fits) continue;
      const int64_t input_row =
          params.row_indices ? load_index(params.row_indices, params.row_indices_are_int64, row_idx) : row_idx;
      const T* input = static_cast<const T*>(params.input) + input_row * params.input_stride;
      const RowTotals totals = load_row<Config::kInput>(input, vocab_size, 1.f, row);
      int token_id = -1;
      if (totals.is_valid()) {
        const float threshold = filter_threshold<Config>(params, row_idx, params.top_k_first, totals, 1.f, row);
        token_id = draw(vocab_size, random_words(params, row_idx, 0).uniform(0),
                        [&](int i) { return row.scores[i] >= threshold ? row.weights[i] : 0.f; });
      }
      params.token_ids[row_idx] = token_id < 0 ? 0 : token_id;
      if (params.valid) params.valid[row_idx] = token_id >= 0;
    }
  }
  return fits;
}

}  // namespace flashinfer::cpu
