// SPDX-License-Identifier: Apache-2.0
// The planner of decode: cuts the KV of a batch into chunks of equal length, on the device.
//
//   tiles of request b:  t_b = ceil((kv_len_b - first_key_b) / tile_len)       first_key: what a window hides before it
//   chunks:              n = min(num_chunks, T) runs of floor(T / n) or ceil(T / n) tiles, of T = sum_b t_b end to end
//
//   kv indptr [batch_size + 1], or a block table -> requests [batch_size], those with KV in order; empty [batch_size],
//   those without; chunks [num_chunks], each with the tile it starts at (decode/params.h)
//
// Of a mixed batch (kIsMixed) requests of one query and some KV are listed alone, each with its token.
//
// One block. It scans the lengths as many at a time as it has threads, then finds the request of each chunk by
// bisection. A batch with a thread for each request, which is nearly every one, is read once and searched in shared
// memory: attention over a block table plans in every layer.
#pragma once

#include "attention/decode/schedule.cuh"
#include "attention/visibility.cuh"
#include "device/pdl.cuh"
#include "device/scan.cuh"

namespace flashinfer {

// Tiles, and requests that are listed, in one number for one scan.
struct TilesAndRequests {
  __device__ __forceinline__ static uint64_t pack(int32_t num_tiles, bool is_listed) {
    return uint64_t(is_listed) << 32 | uint32_t(num_tiles);
  }
  __device__ __forceinline__ static int32_t tiles_of(uint64_t packed) { return int32_t(packed); }
  __device__ __forceinline__ static int32_t requests_of(uint64_t packed) { return int32_t(packed >> 32); }
};

// One request as the schedule lists it, its chunks still unknown.
template <class Config>
__device__ __forceinline__ DecodeRequest read_request(const DecodePlanParams& params, int32_t request_idx) {
  if (request_idx >= params.batch_size) return {request_idx, 0, 0, 0, 0, 0, 0, 0};
  int32_t token_idx = 0;
  if constexpr (Config::kIsMixed) {
    token_idx = params.qo_indptr[request_idx];
    const int64_t qo_len = int64_t(params.qo_indptr[request_idx + 1]) - token_idx;
    if (token_idx < 0 || qo_len != 1) return {request_idx, 0, 0, 0, 0, 0, 0, 0};
  }
  const bool is_table = params.kv_indptr == nullptr;
  const int32_t begin = is_table ? request_idx * params.table_len : params.kv_indptr[request_idx];
  const int32_t num_pages = is_table ? params.table_len : params.kv_indptr[request_idx + 1] - begin;
  // Offsets and lengths may be anything: so long that the sum of all tiles overflows, no request can be.
  constexpr int64_t kMaxLen = 1 << 30;
  const int64_t max_len = int64_t(0x7fffffff / params.batch_size) * params.tile_len;
  int64_t num_rows = 0;
  if (num_pages > 0) {
    const int64_t last = params.last_page_len[request_idx], num_before = int64_t(num_pages - 1) * params.page_size;
    const bool is_length = Config::kIsMixed ? params.has_lengths != 0 : is_table;
    num_rows = is_length ? min(last, num_before + params.page_size) : num_before + last;
  }
  const int32_t kv_len = int32_t(max(min(num_rows, min(max_len, kMaxLen)), int64_t(0)));
  const VisibilityBy<typename Config::Function> visibility{kMaskNone, params.window_left >= 0, params.window_left,
                                                           request_idx, &params.extras};
  // One that sees nothing still has a tile, which leaves its result.
  const int32_t first_key = min(visibility.keys_of(kv_len - 1, kv_len).begin, max(kv_len - 1, 0));
  return {request_idx, kv_len, first_key, begin, 0, 0, ceil_div(kv_len - first_key, params.tile_len), token_idx};
}

// Grid: one block. Two passes over the requests, of which a short list needs the second alone: how many tiles there
// are, then who owns which.
template <class Config>
__device__ void decode_plan(const DecodePlanParams& params) {
  constexpr int kNumThreads = Config::kNumThreads;
  __shared__ uint64_t warp_sums[kWarpSize];
  __shared__ int32_t first_tiles_smem[kNumThreads];
  __shared__ DecodeRequest requests_smem[kNumThreads];
  const bool is_short_list = params.batch_size <= kNumThreads;
  int32_t* first_tiles = is_short_list ? first_tiles_smem : params.tile_indptr;
  const DecodeRequest* requests = is_short_list ? requests_smem : params.requests;
  wait_for_previous_kernel();
  allow_next_kernel();

  const int64_t num_counters = (int64_t(params.batch_size) + 2 * params.num_chunks) * params.num_head_blocks;
  for (int64_t i = threadIdx.x; i < num_counters; i += kNumThreads) params.counters[i] = 0;
  ChunkSplit split{0, 0, 0};
  if (!is_short_list) {
    int32_t num_tiles = 0;
    for (int32_t first = 0; first < params.batch_size; first += kNumThreads) {
      const DecodeRequest request = read_request<Config>(params, first + threadIdx.x);
      num_tiles += int32_t(scan_block<kNumThreads>(uint64_t(request.num_tiles), warp_sums).total);
    }
    split = ChunkSplit::make(num_tiles, params.num_chunks);
  }

  int32_t tiles_before = 0, num_listed = 0;
  for (int32_t first = 0; first < params.batch_size; first += kNumThreads) {
    DecodeRequest request = read_request<Config>(params, first + threadIdx.x);
    const bool listed = request.kv_len > 0;
    const auto scan = scan_block<kNumThreads>(TilesAndRequests::pack(request.num_tiles, listed), warp_sums);
    if (is_short_list) split = ChunkSplit::make(TilesAndRequests::tiles_of(scan.total), params.num_chunks);
    const int32_t first_tile = tiles_before + TilesAndRequests::tiles_of(scan.before);
    const int32_t position = num_listed + TilesAndRequests::requests_of(scan.before);
    if (listed) {
      request.first_chunk = split.chunk_of(first_tile);
      request.num_chunks = split.chunk_of(first_tile + request.num_tiles - 1) - request.first_chunk + 1;
      params.requests[position] = request;
      if (is_short_list) requests_smem[position] = request;
      first_tiles[position] = first_tile;
    } else if (!Config::kIsMixed && request.request_idx < params.batch_size) {  // prefill has those of a mixed batch
      params.empty[request.request_idx - position] = request.request_idx;
    }
    tiles_before += TilesAndRequests::tiles_of(scan.total);
    num_listed += TilesAndRequests::requests_of(scan.total);
  }
  __syncthreads();

  for (int32_t chunk_idx = threadIdx.x; chunk_idx < params.num_chunks; chunk_idx += kNumThreads) {
    const int32_t num_empty = Config::kIsMixed ? 0 : params.batch_size - num_listed;
    DecodeChunk chunk{0, 0, 0, num_empty, {0, 0, 0, 0, 0, 0, 0, 0}};
    if (chunk_idx < split.num_chunks) {
      const int32_t first_tile = split.first_tile(chunk_idx);
      int32_t low = 0, high = num_listed;  // first_tiles[low] <= first_tile < first_tiles[high]
      while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (first_tiles[middle] <= first_tile ? low : high) = middle;
      }
      chunk.first_request = low;
      chunk.first_tile = first_tile - first_tiles[low];
      chunk.num_tiles = split.first_tile(chunk_idx + 1) - first_tile;
      chunk.request = requests[low];
    }
    params.chunks[chunk_idx] = chunk;
  }
}

}  // namespace flashinfer
