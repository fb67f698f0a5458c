// SPDX-License-Identifier: Apache-2.0
// Chain speculative sampling on the CPU: the rule and shapes of sampling/chain_speculative.cuh. A row a thread.
#pragma once

#include "cpu/sampling/row.h"

namespace flashinfer::cpu {

template <class Config>
void chain_speculative(const SpeculativeParams& params) {
  using T = typename Config::T;
  const int vocab_size = params.vocab_size, num_draft = params.num_draft;
#pragma omp parallel for
  for (int row = 0; row < params.num_rows; ++row) {
    const auto draft_id = [&](int step) {
      return load_index(params.draft_ids, params.draft_ids_are_int64, int64_t(row) * num_draft + step);
    };
    int32_t* output_ids = params.output_ids + int64_t(row) * (num_draft + 1);
    const auto draft_at = [&](int step) {
      return static_cast<const T*>(params.draft_probs) + row * params.draft_row_stride +
             step * params.draft_step_stride;
    };
    const auto target_at = [&](int step) {
      return static_cast<const T*>(params.target_probs) + row * params.target_row_stride +
             step * params.target_step_stride;
    };

    int num_emitted = -1, num_accepted = 0;
    for (int step = 0; step < num_draft; ++step) {
      const int64_t token_id = draft_id(step);
      bool passes = false;
      if (token_id >= 0 && token_id < vocab_size) {
        const double uniform = random_words(params, row, 2 + step / 2).uniform(step % 2 * 2);
        passes = uniform * to_float(draft_at(step)[token_id]) < to_float(target_at(step)[token_id]);
      }
      num_accepted += passes;
      if (!passes && num_emitted < 0) num_emitted = step;
    }
    if (num_emitted < 0) num_emitted = num_draft;

    const T* target = target_at(num_emitted);
    const T* draft = num_emitted < num_draft ? draft_at(num_emitted) : nullptr;
    const double uniform = random_words(params, row, 0).uniform(0);
    int token_id = cpu::draw(vocab_size, uniform, [&](int i) {
      const float residual = to_float(target[i]) - (draft ? to_float(draft[i]) : 0.f);
      return residual > 0.f ? residual : 0.f;
    });
    // The two distributions are equal: any token that fails would have been as good; draw from the target.
    if (token_id < 0) token_id = cpu::draw(vocab_size, uniform, [&](int i) { return to_float(target[i]); });

    for (int i = 0; i <= num_draft; ++i) {
      output_ids[i] = i < num_emitted ? int32_t(draft_id(i)) : i > num_emitted ? -1 : token_id < 0 ? 0 : token_id;
    }
    // Unsigned, where a count that the caller let run over wraps.
    params.num_accepted[row] = int32_t((params.adds_accepted ? uint32_t(params.num_accepted[row]) : 0) + num_accepted);
    params.num_emitted[row] = int32_t((params.adds_emitted ? uint32_t(params.num_emitted[row]) : 0) + num_emitted);
  }
}

}  // namespace flashinfer::cpu
