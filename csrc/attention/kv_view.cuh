// SPDX-License-Identifier: Apache-2.0
// One view of a request's KV, whatever holds it: row kv_idx of the request → element offset in K and in V.
//
// Config::kKvStorage picks where rows live. Single and ragged rows are pages of one row in order, so only the lookup
// of the page differs. The lookup and the offset are two steps because the first is a load from memory: a pipelined
// kernel looks up the rows of the next tile while it still copies this one.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// Of kKvPagedLens, the caller gives the requests' lengths and not those of their last pages.
enum KvStorage : int { kKvSingle = 0, kKvRagged = 1, kKvPaged = 2, kKvPagedLens = 3 };

// Where a row is: page page_idx, entry entry_idx within it.
struct KvRow {
  int32_t page_idx, entry_idx;
};

template <int kStorage>
struct KvView {
  const KvIndex& index;
  int32_t begin;  // first entry of indices (paged), first row (ragged), 0 (single)
  int32_t len;    // rows of this request

  // Dependent loads: one or two. A planned kernel has begin and len at hand and builds the view from them.
  FLASHINFER_FN static KvView of_request(const KvIndex& index, int32_t request_idx) {
    if constexpr (kStorage == kKvSingle) return {index, 0, index.len};
    const bool is_table = kStorage >= kKvPaged && index.indptr == nullptr;
    const int32_t begin = is_table ? request_idx * index.len : index.indptr[request_idx];
    const int32_t end = is_table ? begin + index.len : index.indptr[request_idx + 1];
    if constexpr (kStorage == kKvRagged) return {index, begin, end - begin};
    if (end <= begin) return {index, begin, 0};
    if (kStorage == kKvPagedLens || is_table) {  // no longer than its pages
      const int64_t num_rows = int64_t(end - begin) * index.page_size.divisor;
      const int32_t len = index.last_page_len[request_idx];
      return {index, begin, len < num_rows ? len : int32_t(num_rows)};
    }
    return {index, begin, (end - begin - 1) * int32_t(index.page_size.divisor) + index.last_page_len[request_idx]};
  }

  FLASHINFER_FN KvRow locate(int32_t kv_idx) const {
    if constexpr (kStorage < kKvPaged) return {begin + kv_idx, 0};
    const int32_t page = int32_t(index.page_size.divide(uint32_t(kv_idx)));
    return {index.indices[begin + page], kv_idx - page * int32_t(index.page_size.divisor)};
  }

  FLASHINFER_FN static int64_t k_offset(const KvParams& kv, KvRow row, int32_t kv_head_idx) {
    return row.page_idx * kv.k_page_stride + row.entry_idx * kv.k_entry_stride + kv_head_idx * kv.k_head_stride;
  }
  FLASHINFER_FN static int64_t v_offset(const KvParams& kv, KvRow row, int32_t kv_head_idx) {
    return row.page_idx * kv.v_page_stride + row.entry_idx * kv.v_entry_stride + kv_head_idx * kv.v_head_stride;
  }
};

}  // namespace flashinfer
