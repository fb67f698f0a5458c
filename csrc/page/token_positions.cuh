// SPDX-License-Identifier: Apache-2.0
// Request and position of every row t of a ragged batch. The rows appended to a request are its last ones, so, where
// append_indptr[b] <= t < append_indptr[b + 1],
//
//   batch_indices[t] = b          positions[t] = seq_lens[b] − (append_indptr[b + 1] − t)
//
// and −1 and 0 for a row of no request: past the end of the batch, as in a padded CUDA graph, or before its start.
//
//   append_indptr [batch_size + 1] Index      seq_lens [batch_size] Index      both results [num_tokens] int32
//
// A thread a row, by binary search, so that no thread's work depends on the longest request.
#pragma once

#include "device/pdl.cuh"
#include "device/search.cuh"
#include "page/params.h"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void token_positions(const TokenPositionsParams& params) {
  using Index = typename Config::Index;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t token_idx = int64_t(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  if (token_idx >= params.num_tokens) return;
  const Index* append_indptr = static_cast<const Index*>(params.append_indptr);
  const int batch_idx = find_segment(append_indptr, params.batch_size, token_idx);
  const bool is_padding = batch_idx == params.batch_size || token_idx < int64_t(append_indptr[batch_idx]);
  params.batch_indices[token_idx] = is_padding ? -1 : batch_idx;
  // Counted from the end of the request: the rows appended are its last ones.
  params.positions[token_idx] = is_padding ? 0
                                           : int32_t(static_cast<const Index*>(params.seq_lens)[batch_idx] -
                                                     append_indptr[batch_idx + 1] + Index(token_idx));
}

}  // namespace flashinfer
