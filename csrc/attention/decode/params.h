// SPDX-License-Identifier: Apache-2.0
// What the planner of decode writes and the kernel reads, and the parameters of both.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// A planned decode walks each request's KV in tiles of a fixed number of rows. Laid end to end, the tiles of all
// requests are cut into num_chunks runs of equal length, so a chunk may begin and end inside a request, and a request
// may span several chunks. Every KV head (and block of query heads) walks the same chunks.

// One request that has KV to read; requests without are listed apart.
struct DecodeRequest {
  int32_t request_idx;
  int32_t kv_len;
  int32_t first_key;    // first row read: beyond zero where a sliding window hides the rows before
  int32_t page_begin;   // kv.indptr[request_idx]
  int32_t first_chunk;  // the chunks that hold a part of it: [first_chunk, first_chunk + num_chunks)
  int32_t num_chunks;
  int32_t num_tiles;
  int32_t token_idx;  // of a mixed batch, the request's row of q and out; unused elsewhere, where it is request_idx
};

// One run of tiles. It starts at first_tile of requests[first_request] and goes on through the requests after it.
struct DecodeChunk {
  int32_t first_request;  // position in the list of DecodeRequest
  int32_t first_tile;     // tile within that request
  int32_t num_tiles;      // over all its requests; 0 for a chunk without work
  int32_t num_empty;      // length of the list of requests without KV, the same in every chunk
  DecodeRequest request;  // copy of requests[first_request], to save a dependent load
};

static_assert(sizeof(DecodeRequest) == 32 && sizeof(DecodeChunk) == 48,
              "attention/decode/launch.py lays out arrays of these");

struct DecodeParams : AttentionParams {  // request i is token i, but in a mixed batch
  // The planner's schedule and scratch memory. Null in a launch without a plan.
  const DecodeChunk* chunks;      // [grid.y]
  const DecodeRequest* requests;  // [batch_size]
  const int32_t* empty;           // [batch_size] requests without KV
  uint32_t* counters;             // of blocks that have left partial results; zero before and after every launch
  float* partial_out;             // unmerged outputs: see partial_slot
  float* partial_lse;             // their LSE
  // 1: the schedule and the page table were complete before the previous kernel on the stream began, so that a launch
  // that overlaps it may read them at once. 0 in the first launch after a plan. Of a mixed batch unused.
  int32_t plan_is_settled;
  int32_t num_tokens;  // rows of q and out, of a mixed batch
};

// The planner of decode. Reads the lengths where they are, on the device, and writes the schedule.
struct DecodePlanParams {
  const int32_t* kv_indptr;      // [batch_size + 1]; null if the pages are in a block table
  const int32_t* last_page_len;  // [batch_size]; of a block table, and with has_lengths, rows of the whole request
  const int32_t* qo_indptr;      // [batch_size + 1], of a mixed batch
  DecodeChunk* chunks;           // [num_chunks]
  DecodeRequest* requests;       // [batch_size]
  int32_t* empty;                // [batch_size]
  int32_t* tile_indptr;          // [batch_size + 1] scratch: where each listed request's tiles start
  uint32_t* counters;            // [(batch_size + 2 * num_chunks) * num_head_blocks], zeroed here
  int32_t batch_size, num_chunks, num_head_blocks;
  int32_t page_size;
  int32_t table_len;    // entries of a row of the block table
  int32_t tile_len;     // KV rows of one tile
  int32_t window_left;  // -1: no window
  int32_t has_lengths;  // of a mixed batch
  Extras extras;        // of Config::Function
};

}  // namespace flashinfer
