// SPDX-License-Identifier: Apache-2.0
// What the planner of prefill writes and the kernel reads, a list of work items, the longest first; the parameters of
// both.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// A tile of query rows against a run of KV tiles, for every KV head alike. The rows of one KV head are (token, head in
// group) with the head innermost: row r is token r / group_size of the request.
struct PrefillItem {
  int32_t request_idx;  // where a custom mask is looked up
  int32_t q_tile;       // rows [q_tile * kBlockM, +kBlockM) of the request
  int32_t q_begin;      // the request's first token in q and out
  int32_t qo_len;       // its tokens
  int32_t kv_begin;     // KvView::begin
  int32_t kv_len;
  int32_t tile_begin;  // KV tiles [tile_begin, tile_end); may be empty
  int32_t tile_end;
  int32_t split_idx;    // this run is the split_idx-th of num_splits of the query tile
  int32_t num_splits;   // 1: the kernel writes the output itself
  int32_t partial_row;  // first row of the query tile's partial results: see PartialResults
  int32_t counter;      // first of the counters its splits share

  // Nothing beyond the num_tokens rows of q and out, whatever the offsets said.
  FLASHINFER_FN void confine_to(int32_t num_tokens) {
    const int32_t num_left = q_begin >= 0 && q_begin < num_tokens ? num_tokens - q_begin : 0;
    if (qo_len > num_left) qo_len = num_left;
  }
};

// Head of the schedule. Alone in its cache lines: next_unit is where blocks fetch work.
struct PrefillSchedule {
  int32_t num_items;
  int32_t num_heads_abreast;
  int32_t has_splits;    // whether there is an item with num_splits > 1
  int32_t num_kv_pages;  // of requests that are listed, in a mixed batch and where pages are in a block table
  int32_t num_blocks;    // that take units, of a mixed batch
  int32_t reserved[27];
  uint32_t next_unit;  // (item, KV head) pairs handed out, but for those a block takes unasked; zero between launches
  uint32_t num_done;   // blocks that have left; zero between launches
  uint32_t taken[30];  // a bit for each unit that a block takes unasked, where that is marked; zero between launches
};

// Which item and KV head a unit of work is. The whole list is taken for the first num_heads_abreast KV heads, then for
// the next ones: blocks at work at the same time share heads, and find the KV that others have read in the L2 cache.
struct UnitOrder {
  int32_t num_items, num_kv_heads, num_heads_abreast;

  FLASHINFER_FN void find(uint32_t unit, int32_t& item_idx, int32_t& kv_head_idx) const {
    const int32_t first_head = unit / uint32_t(num_items * num_heads_abreast) * num_heads_abreast;
    const uint32_t num_left = num_kv_heads - first_head, idx = unit - uint32_t(first_head * num_items);
    const uint32_t num_heads = num_left < uint32_t(num_heads_abreast) ? num_left : num_heads_abreast;
    item_idx = idx / num_heads;
    kv_head_idx = first_head + idx - item_idx * num_heads;
  }
};

// Of each launch: where the queries of a request are, and its custom mask.
struct PrefillRows {
  const int32_t* qo_indptr;  // [batch_size + 1] into tokens; null if every request has qo_len
  // One bit per (query, key), little-endian, true = visible; of a draft mask [num_tokens, ceil(qo_len / 32) * 32] among
  // the queries of each request; of a mask of items uint16, the places of tokens in them. Null of other masks.
  const uint8_t* mask;
  // [batch_size + 1] bytes: where each request's bits start; null if single or draft. Of a mask of items
  // ItemsOfRequest.
  const int32_t* mask_indptr;
};

// The planner's schedule and scratch memory. Null in a launch without a plan, whose blocks are one query tile each.
struct PrefillScratch {
  const PrefillItem* items;
  PrefillSchedule* schedule;
  uint32_t* counters;  // of blocks that have left partial results; zero before and after every launch
  float* partial_out;  // unmerged outputs: see PartialResults
};

struct PrefillParams : PrefillRows, AttentionParams, PrefillScratch {
  float* partial_lse;  // of unmerged outputs
  int32_t qo_len;      // queries of every request where there is no qo_indptr; under a draft mask, at most
  int32_t num_tokens;  // rows of q and out
};

constexpr int32_t kMaxSplits = 1024;  // of a query tile

// What costs time besides the KV tiles themselves, in those of a tile.
struct PlanCosts {
  float of_item;      // to start one
  float of_partial;   // to write and to merge a partial result
  int32_t min_split;  // KV tiles; a shorter split is not worth it
  // Whether blocks take the list in its order, an item when that before is about to end (or at the start, the first):
  // then short items fill the gaps that long ones leave. Of one KV head.
  int32_t fills_gaps;
};

struct PrefillPlanParams {
  const int32_t* qo_indptr;  // [batch_size + 1]; null if every request has qo_len
  KvIndex kv;                // but for the page numbers
  PrefillSchedule* schedule;
  PrefillItem* items;    // [max_items]
  int32_t* tile_indptr;  // [batch_size + 1] scratch: where each request's query tiles start
  uint32_t* counters;    // [max_counters * num_kv_heads], zeroed here as far as they are used
  int32_t batch_size;
  int32_t qo_len;  // tokens of every request where there is no qo_indptr; otherwise unused
  int32_t num_kv_heads, group_size;
  int32_t num_blocks;  // of the kernel's grid
  int32_t max_items, max_counters;
  int32_t max_partial_rows;  // rows of partial results the workspace holds for every KV head
  int32_t block_m, block_n;  // rows of a query tile and of a KV tile
  int32_t mask;              // MaskKind
  int32_t window_left;       // -1: no window
  int32_t fixed_split;       // KV tiles of a split, whatever shares the batch; 0: as it is fastest
  PlanCosts costs;
  // Of a mixed batch, whose requests of one query and some KV have a launch of decode: a KV tile that this reads, at
  // the speed of memory, in those that a block of prefill computes. 0: the launches do not overlap.
  float time_to_read;
  Extras extras;  // of Config::Function
};

}  // namespace flashinfer
