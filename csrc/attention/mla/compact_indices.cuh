// Lists of rows without their gaps:
//
//   compacted[l, :lengths[l]] = those of indices[l, :max_len] that are at least 0 and below num_rows, in order
//   qo_indptr[l] = l      kv_indptr[l] = l * max_len
//
// A block a list. It goes through it in strips of its width, each scanned for the places of what is kept.
#pragma once

#include "attention/mla/compact_params.h"
#include "device/pdl.cuh"
#include "device/scan.cuh"

namespace flashinfer {

template <class Config>
__device__ __forceinline__ void compact_indices(const CompactIndicesParams& params) {
  __shared__ int32_t warp_sums_smem[kWarpSize];
  const int64_t list_idx = blockIdx.x;
  const int32_t* list_gmem = params.indices + list_idx * params.list_stride;
  int32_t* compacted_gmem = params.compacted + list_idx * params.max_len;
  wait_for_previous_kernel();
  allow_next_kernel();
  int32_t num_kept = 0;
  for (int32_t strip = 0; strip < params.max_len; strip += Config::kNumThreads) {
    const int32_t i = strip + int32_t(threadIdx.x), row = i < params.max_len ? list_gmem[i] : -1;
    const bool is_row = row >= 0 && row < params.num_rows;
    const auto scan = scan_block<Config::kNumThreads>(int32_t(is_row), warp_sums_smem);
    if (is_row) compacted_gmem[num_kept + scan.before] = row;
    num_kept += scan.total;
  }
  if (threadIdx.x > 0) return;
  params.lengths[list_idx] = num_kept;
  if (list_idx == 0) params.qo_indptr[0] = params.kv_indptr[0] = 0;
  params.qo_indptr[list_idx + 1] = int32_t(list_idx) + 1;
  params.kv_indptr[list_idx + 1] = (int32_t(list_idx) + 1) * params.max_len;
}

}  // namespace flashinfer
