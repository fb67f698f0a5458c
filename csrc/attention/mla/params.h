// SPDX-License-Identifier: Apache-2.0
// What the kernels of multi-head latent attention are given (DeepSeek-V2, arXiv:2405.04434, with the projections of
// keys and values absorbed into those of queries and outputs): every query head attends to one latent row a token.
//
//   logit(token i, head h, key j) = sm_scale * (q_nope[i, h] · ckv[j] + q_pe[i, h] · kpe[j])
//   out[i, h] = v_scale * sum_j softmax_j(logit) ckv[j]
//
// To planner and merge this is prefill with one KV head, which all query heads are the group of: a request's rows are
// (token, head) with the head innermost, row r is token r / num_qo_heads. A kernel takes units off the planner's list
// as prefill does (prefill/params.h, prefill/work.cuh): a PrefillItem is rows [q_tile * kBlockM, +kBlockM) of a request
// against KV tiles [tile_begin, tile_end) of kBlockN rows; it leaves its output, or a PartialRow of each row, which
// merge_shares() merges (mla/merge.cuh). KvView<kKvPagedLens>{params.kv.index, item.kv_begin, item.kv_len} says where
// rows are.
#pragma once

#include "attention/prefill/params.h"

namespace flashinfer {

// A cache of latent rows. Its two parts are often one row of memory, whose views the caller passes. Where kScaleBlock
// is not 0, ckv[j] above is a float32 for every kScaleBlock elements times those; they follow its elements in the row.
struct LatentKvParams {
  const void* ckv;  // [num_pages, page_size, kHeadDimCkv]: the values, and the larger part of the keys
  const void* kpe;  // [num_pages, page_size, kHeadDimKpe]: the part of the keys that has positions; null if it is empty
  KvIndex index;    // as kKvPagedLens
  int64_t ckv_page_stride, ckv_entry_stride;  // elements; the last axis is contiguous
  int64_t kpe_page_stride, kpe_entry_stride;
};

// In this order, addresses that change from call to call come first, as in AttentionParams.
struct LatentAttentionParams {
  static constexpr int32_t num_kv_heads = 1;
  const void* q_pe;    // [num_tokens, num_qo_heads, kHeadDimKpe]; null if it is empty
  const void* q_nope;  // [num_tokens, num_qo_heads, kHeadDimCkv]
  void* out;           // [num_tokens, num_qo_heads, kHeadDimCkv]
  float* lse;          // [num_tokens, num_qo_heads], log2 of the sum of exponentials, or null
  LatentKvParams kv;
  int64_t q_nope_token_stride, q_nope_head_stride;  // elements; the last axis is contiguous
  int64_t q_pe_token_stride, q_pe_head_stride;
  int64_t out_token_stride, out_head_stride;
  int32_t batch_size, num_qo_heads;
  float sm_scale;  // factor of the logits; the scale of a quantized cache is folded in
  float v_scale;   // factor of the output: that scale
};

struct MlaParams : PrefillRows, LatentAttentionParams, PrefillScratch {
  int32_t num_tokens;  // rows of q and out
};

}  // namespace flashinfer
