// The planner of decode: cuts the KV of a batch into chunks of equal length, on the device.
#pragma once

#include "attention/decode/schedule.cuh"
#include "attention/visibility.cuh"
#include "device/pdl.cuh"
#include "device/reduce.cuh"

namespace flashinfer {

struct DecodePlanSmem {
  int32_t warp_sums[kWarpSize][2];
};

// Tiles and listed requests before this thread's, and in the block.
struct PlanScan {
  int32_t tiles_before, requests_before, num_tiles, num_requests;
};

template <int kNumThreads>
__device__ __forceinline__ PlanScan scan_block(int32_t num_tiles, bool listed, DecodePlanSmem& smem) {
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  const uint32_t listed_mask = __ballot_sync(0xffffffffu, listed);
  int32_t inclusive = num_tiles;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane_idx >= offset) inclusive += before;
  }
  __syncthreads();  // the sums of the scan before this one have been read
  if (lane_idx == kWarpSize - 1) {
    smem.warp_sums[warp_idx][0] = inclusive;
    smem.warp_sums[warp_idx][1] = __popc(listed_mask);
  }
  __syncthreads();
  PlanScan scan{inclusive - num_tiles, __popc(listed_mask & ((1u << lane_idx) - 1)), 0, 0};
#pragma unroll
  for (int w = 0; w < kNumThreads / kWarpSize; ++w) {
    const int32_t tiles = smem.warp_sums[w][0], requests = smem.warp_sums[w][1];
    scan.tiles_before += w < warp_idx ? tiles : 0;
    scan.requests_before += w < warp_idx ? requests : 0;
    scan.num_tiles += tiles;
    scan.num_requests += requests;
  }
  return scan;
}

// One request as the schedule lists it, its chunks still unknown.
__device__ __forceinline__ DecodeRequest read_request(const DecodePlanParams& params, int32_t request_idx) {
  if (request_idx >= params.batch_size) return {request_idx, 0, 0, 0, 0, 0, 0, 0};
  const int32_t begin = params.kv_indptr[request_idx], num_pages = params.kv_indptr[request_idx + 1] - begin;
  // Offsets and lengths may be anything: so long that the sum of all tiles overflows, no request can be.
  constexpr int64_t kMaxLen = 1 << 30;
  const int64_t max_len = int64_t(0x7fffffff / params.batch_size) * params.tile_len;
  const int64_t num_rows =
      num_pages > 0 ? int64_t(num_pages - 1) * params.page_size + params.last_page_len[request_idx] : 0;
  const int32_t kv_len = int32_t(max(min(num_rows, min(max_len, kMaxLen)), int64_t(0)));
  const Visibility visibility{kMaskNone, params.window_left >= 0, params.window_left};
  const int32_t kv_begin = visibility.keys_of(kv_len - 1, kv_len).begin;
  return {request_idx, kv_len, kv_begin, begin, 0, 0, ceil_div(kv_len - kv_begin, params.tile_len), 0};
}

// Grid: one block. Two passes over the requests: how many tiles there are, then who owns which.
template <class Config>
__device__ void decode_plan(const DecodePlanParams& params) {
  constexpr int kNumThreads = Config::kNumThreads;
  __shared__ DecodePlanSmem smem;
  wait_for_previous_kernel();
  allow_next_kernel();

  const int64_t num_counters = (int64_t(params.batch_size) + 2 * params.num_chunks) * params.num_head_blocks;
  for (int64_t i = threadIdx.x; i < num_counters; i += kNumThreads) params.counters[i] = 0;
  int32_t num_tiles = 0;
  for (int32_t first = 0; first < params.batch_size; first += kNumThreads) {
    num_tiles += scan_block<kNumThreads>(read_request(params, first + threadIdx.x).num_tiles, false, smem).num_tiles;
  }
  const ChunkSplit split = ChunkSplit::make(num_tiles, params.num_chunks);

  int32_t tiles_before = 0, num_listed = 0;
  for (int32_t first = 0; first < params.batch_size; first += kNumThreads) {
    DecodeRequest request = read_request(params, first + threadIdx.x);
    const bool listed = request.kv_len > 0;
    const PlanScan scan = scan_block<kNumThreads>(request.num_tiles, listed, smem);
    const int32_t first_tile = tiles_before + scan.tiles_before, position = num_listed + scan.requests_before;
    if (listed) {
      request.first_chunk = split.chunk_of(first_tile);
      request.num_chunks = split.chunk_of(first_tile + request.num_tiles - 1) - request.first_chunk + 1;
      params.requests[position] = request;
      params.tile_indptr[position] = first_tile;
    } else if (request.request_idx < params.batch_size) {
      params.empty[request.request_idx - position] = request.request_idx;
    }
    tiles_before += scan.num_tiles;
    num_listed += scan.num_requests;
  }
  __syncthreads();

  for (int32_t chunk_idx = threadIdx.x; chunk_idx < params.num_chunks; chunk_idx += kNumThreads) {
    DecodeChunk chunk{0, 0, 0, params.batch_size - num_listed, {0, 0, 0, 0, 0, 0, 0, 0}};
    if (chunk_idx < split.num_chunks) {
      const int32_t first_tile = split.first_tile(chunk_idx);
      int32_t low = 0, high = num_listed;  // tile_indptr[low] <= first_tile < tile_indptr[high]
      while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (params.tile_indptr[middle] <= first_tile ? low : high) = middle;
      }
      chunk.first_request = low;
      chunk.first_tile = first_tile - params.tile_indptr[low];
      chunk.num_tiles = split.first_tile(chunk_idx + 1) - first_tile;
      chunk.request = params.requests[low];
    }
    params.chunks[chunk_idx] = chunk;
  }
}

}  // namespace flashinfer
