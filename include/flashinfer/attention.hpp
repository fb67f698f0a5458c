// SPDX-License-Identifier: Apache-2.0
// Attention over paged caches and ragged rows: what decode.hpp, prefill.hpp and mla.hpp share.
//
// plan() reads lengths on the device and leaves a schedule in the workspace: one launch, no copy, no wait, so that plan
// and run may be captured into one CUDA graph. run() is one launch. What a plan was given has to stay where it is until
// the last run has ended: index tensors and workspace are the caller's. On a CPU there is nothing to plan, and values
// of index tensors are checked, as far as they lead to memory.
//
// An object is for one thread at a time; so is a workspace, which one plan has at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <unordered_map>
#include <vector>

#include "flashinfer/operators.hpp"

namespace flashinfer {

struct AttentionShape {
  int32_t num_qo_heads = 0, num_kv_heads = 0;
  int32_t head_dim_qk = 0, head_dim_vo = 0;  // of values 0: the same
  int32_t page_size = 1;
  Dtype q_dtype = Dtype::kBf16, kv_dtype = Dtype::kBf16, o_dtype = Dtype::kBf16;
};

struct AttentionOptions {
  bool is_causal = false;        // of prefill: query i of n sees keys up to kv_len - n + i
  double sm_scale = 0.0;         // of q·k; 0: 1 / sqrt(head_dim_qk)
  int64_t window_left = -1;      // keys seen before a query's own position; -1: all
  double logits_soft_cap = 0.0;  // logits become cap * tanh(logits / cap); 0: none
  const float* sinks = nullptr;  // [num_qo_heads] logits, each one more term of its head's softmax; null: none
  double q_scale = 1.0, k_scale = 1.0, v_scale = 1.0;  // of quantized tensors
};

// Memory of the device for schedules and partial results. What a single call takes besides must be zero at first.
struct Workspace {
  void* ints = nullptr;
  size_t int_bytes = 0;
  void* floats = nullptr;
  size_t float_bytes = 0;

  // A quarter, at most 8 MiB, is for integers. 32 MiB serve decode, 128 MiB every batch.
  static Workspace of(const Buffer& buffer) { return of(buffer.data(), buffer.num_bytes()); }
  static Workspace of(void* data, size_t num_bytes) {
    const size_t int_bytes = std::min<size_t>(8 << 20, num_bytes / 4) / 256 * 256;
    return {data, int_bytes, static_cast<char*>(data) + int_bytes, num_bytes - int_bytes};
  }
};

namespace host {

// Consecutive regions of a workspace.
class Carver {
 public:
  Carver(const char* op, const char* name, void* data, size_t num_bytes)
      : op_(op),
        name_(name),
        next_(aligned(reinterpret_cast<uintptr_t>(data))),
        end_(reinterpret_cast<uintptr_t>(data) + num_bytes) {}

  template <class T>
  T* take(int64_t num_bytes) {
    T* const region = reinterpret_cast<T*>(next_);
    next_ += aligned(uint64_t(num_bytes));
    require(next_ <= end_, op_, ": the ", name_, " workspace is ", next_ - end_,
            " bytes too small. Next step: a larger one");
    return region;
  }

 private:
  static uint64_t aligned(uint64_t size) { return (size + 255) / 256 * 256; }

  const char *op_, *name_;
  uint64_t next_, end_;
};

// What of the options selects a kernel, and what of them it is given.
class Variant {
 public:
  Variant() = default;
  Variant(const char* op, const AttentionShape& shape, const AttentionOptions& options) : sinks_(options.sinks) {
    require(shape.num_kv_heads > 0 && shape.num_qo_heads > 0 && shape.num_qo_heads % shape.num_kv_heads == 0, op,
            ": num_qo_heads is ", shape.num_qo_heads, ", num_kv_heads ", shape.num_kv_heads,
            "; expected a positive multiple of it");
    require(shape.head_dim_qk > 0 && shape.page_size > 0, op, ": head_dim_qk is ", shape.head_dim_qk, ", page_size ",
            shape.page_size, "; expected 1 or more");
    require(options.sm_scale >= 0 && options.q_scale > 0 && options.k_scale > 0 && options.logits_soft_cap >= 0, op,
            ": sm_scale is ", options.sm_scale, ", q_scale ", options.q_scale, ", k_scale ", options.k_scale,
            ", logits_soft_cap ", options.logits_soft_cap,
            "; expected q_scale and k_scale above 0, the others 0 or more");
    window_left_ = options.window_left < 0 || options.window_left >= 1 << 30 ? -1 : int32_t(options.window_left);
    soft_cap_ = float(options.logits_soft_cap);
    const double scale = options.sm_scale > 0 ? options.sm_scale : 1.0 / std::sqrt(double(shape.head_dim_qk));
    sm_scale_ = float(scale * (options.q_scale * options.k_scale));
    v_scale_ = float(options.v_scale);
  }

  int32_t window_left() const { return window_left_; }

  Request selecting(const Request& request) const {
    return request.with("pos_encoding", "none")
        .with("has_window", window_left_ >= 0)
        .with("has_soft_cap", soft_cap_ > 0)
        .with("has_sinks", sinks_ != nullptr)
        .with("device_scales", false);
  }

  void fill(AttentionParams& params) const {
    params.sinks = sinks_;
    params.window_left = window_left_;
    params.sm_scale = sm_scale_;
    params.v_scale = v_scale_;
    params.logits_soft_cap = soft_cap_;
  }

 private:
  const float* sinks_ = nullptr;
  int32_t window_left_ = -1;
  float soft_cap_ = 0.f, sm_scale_ = 0.f, v_scale_ = 1.f;
};

// How many pages a cache must have; -1 on a GPU, where the host does not look. A run looks again: the index tensors are
// the caller's, who may have changed them since the plan. `whole_lengths`: of requests, and not of their last pages.
inline int64_t check_pages(const char* op, const PageTable& table, int32_t page_size, bool is_cuda,
                           bool whole_lengths) {
  require_index(op, "indptr", table.indptr, -1);
  require(table.indptr.shape[0] >= 1, op, ": indptr is empty; expected [batch_size + 1]");
  require_index(op, "indices", table.indices, -1);
  require_index(op, whole_lengths ? "kv_lens" : "last_page_len", table.last_page_len, table.batch_size());
  if (is_cuda) return -1;
  check_offsets(op, "indptr", table.indptr, table.indices.shape[0]);
  const auto* offsets = static_cast<const int32_t*>(table.indptr.data);
  const auto* pages = static_cast<const int32_t*>(table.indices.data);
  const auto* lengths = static_cast<const int32_t*>(table.last_page_len.data);
  int64_t num_pages = 0;
  for (int32_t i = 0; i < table.batch_size(); ++i) {
    const int64_t held = int64_t(offsets[i + 1] - offsets[i]) * page_size;
    require(held < int64_t(1) << 31, op, ": request ", i, " has ", offsets[i + 1] - offsets[i], " pages of ", page_size,
            "; expected below 2^31 rows");
    if (whole_lengths)
      require(lengths[i] >= 0 && lengths[i] <= held, op, ": kv_lens[", i, "] is ", lengths[i], "; expected 0 to ",
              held);
    if (!whole_lengths && held > 0)
      require(lengths[i] >= 1 && lengths[i] <= page_size, op, ": last_page_len[", i, "] is ", lengths[i],
              "; expected 1 to ", page_size);
    const int64_t used = whole_lengths ? ceil_of(lengths[i], page_size) : offsets[i + 1] - offsets[i];
    for (int64_t j = 0; j < used; ++j) {
      require(pages[offsets[i] + j] >= 0, op, ": indices[", offsets[i] + j, "] is ", pages[offsets[i] + j],
              "; expected 0 or more");
      num_pages = std::max(num_pages, int64_t(pages[offsets[i] + j]) + 1);
    }
  }
  return num_pages;
}

inline void require_pages(const char* op, int64_t needed, const Tensor& cache) {
  require(cache.shape[0] >= needed, op, ": the cache has ", cache.shape[0],
          " pages; the planned page numbers go up to ", needed - 1);
}

inline void check_lse(const char* op, const Tensor& lse, int64_t num_tokens, int64_t num_heads) {
  if (!lse) return;
  require_shape(op, "lse", lse, {num_tokens, num_heads}, "[num_tokens, num_qo_heads]");
  require_dtype(op, "lse", lse, Dtype::kFp32);
  require(lse.is_contiguous(), op, ": lse is not contiguous");
}

// q [num_tokens, num_qo_heads, head_dim_qk] and out, of a plan.
inline void fill_rows(const char* op, AttentionParams& params, const AttentionShape& shape, const Tensor& q,
                      const Tensor& out, const Tensor& lse, int64_t num_tokens, bool is_cuda) {
  const int32_t dim_vo = shape.head_dim_vo;
  require_shape(op, "q", q, {num_tokens, shape.num_qo_heads, shape.head_dim_qk},
                "[num_tokens, num_qo_heads, head_dim]");
  require_shape(op, "out", out, {num_tokens, shape.num_qo_heads, dim_vo}, "[num_tokens, num_qo_heads, head_dim]");
  require_dtype(op, "q", q, shape.q_dtype);
  require_dtype(op, "out", out, shape.o_dtype);
  require_aligned_rows(op, "q", q, is_cuda);
  require_aligned_rows(op, "out", out, is_cuda);
  check_lse(op, lse, num_tokens, shape.num_qo_heads);
  params.q = q.data;
  params.out = out.data;
  params.lse = static_cast<float*>(lse.data);
  params.q_token_stride = q.stride[0];
  params.q_head_stride = q.stride[1];
  params.out_token_stride = out.stride[0];
  params.out_head_stride = out.stride[1];
  params.num_qo_heads = shape.num_qo_heads;
  params.num_kv_heads = shape.num_kv_heads;
}

// A cache of pages, against a plan.
inline void fill_pages(const char* op, KvParams& kv, const AttentionShape& shape, const PagedCache& cache,
                       const PageTable& table, bool is_cuda) {
  const Tensor &k = cache.k, &v = cache.v;
  constexpr const char* axes = "[num_pages, page_size, num_kv_heads, head_dim]";
  require_shape(op, "the k cache", k, {-1, shape.page_size, shape.num_kv_heads, shape.head_dim_qk}, axes);
  require_shape(op, "the v cache", v, {k.shape[0], shape.page_size, shape.num_kv_heads, shape.head_dim_vo}, axes);
  require_dtype(op, "the k cache", k, shape.kv_dtype);
  require_dtype(op, "the v cache", v, shape.kv_dtype);
  require_aligned_rows(op, "the k cache", k, is_cuda);
  require_aligned_rows(op, "the v cache", v, is_cuda);
  kv.k = k.data;
  kv.v = v.data;
  kv.index.indptr = static_cast<const int32_t*>(table.indptr.data);
  kv.index.last_page_len = static_cast<const int32_t*>(table.last_page_len.data);
  kv.index.indices = static_cast<const int32_t*>(table.indices.data);
  kv.index.page_size = FastDivisor::of(uint32_t(shape.page_size));
  kv.k_page_stride = k.stride[0], kv.k_entry_stride = k.stride[1], kv.k_head_stride = k.stride[2];
  kv.v_page_stride = v.stride[0], kv.v_entry_stride = v.stride[1], kv.v_head_stride = v.stride[2];
}

// Rows of keys and values [num_rows, num_kv_heads, head_dim]: pages of one row.
inline void fill_kv_rows(const char* op, KvParams& kv, const AttentionShape& shape, const Tensor& k, const Tensor& v,
                         bool is_cuda) {
  require_shape(op, "k", k, {-1, shape.num_kv_heads, shape.head_dim_qk}, "[num_rows, num_kv_heads, head_dim]");
  require_shape(op, "v", v, {k.shape[0], shape.num_kv_heads, shape.head_dim_vo}, "[num_rows, num_kv_heads, head_dim]");
  require(k.shape[0] >= 0 && k.shape[0] <= INT32_MAX, op, ": k is ", k.described(), "; expected 0 to 2^31 - 1 rows");
  require_dtype(op, "k", k, shape.kv_dtype);
  require_dtype(op, "v", v, shape.kv_dtype);
  require_aligned_rows(op, "k", k, is_cuda);
  require_aligned_rows(op, "v", v, is_cuda);
  kv.k = k.data;
  kv.v = v.data;
  kv.index.page_size = FastDivisor::of(1);
  kv.k_page_stride = k.stride[0], kv.k_head_stride = k.stride[1];
  kv.v_page_stride = v.stride[0], kv.v_head_stride = v.stride[1];
}

inline Request attention_request(const char* family, const AttentionShape& shape, const char* storage) {
  return Request(family)
      .with("q_dtype", shape.q_dtype)
      .with("kv_dtype", shape.kv_dtype)
      .with("o_dtype", shape.o_dtype)
      .with("head_dim_qk", shape.head_dim_qk)
      .with("head_dim_vo", shape.head_dim_vo)
      .with("kv_storage", storage);
}

inline int itemsize_of_type(const Kernel& kernel, const char* name) {
  const std::string& type = kernel.entry().types.at(name);
  return type == "fp32" ? 4 : type == "fp16" || type == "bf16" ? 2 : 1;
}

}  // namespace host
}  // namespace flashinfer
