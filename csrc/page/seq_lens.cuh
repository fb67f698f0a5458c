// SPDX-License-Identifier: Apache-2.0
// Length of every request b of a paged cache, from n = page_indptr[b + 1] − page_indptr[b] pages:
//
//   seq_lens[b] = n > 0 ? (n − 1) · page_size + last_page_len[b] : 0
//
//   page_indptr [batch_size + 1] Index      last_page_len [batch_size] Index      seq_lens [batch_size] int32
//
// A thread a request.
#pragma once

#include "device/pdl.cuh"
#include "page/params.h"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void seq_lens(const SeqLensParams& params) {
  using Index = typename Config::Index;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int batch_idx = blockIdx.x * Config::kNumThreads + threadIdx.x;
  if (batch_idx >= params.batch_size) return;
  const Index* page_indptr = static_cast<const Index*>(params.page_indptr);
  const int num_pages = int(page_indptr[batch_idx + 1] - page_indptr[batch_idx]);
  const int last_page_len = int(static_cast<const Index*>(params.last_page_len)[batch_idx]);
  // A request without pages is empty whatever its last_page_len says, as the attention kernels see it.
  params.seq_lens[batch_idx] = num_pages > 0 ? (num_pages - 1) * params.page_size + last_page_len : 0;
}

}  // namespace flashinfer
