// SPDX-License-Identifier: Apache-2.0
// Length of every request of a paged cache on the CPU: the equation and shapes of page/seq_lens.cuh.
#pragma once

#include "page/params.h"

namespace flashinfer::cpu {

template <class Config>
void seq_lens(const SeqLensParams& params) {
  using Index = typename Config::Index;
  const Index* page_indptr = static_cast<const Index*>(params.page_indptr);
  const Index* last_page_len = static_cast<const Index*>(params.last_page_len);
  for (int i = 0; i < params.batch_size; ++i) {
    // Unsigned, where lengths that no request has wrap.
    const uint64_t num_pages = uint64_t(page_indptr[i + 1]) - uint64_t(page_indptr[i]);
    const uint64_t length = (num_pages - 1) * uint64_t(params.page_size) + uint64_t(last_page_len[i]);
    params.seq_lens[i] = int64_t(num_pages) > 0 ? int32_t(length) : 0;
  }
}

}  // namespace flashinfer::cpu
