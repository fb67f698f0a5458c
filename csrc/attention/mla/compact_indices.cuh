// SPDX-License-Identifier: Apache-2.0
// Lists of rows without their gaps:
//
//   compacted[l, :lengths[l]] = those of indices[l, :max_len] that are at least 0 and below num_rows, in order
//   qo_indptr[l] = l      kv_indptr[l] = l * max_len
//
// and the schedule of attention over them.
//
// A block a list. It goes through it in strips of its width, each scanned for the places of what is kept.
#pragma once

#include "attention/mla/compact_params.h"
#include "device/pdl.cuh"
#include "device/scan.cuh"

namespace flashinfer {

// Query tiles of a list are neighbours, which read the same rows at the same time.
template <class Config>
__device__ __forceinline__ void write_items(const CompactIndicesParams& params, int32_t list_idx, int32_t num_kept) {
  const int32_t num_q_tiles = ceil_div(params.num_heads, params.block_m), num_splits = params.num_splits;
  const int32_t num_tiles = ceil_div(num_kept, params.block_n), split_len = ceil_div(num_tiles, num_splits);
  for (int32_t i = threadIdx.x; i < num_q_tiles * num_splits; i += Config::kNumThreads) {
    PrefillItem item = {};
    item.request_idx = item.q_begin = list_idx;
    item.q_tile = i % num_q_tiles;
    item.qo_len = 1;
    item.kv_begin = list_idx * params.max_len;
    item.kv_len = num_kept;
    item.split_idx = i / num_q_tiles;
    item.num_splits = num_splits;
    item.tile_begin = min(item.split_idx * split_len, num_tiles);
    item.tile_end = min(item.tile_begin + split_len, num_tiles);
    item.partial_row = (list_idx * params.num_heads + item.q_tile * params.block_m) * num_splits;
    item.counter = list_idx * num_q_tiles + item.q_tile;
    params.items[(item.split_idx * params.num_lists + list_idx) * num_q_tiles + item.q_tile] = item;
    if (num_splits > 1) params.counters[item.counter] = 0;
  }
  PrefillSchedule& schedule = *params.schedule;
  if (list_idx > 0 || threadIdx.x >= sizeof(schedule.taken) / 4) return;
  schedule.taken[threadIdx.x] = 0;
  if (threadIdx.x > 0) return;
  schedule.num_items = params.num_lists * num_q_tiles * num_splits;
  schedule.num_heads_abreast = 1;
  schedule.has_splits = num_splits > 1;
  schedule.num_kv_pages = 0;
  schedule.next_unit = schedule.num_done = 0;
}

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
  write_items<Config>(params, int32_t(list_idx), num_kept);
  if (threadIdx.x > 0) return;
  params.lengths[list_idx] = num_kept;
  if (list_idx == 0) params.qo_indptr[0] = params.kv_indptr[0] = 0;
  params.qo_indptr[list_idx + 1] = int32_t(list_idx) + 1;
  params.kv_indptr[list_idx + 1] = (int32_t(list_idx) + 1) * params.max_len;
}

}  // namespace flashinfer
