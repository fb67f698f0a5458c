// SPDX-License-Identifier: Apache-2.0
// What every attention kernel is given, on CUDA and on the CPU: the caller's tensors and the options. Decode and
// prefill add their schedules (decode/params.h, prefill/params.h).
#pragma once

#include "common.h"
#include "fast_divisor.h"

// A function of these shared headers: device code under a CUDA compiler, host code for the CPU target.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FLASHINFER_FN __device__ __forceinline__
#else
#define FLASHINFER_FN inline
#endif

namespace flashinfer {

// Where each request's rows of KV are. Without pages a "page" is one row: page_size is 1.
//
// Pages are listed end to end, or in a block table: indices is then [batch_size, len], indptr null.
struct KvIndex {
  const int32_t* indptr;  // [batch_size + 1]: into indices if paged, into rows if ragged; null if single or a table
  // [batch_size] 1..page_size, no matter what where there are no pages; of a block table, and of kKvPagedLens: rows of
  // the whole request. Null unless paged.
  const int32_t* last_page_len;
  const int32_t* indices;  // [>= indptr[batch_size]] page numbers; null unless paged
  int32_t len;             // rows of a single sequence; entries of a row of the block table; otherwise unused
  FastDivisor page_size;
};

// The caller's KV: one struct for a paged cache, for ragged rows and for a single sequence. Without pages page_stride
// is the distance between rows, and entry_stride unused.
struct KvParams {
  const void* k;  // [num_pages, page_size, num_kv_heads, head_dim_qk] in any order of the middle axes
  const void* v;  // [num_pages, page_size, num_kv_heads, head_dim_vo], likewise
  KvIndex index;
  int64_t k_page_stride, k_entry_stride, k_head_stride;  // elements; the last axis is contiguous
  int64_t v_page_stride, v_entry_stride, v_head_stride;
};

// Values of what functions of scores and masks declare besides their arguments: of a tensor the address, of its axes
// the lengths and of all but the last the strides; numbers. Where each is, the functions know.
struct Extras {
  alignas(8) uint8_t bytes[128];

  template <class T>
  FLASHINFER_FN T at(int offset) const {
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
    return *reinterpret_cast<const T*>(bytes + offset);
#else
    T value;
    __builtin_memcpy(&value, bytes + offset, sizeof(T));
    return value;
#endif
  }
};

// In this order, and with what a derived struct puts before it, addresses that change from call to call come first: a
// launch packs nothing else anew.
struct AttentionParams {
  const float* sinks;  // [num_qo_heads] logits: sink.cuh; null unless the variant has them
  const void* q;       // [num_tokens, num_qo_heads, head_dim_qk]
  void* out;           // [num_tokens, num_qo_heads, head_dim_vo]
  float* lse;          // [num_tokens, num_qo_heads], log2 of the sum of exponentials, or null
  KvParams kv;
  const float* alibi_slopes;         // [num_qo_heads]; null unless ALiBi
  const uint64_t* rope_frequencies;  // [head_dim_qk / 2] turns per position: device/rotary.cuh; null unless RoPE
  // [1] scales of quantized q, k and v that the host does not know, or 1 each; null unless kHasDeviceScales.
  const float *device_q_scale, *device_k_scale, *device_v_scale;
  int64_t q_token_stride, q_head_stride;      // elements; the last axis is contiguous
  int64_t out_token_stride, out_head_stride;  // elements; the last axis is contiguous
  Extras extras;                              // of Config::Function
  int32_t batch_size;
  int32_t num_qo_heads, num_kv_heads;
  int32_t window_left;    // keys seen before a query's own position, if the variant has a window
  float sm_scale;         // factor of q·k; scales of quantized q and k that the host knows are folded in
  float v_scale;          // factor of the output, of those that the host knows
  float logits_soft_cap;  // if the variant has one
};

}  // namespace flashinfer
