// SPDX-License-Identifier: Apache-2.0
// Softmax, renormalized top-k and top-p, and masked logits on the CPU: the equations and shapes of
// sampling/normalize_row.cuh. A row a thread; sums are taken in double.
#pragma once

#include "cpu/sampling/row.h"

namespace flashinfer::cpu {

template <class Config>
bool normalize_row(const NormalizeParams& params) {
  using T = typename Config::T;
  using TOut = typename Config::TOut;
  const int vocab_size = params.vocab_size;
  bool fits = true;
#pragma omp parallel reduction(&& : fits)
  {
    RowBuffer row(vocab_size);
    fits = row.scores != nullptr;
#pragma omp for
    for (int row_idx = 0; row_idx < params.num_rows; ++row_idx) {
      if (!fits) continue;
      // What is not positive makes the row NaN; the smallest numbers leave the largest element alone.
      float temperature = params.temperature ? params.temperature[row_idx] : params.temperature_value;
      temperature = temperature > 0.f ? __builtin_fmaxf(temperature, 0x1p-126f) : kNaN;
      const T* input = static_cast<const T*>(params.input) + row_idx * params.input_stride;
      const RowTotals totals = load_row<Config::kInput>(input, vocab_size, temperature, row);
      const bool has_threshold = Config::kInput == kOrderOnly || totals.is_valid();
      const float threshold =
          has_threshold ? filter_threshold<Config>(params, row_idx, false, totals, temperature, row) : -kInfinity;
      TOut* output = static_cast<TOut*>(params.output) + int64_t(row_idx) * vocab_size;
      if constexpr (Config::kInput == kOrderOnly) {
        for (int i = 0; i < vocab_size; ++i) {
          output[i] = from_float<TOut>(row.scores[i] >= threshold ? row.scores[i] : -kInfinity);
        }
        continue;
      }
      double kept_sum = 0.;
      for (int i = 0; i < vocab_size; ++i) kept_sum += row.scores[i] >= threshold ? row.weights[i] : 0.f;
      double factor = 1. / kept_sum;
      if (!totals.is_valid()) {
        // Probabilities without weight stay zero; a NaN, or logits without a largest, make the row NaN.
        factor = Config::kInput == kProbs && totals.sum == 0. ? 0. : static_cast<double>(kNaN);
      }
      for (int i = 0; i < vocab_size; ++i) {
        const float weight = row.scores[i] >= threshold ? row.weights[i] : 0.f;
        output[i] = from_float<TOut>(static_cast<float>(weight * factor));
      }
    }
  }
  return fits;
}

}  // namespace flashinfer::cpu
