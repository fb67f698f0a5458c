// Parameters of every attention kernel: decode, prefill and their planners, on CUDA and on the CPU.
#pragma once

#include "common.h"

// A function of these shared headers: device code under a CUDA compiler, host code for the CPU target.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FLASHINFER_FN __device__ __forceinline__
#else
#define FLASHINFER_FN inline
#endif

namespace flashinfer {

// Division of 0 <= n < 2^31 by a run-time constant: one multiply and one shift. The host fills it in:
// shift = ceil(log2(divisor)), magic = 2^32 * (2^shift - divisor) / divisor + 1.
struct FastDivisor {
  uint32_t divisor, magic, shift;

  // As the host computes it.
  FLASHINFER_FN static FastDivisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((1u << shift) < divisor) ++shift;
    return {divisor, uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor) + 1, shift};
  }
  FLASHINFER_FN uint32_t divide(uint32_t n) const { return (uint32_t((uint64_t(n) * magic) >> 32) + n) >> shift; }
};

// The caller's KV: one struct for a paged cache, for ragged rows and for a single sequence. Without pages a "page" is
// one row: page_size is 1, page_stride the distance between rows, and entry_stride unused.
struct KvParams {
  const void* k;           // [num_pages, page_size, num_kv_heads, head_dim_qk] in any order of the middle axes
  const void* v;           // [num_pages, page_size, num_kv_heads, head_dim_vo], likewise
  const int32_t* indptr;   // [batch_size + 1]: into indices if paged, into rows if ragged; null if single
  const int32_t* indices;  // [>= indptr[batch_size]] page numbers; null unless paged
  const int32_t*
      last_page_len;  // [batch_size], 1..page_size, of no matter where a request has no pages; null unless paged
  int64_t k_page_stride, k_entry_stride, k_head_stride;  // elements; the last axis is contiguous
  int64_t v_page_stride, v_entry_stride, v_head_stride;
  FastDivisor page_size;
  int32_t len;  // rows of a single sequence; otherwise unused
};

// A planned decode walks each request's KV in tiles of a fixed number of rows. Laid end to end, the tiles of all
// requests are cut into num_chunks runs of equal length, so a chunk may begin and end inside a request, and a request
// may span several chunks. Every KV head (and block of query heads) walks the same chunks.

// One request that has KV to read; requests without are listed apart.
struct DecodeRequest {
  int32_t request_idx;
  int32_t kv_len;
  int32_t kv_begin;     // first row read: beyond zero where a sliding window hides the rows before
  int32_t page_begin;   // kv.indptr[request_idx]
  int32_t first_chunk;  // the chunks that hold a part of it: [first_chunk, first_chunk + num_chunks)
  int32_t num_chunks;
  int32_t num_tiles;
  int32_t reserved;
};

// One run of tiles. It starts at first_tile of requests[first_request] and goes on through the requests after it.
struct DecodeChunk {
  int32_t first_request;  // position in the list of DecodeRequest
  int32_t first_tile;     // tile within that request
  int32_t num_tiles;      // over all its requests; 0 for a chunk without work
  int32_t num_empty;      // length of the list of requests without KV, the same in every chunk
  DecodeRequest request;  // copy of requests[first_request], to save a dependent load
};

static_assert(sizeof(DecodeRequest) == 32 && sizeof(DecodeChunk) == 48, "attention/plan.py lays out arrays of these");

struct AttentionParams {
  const void* q;  // [num_tokens, num_qo_heads, head_dim_qk]
  void* out;      // [num_tokens, num_qo_heads, head_dim_vo]
  float* lse;     // [num_tokens, num_qo_heads], log2 of the sum of exponentials, or null
  KvParams kv;
  const int32_t* qo_indptr;  // [batch_size + 1] into tokens; null for decode (request i is token i) and single
  const uint8_t* mask;       // custom mask, one bit per (query, key), little-endian, true = visible; null unless custom
  const int32_t* mask_indptr;  // [batch_size + 1] bytes: where each request's bits start; null if single
  const float* alibi_slopes;   // [num_qo_heads]; null unless ALiBi

  // The planner's schedule and scratch memory. Null in a launch without a plan.
  const void* chunks;    // decode: DecodeChunk[num_chunks]; other planners: their own records
  const void* requests;  // decode: DecodeRequest[batch_size]
  const int32_t* empty;  // decode: [batch_size] requests without KV
  uint32_t* counters;    // of blocks that have left partial results; zero before and after every launch
  float* partial_out;    // unmerged outputs, in an order known to the kernel
  float* partial_lse;    // their LSE

  int64_t q_token_stride, q_head_stride;      // elements; the last axis is contiguous
  int64_t out_token_stride, out_head_stride;  // elements; the last axis is contiguous
  int32_t batch_size;
  int32_t num_qo_heads, num_kv_heads;
  int32_t qo_len;         // queries of a single sequence; otherwise unused
  int32_t num_chunks;     // of work a launch is cut into (fixed by the grid, not by the lengths)
  int32_t window_left;    // keys seen before a query's own position, if the variant has a window
  float sm_scale;         // factor of q·k; the scales of quantized q and k are folded in
  float v_scale;          // factor of the output
  float logits_soft_cap;  // if the variant has one
  float rope_rcp_scale;   // 1 / rope_scale
  float rope_log2_theta;  // log2(rope_theta)
  // 1: the schedule and the page table were complete before the previous kernel on the stream began, so that a launch
  // that overlaps it may read them at once. 0 in the first launch after a plan.
  int32_t plan_is_settled;
};

// The planner of decode. Reads the lengths where they are, on the device, and writes the schedule.
struct DecodePlanParams {
  const int32_t* kv_indptr;      // [batch_size + 1]
  const int32_t* last_page_len;  // [batch_size]
  DecodeChunk* chunks;           // [num_chunks]
  DecodeRequest* requests;       // [batch_size]
  int32_t* empty;                // [batch_size]
  int32_t* tile_indptr;          // [batch_size + 1] scratch: where each listed request's tiles start
  uint32_t* counters;            // [(batch_size + 2 * num_chunks) * num_head_blocks], zeroed here
  int32_t batch_size, num_chunks, num_head_blocks;
  int32_t page_size;
  int32_t tile_len;     // KV rows of one tile
  int32_t window_left;  // -1: no window
};

}  // namespace flashinfer
