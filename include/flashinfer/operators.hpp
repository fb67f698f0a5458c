// SPDX-License-Identifier: Apache-2.0
// What surrounds attention in a model: norms, rotary embeddings, appending to a paged cache, sampling.
//
// Each is one launch, on tensors of the kernels' device. Arguments are checked as in Python, values of index tensors on
// the CPU alone. On a GPU a row whose indices lead outside of the cache is not appended.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "flashinfer/kernels.hpp"

namespace flashinfer {

// A cache of pages: keys [num_pages, page_size, num_kv_heads, head_dim_qk], values [.., head_dim_vo], in any strides
// over dense rows. In layout HND, transposed(1, 2) of what lies in memory.
struct PagedCache {
  Tensor k, v;
};

// Which pages are whose: request i has pages indices[indptr[i]] to indices[indptr[i + 1] - 1], the last of which is
// filled up to last_page_len[i]. All int32.
struct PageTable {
  Tensor indptr;         // [batch_size + 1]
  Tensor indices;        // [>= indptr[batch_size]]
  Tensor last_page_len;  // [batch_size], 1 to page_size

  int32_t batch_size() const { return int32_t(indptr.shape[0]) - 1; }
};

namespace host {

// The same request with vectors of one size and of those below, which read the same memory in more loads.
inline std::vector<Request> with_vectors(const Request& request, int largest) {
  std::vector<Request> requests;
  for (int size = largest; size >= 1; size /= 2) requests.push_back(request.with("vec_size", size));
  return requests;
}

// One grouping of rows that holds in several tensors: row r starts at r / rows_per_group * group + r % rows_per_group *
// row. Of flashinfer/host/rows.py.
struct CommonRows {
  int64_t num_rows = 1, rows_per_group = 1;
  std::vector<std::pair<int64_t, int64_t>> strides;  // (row, group) of each tensor
};

inline CommonRows common_rows(const char* op, const std::vector<const Tensor*>& tensors) {
  struct Axis {
    int64_t size;
    std::vector<int64_t> strides;
  };
  CommonRows rows;
  std::vector<Axis> axes;
  const Tensor& first = *tensors[0];
  for (int32_t dim = 0; dim + 1 < first.rank; ++dim) {
    rows.num_rows *= first.shape[dim];
    if (first.shape[dim] == 1) continue;
    Axis axis = {first.shape[dim], {}};
    for (const Tensor* x : tensors) axis.strides.push_back(x->stride[dim]);
    bool merges = !axes.empty();
    for (size_t i = 0; merges && i < tensors.size(); ++i)
      merges = axes.back().strides[i] == axis.size * axis.strides[i];
    if (merges) {
      axes.back() = {axes.back().size * axis.size, axis.strides};
    } else {
      axes.push_back(axis);
    }
  }
  require(rows.num_rows < int64_t(1) << 31, op, ": ", rows.num_rows, " rows; expected fewer than 2^31");
  require(axes.size() <= 2, op, ": rows lie unevenly in memory, or differently in two tensors; expected two levels");
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (axes.size() == 2) rows.strides.emplace_back(axes[1].strides[i], axes[0].strides[i]);
    if (axes.size() < 2) rows.strides.emplace_back(0, axes.empty() ? 0 : axes[0].strides[i]);
  }
  if (axes.size() == 2) rows.rows_per_group = axes[1].size;
  return rows;
}

inline void normalize(const char* op, Kernels& kernels, const Tensor& input, const Tensor* residual,
                      const Tensor& weight, const Tensor& out, float eps, bool is_gemma, Stream stream) {
  require(input.rank >= 1, op, ": input has no axes; expected [..., hidden_size]");
  const int64_t hidden_size = input.shape[input.rank - 1];
  std::vector<const Tensor*> strided = {&input, &out};
  if (residual != nullptr) strided.push_back(residual);
  for (const Tensor* x : strided) {
    require_data(op, "a tensor", *x);
    require_dense_rows(op, "a tensor", *x);
    require(x->rank == input.rank && x->dtype == input.dtype && std::equal(x->shape, x->shape + x->rank, input.shape),
            op, ": a tensor is ", x->described(), "; expected ", input.described(), ", as the input");
  }
  require_shape(op, "weight", weight, {hidden_size}, "[hidden_size]");
  require_dtype(op, "weight", weight, input.dtype);
  require_dense_rows(op, "weight", weight);
  require(eps >= 0, op, ": eps is ", eps, "; expected 0 or more");
  require(residual == nullptr || residual->data != out.data, op,
          ": residual is the output; expected memory of its own");
  if (input.numel() == 0) return;

  const CommonRows rows = common_rows(op, strided);
  uint64_t alignment = 0;
  if (kernels.device().is_cuda()) {
    alignment = reinterpret_cast<uintptr_t>(weight.data);
    for (const Tensor* x : strided) alignment |= reinterpret_cast<uintptr_t>(x->data);
    for (const auto& [row, group] : rows.strides) alignment |= uint64_t((row | group) * itemsize_of(input.dtype));
  }
  const Request request = Request("rmsnorm")
                              .with("dtype", input.dtype)
                              .with("hidden_size", hidden_size)
                              .with("add_residual", residual != nullptr)
                              .with("gemma", is_gemma);
  const Kernel& kernel =
      kernels.find_first(with_vectors(request, vec_size(itemsize_of(input.dtype), hidden_size, alignment)));
  NormParams params{};
  params.input = input.data;
  params.residual = residual == nullptr ? nullptr : residual->data;
  params.weight = weight.data;
  params.output = out.data;
  std::tie(params.input_row_stride, params.input_group_stride) = rows.strides[0];
  std::tie(params.output_row_stride, params.output_group_stride) = rows.strides[1];
  if (residual != nullptr) std::tie(params.residual_row_stride, params.residual_group_stride) = rows.strides[2];
  params.num_rows = int32_t(rows.num_rows);
  params.rows_per_group = FastDivisor::of(uint32_t(rows.rows_per_group));
  params.eps = eps;
  kernel.launch({uint32_t(ceil_of(rows.num_rows, kernel.units_per_block()))}, params, stream);
}

// Every row that is no padding has a slot in a cache of so many pages. Of flashinfer/host/appending.py.
inline void check_slots(const char* op, const Tensor& batch_indices, const Tensor& positions, const PageTable& table,
                        int64_t num_pages, int64_t page_size) {
  check_offsets(op, "indptr", table.indptr, table.indices.shape[0]);
  for (int64_t row = 0; row < batch_indices.shape[0]; ++row) {
    const int64_t request = index_at(batch_indices, row), position = index_at(positions, row);
    if (request < 0 || position < 0) continue;
    require(request < table.batch_size(), op, ": batch_indices[", row, "] is ", request, "; expected below ",
            table.batch_size(), ", the requests of indptr, or -1 for a row of padding");
    const int64_t first = index_at(table.indptr, request), count = index_at(table.indptr, request + 1) - first;
    require(position / page_size < count, op, ": positions[", row, "] is ", position, "; request ", request, " has ",
            count, " pages of ", page_size);
    const int64_t page = index_at(table.indices, first + position / page_size);
    require(page < num_pages, op, ": indices[", first + position / page_size, "] is ", page, "; expected below ",
            num_pages, ", the pages of the cache (position ", position, " of request ", request, ")");
  }
}

inline HeadStrides head_strides(const Tensor& x) {
  return {x.stride[0], x.stride[1]};
}

inline CacheStrides cache_strides(const Tensor& x) {
  return {x.stride[0], x.stride[1], x.stride[2]};
}

}  // namespace host

// out[..., i] = input[..., i] / sqrt(mean(input²) + eps) * weight[i], or with Gemma's 1 + weight[i]. out may be input.
inline void rmsnorm(Kernels& kernels, const Tensor& input, const Tensor& weight, const Tensor& out, float eps = 1e-6f,
                    Stream stream = nullptr, bool is_gemma = false) {
  host::normalize("rmsnorm", kernels, input, nullptr, weight, out, eps, is_gemma, stream);
}

// residual += input, then input = rmsnorm(residual), in place.
inline void fused_add_rmsnorm(Kernels& kernels, const Tensor& input, const Tensor& residual, const Tensor& weight,
                              float eps = 1e-6f, Stream stream = nullptr, bool is_gemma = false) {
  host::normalize("fused_add_rmsnorm", kernels, input, &residual, weight, input, eps, is_gemma, stream);
}

// Rows [num_tokens, num_kv_heads, head_dim] of keys and values into their pages: token t is of request
// batch_indices[t], which has positions[t] tokens before it. A negative request, position or page is a row of padding;
// one past the requests, the request's pages or the cache an error on a CPU, before anything is written, and padding on
// a GPU. An fp8 cache holds key / k_scale and value / v_scale of rows in higher precision.
inline void append(Kernels& kernels, const Tensor& key, const Tensor& value, const Tensor& batch_indices,
                   const Tensor& positions, const PagedCache& cache, const PageTable& table, Stream stream = nullptr,
                   float k_scale = 1.f, float v_scale = 1.f) {
  using namespace host;
  constexpr const char* op = "append";
  const Tensor* rows[] = {&key, &value};
  const Tensor* pages[] = {&cache.k, &cache.v};
  for (int i = 0; i < 2; ++i) {
    const Tensor &x = *rows[i], &pool = *pages[i];
    require_shape(op, i == 0 ? "key" : "value", x, {key.shape[0], key.shape[1], -1},
                  "[num_tokens, num_kv_heads, head_dim]");
    require_shape(op, i == 0 ? "the k cache" : "the v cache", pool,
                  {cache.k.shape[0], cache.k.shape[1], key.shape[1], x.rank == 3 ? x.shape[2] : -1},
                  "[num_pages, page_size, num_kv_heads, head_dim]");
    require_dtype(op, i == 0 ? "key" : "value", x, key.dtype);
    require_dtype(op, "the v cache", pool, cache.k.dtype);
    for (const Tensor* one : {&x, &pool}) {
      require_data(op, "a tensor", *one);
      require_dense_rows(op, "a tensor", *one);
    }
  }
  const int64_t num_tokens = key.shape[0], num_heads = key.shape[1], key_dim = key.shape[2], value_dim = value.shape[2];
  require(cache.k.shape[1] > 0, op, ": pages have no entries; expected a page_size of at least 1");
  const bool converts = key.dtype != cache.k.dtype;
  require(!converts || (itemsize_of(key.dtype) > 1 && itemsize_of(cache.k.dtype) == 1), op, ": rows are ",
          name_of(key.dtype), " and the cache ", name_of(cache.k.dtype), "; expected the same dtype, or an fp8 cache");
  require(converts || (k_scale == 1.f && v_scale == 1.f), op, ": a scale is given and nothing is converted");
  require(k_scale > 0 && v_scale > 0, op, ": a scale is not positive");
  require_index(op, "batch_indices", batch_indices, num_tokens, false);
  require_index(op, "positions", positions, num_tokens, false);
  require_dtype(op, "positions", positions, batch_indices.dtype);
  require_index(op, "indices", table.indices, -1, false);
  require_index(op, "indptr", table.indptr, -1, false);
  require_dtype(op, "indptr", table.indptr, table.indices.dtype);
  require(table.indptr.shape[0] >= 1, op, ": indptr is empty; expected [batch_size + 1]");
  const bool is_cuda = kernels.device().is_cuda();
  if (!is_cuda) check_slots(op, batch_indices, positions, table, cache.k.shape[0], cache.k.shape[1]);
  if (num_tokens == 0 || cache.k.numel() == 0 || table.batch_size() == 0) return;

  const int64_t length = std::gcd(key_dim, value_dim);
  const int vec = std::min(vec_size(itemsize_of(key.dtype), length, alignment_of(key) | alignment_of(value)),
                           vec_size(itemsize_of(cache.k.dtype), length, alignment_of(cache.k) | alignment_of(cache.v)));
  const Request request = Request("append_paged_kv")
                              .with("dtype", key.dtype)
                              .with("cache_dtype", cache.k.dtype)
                              .with("key_dim", key_dim)
                              .with("value_dim", value_dim)
                              .with("token_index", batch_indices.dtype)
                              .with("page_index", table.indices.dtype);
  std::vector<Request> requests;
  for (int heads : {4, 2, 1})  // a thread takes several, where there are as many
    if (heads == 1 || (is_cuda && num_heads >= heads))
      for (const Request& one : with_vectors(request.with("heads_per_thread", heads), is_cuda ? vec : 1))
        requests.push_back(one);
  const Kernel& kernel = kernels.find_first(requests);
  AppendParams params{};
  params.key = key.data;
  params.value = value.data;
  params.key_cache = cache.k.data;
  params.value_cache = cache.v.data;
  params.slots = {batch_indices.data, positions.data, table.indices.data, table.indptr.data};
  params.key_scale = {nullptr, k_scale, 0};
  params.value_scale = {nullptr, v_scale, 0};
  params.bounds = {table.batch_size(), int32_t(table.indices.shape[0]), int32_t(cache.k.shape[0]),
                   int32_t(cache.k.shape[1])};
  params.key_strides = head_strides(key);
  params.value_strides = head_strides(value);
  params.key_cache_strides = cache_strides(cache.k);
  params.value_cache_strides = cache_strides(cache.v);
  params.num_tokens = int32_t(num_tokens);
  params.num_heads = int32_t(num_heads);
  const int64_t num_groups = num_tokens * ceil_of(num_heads, is_cuda ? kernel.number("kHeadsPerThread") : 1);
  kernel.launch({uint32_t(ceil_of(num_groups, kernel.units_per_block()))}, params, stream);
}

struct RopeOptions {
  int rotary_dim = 0;       // of a head's first dimensions that are turned; 0: all
  bool interleave = false;  // pairs are neighbours, as in GPT-J, and not halves apart, as in Llama
  double scale = 1.0, theta = 1e4;
  // As in Llama 3.1, where old_context_len > 0.
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  int64_t old_context_len = 0;
};

// q, k [num_tokens, num_heads, head_dim] turned by their positions [num_tokens]; q_out, k_out may be q and k.
inline void rope(Kernels& kernels, const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& q_out,
                 const Tensor& k_out, const RopeOptions& options = {}, Stream stream = nullptr) {
  using namespace host;
  constexpr const char* op = "rope";
  for (const Tensor* x : {&q, &k, &q_out, &k_out}) {
    require_shape(op, "a tensor", *x, {q.shape[0], x == &q_out || x == &q ? q.shape[1] : k.shape[1], q.shape[2]},
                  "[num_tokens, num_heads, head_dim]");
    require_dtype(op, "a tensor", *x, q.dtype);
    require_data(op, "a tensor", *x);
    require_dense_rows(op, "a tensor", *x);
  }
  require_index(op, "positions", positions, q.shape[0], false);
  const int64_t head_dim = q.shape[2], rotary_dim = options.rotary_dim == 0 ? head_dim : options.rotary_dim;
  require(rotary_dim > 0 && rotary_dim % 4 == 0 && rotary_dim <= std::min<int64_t>(head_dim, kMaxRotaryDim), op,
          ": rotary_dim is ", rotary_dim, "; expected a multiple of 4, at most ",
          std::min<int64_t>(head_dim, kMaxRotaryDim));
  require(options.scale > 0 && options.theta > 0, op, ": scale or theta is not positive");
  require(options.old_context_len == 0 || options.high_freq_factor > options.low_freq_factor, op,
          ": high_freq_factor is ", options.high_freq_factor, "; expected more than low_freq_factor");
  if (q.numel() + k.numel() == 0) return;

  const bool is_cuda = kernels.device().is_cuda(), is_in_place = q.data == q_out.data && k.data == k_out.data;
  const bool rotary_part_only = is_in_place && rotary_dim != head_dim;
  int vec = 1;
  if (is_cuda) {
    uint64_t alignment = 0;
    for (const Tensor* x : {&q, &k, &q_out, &k_out}) alignment |= alignment_of(*x);
    const int64_t length = std::gcd(rotary_dim / 2, rotary_part_only ? rotary_dim / 2 : head_dim / 2);
    vec = vec_size(itemsize_of(q.dtype), length, alignment);
    require(!options.interleave || vec >= 2, op, ": q or k has an odd stride, which interleave does not allow");
  }
  const Request request = Request("rope")
                              .with("dtype", q.dtype)
                              .with("head_dim", head_dim)
                              .with("rotary_dim", rotary_dim)
                              .with("interleave", options.interleave)
                              .with("cos_sin", "computed")
                              .with("position_index", positions.dtype)
                              .with("ragged", false)
                              .with("rotary_part_only", rotary_part_only);
  std::vector<Request> requests = with_vectors(request, vec);
  if (options.interleave && is_cuda) requests.pop_back();
  const Kernel& kernel = kernels.find_first(requests);
  RopeParams params{};
  params.q = q.data;
  params.k = k.data;
  params.q_out = q_out.data;
  params.k_out = k_out.data;
  params.rotation.positions = positions.data;
  for (int64_t i = 0; i < rotary_dim / 2; ++i) {  // as frequency_table in flashinfer/families/rope.py
    double turns = std::pow(options.theta, -2.0 * double(i) / double(rotary_dim)) / (2.0 * 3.141592653589793);
    double kept = 0.0;
    if (options.old_context_len > 0) {
      kept = (double(options.old_context_len) * turns - options.low_freq_factor) /
             (options.high_freq_factor - options.low_freq_factor);
      kept = std::min(1.0, std::max(0.0, kept));
    }
    turns *= (1.0 - kept) / options.scale + kept;
    require(std::isfinite(turns), op, ": theta is ", options.theta, ", scale ", options.scale,
            "; frequencies overflow");
    params.setup.frequencies[i] = uint64_t(std::ldexp(turns - std::floor(turns), 64));
  }
  params.q_strides = head_strides(q);
  params.k_strides = head_strides(k);
  params.q_out_strides = head_strides(q_out);
  params.k_out_strides = head_strides(k_out);
  params.num_tokens = int32_t(q.shape[0]);
  params.num_qo_heads = int32_t(q.shape[1]);
  params.num_kv_heads = int32_t(k.shape[1]);
  const int64_t per_thread = kernel.number("kHeadsPerThread");
  const int64_t num_groups = q.shape[0] * (ceil_of(q.shape[1], per_thread) + ceil_of(k.shape[1], per_thread));
  kernel.launch({uint32_t(ceil_of(num_groups, kernel.units_per_block()))}, params, stream);
}

struct SampleOptions {
  bool are_logits = false;  // rows of logits, softmax of which is drawn from, not of probabilities
  int32_t top_k = 0;        // 0: all
  float top_p = 1.f, min_p = 0.f;
  bool top_k_first = false;  // top-p acts on what top-k leaves
  // One state of Philox for all rows: draws of the same seed and offset are the same. An offset counts 32-bit words;
  // a call takes 8.
  uint64_t seed = 0, offset = 0;
  Tensor row_indices;  // int32 or int64: of each token the row that it is drawn from; none: each row in order
};

// A token of each row [num_rows, vocab_size], int32 [num_rows]. On a CPU row_indices are checked.
inline void sample(Kernels& kernels, const Tensor& rows, const Tensor& token_ids, const SampleOptions& options,
                   Stream stream = nullptr) {
  using namespace host;
  constexpr const char* op = "sample";
  require_shape(op, "rows", rows, {-1, -1}, "[num_rows, vocab_size]");
  require(itemsize_of(rows.dtype) > 1 && rows.dtype <= Dtype::kBf16, op, ": rows are ", rows.described(),
          "; expected fp32, fp16 or bf16");
  require_data(op, "rows", rows);
  require_dense_rows(op, "rows", rows);
  const Tensor& indices = options.row_indices;
  if (indices) require_index(op, "row_indices", indices, -1, false);
  const int64_t num_rows = indices ? indices.shape[0] : rows.shape[0], vocab_size = rows.shape[1];
  require_index(op, "token_ids", token_ids, num_rows);
  require(rows.shape[0] > 0 || num_rows == 0, op, ": row_indices name rows of an empty tensor");
  require(vocab_size >= 1 && vocab_size <= 1 << 24 && num_rows <= 1 << 28, op, ": rows are ", rows.described(),
          "; expected 1 to 2^24 tokens, and at most 2^28 rows");
  require(options.top_k >= 0 && options.top_p >= 0.f && options.top_p <= 1.f && options.min_p >= 0.f &&
              options.min_p <= 1.f,
          op, ": top_k is ", options.top_k, ", top_p ", options.top_p, ", min_p ", options.min_p,
          "; expected top_k of 0 or more, the others of 0 to 1");
  const bool has_k = options.top_k > 0, has_p = options.top_p < 1.f, has_min = options.min_p > 0.f;
  require(!has_min || !(has_k || has_p || options.are_logits), op,
          ": min_p beside another filter, or of logits; expected it alone, of probabilities");
  // Logits have one filter for both, which a value that limits nothing turns off.
  const char* filter = has_min                                                        ? "min_p"
                       : (has_k && has_p) || (options.are_logits && (has_k || has_p)) ? "top_k_top_p"
                       : has_k                                                        ? "top_k"
                       : has_p                                                        ? "top_p"
                                                                                      : "none";
  if (num_rows == 0) return;
  if (indices && !kernels.device().is_cuda()) {
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = index_at(indices, i);
      require(row >= 0 && row < rows.shape[0], op, ": row_indices[", i, "] is ", row, "; expected 0 to ",
              rows.shape[0] - 1);
    }
  }

  // Any placement of a row draws the same; one is fastest. As many blocks as fill the device while rows are few, each
  // with its part of the row in shared memory, where the set has such a kernel.
  const bool is_cuda = kernels.device().is_cuda(), keeps_row = std::strcmp(filter, "none") != 0;
  const Request request = Request("sample_row")
                              .with("dtype", rows.dtype)
                              .with("input", options.are_logits ? "logits" : "probs")
                              .with("filter", filter);
  struct Place {
    double cost;
    int cluster_size, row_kib;
  };
  std::vector<Place> places;
  const int64_t row_bytes = vocab_size * itemsize_of(rows.dtype) + 32, slot_bytes = 256 * 16;
  for (int cluster : {1, 2, 4, 8}) {
    if (!is_cuda && cluster > 1) break;
    const int64_t block_kib = ceil_of(row_bytes, slot_bytes * cluster) * slot_bytes / 1024;
    int wanted = 1;
    while (wanted < 8 && wanted * slot_bytes < row_bytes &&
           (wanted * num_rows < 3 * kernels.device().num_sms() ||
            (keeps_row && ceil_of(row_bytes, slot_bytes * wanted) * slot_bytes / 1024 > 64)))
      wanted *= 2;
    const double off = std::abs(std::log2(double(cluster) / wanted));
    for (int kib : {8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 208})
      if (is_cuda && keeps_row && kib >= block_kib) places.push_back({off + kib / 1024.0, cluster, kib});
    places.push_back({off + (keeps_row ? 0.25 : 0.0), cluster, 0});
  }
  std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.cost < b.cost; });
  std::vector<Request> requests;
  for (const Place& place : places)
    requests.push_back(request.with("cluster_size", place.cluster_size).with("row_kib", place.row_kib));
  const Kernel& kernel = kernels.find_first(requests);
  SampleParams params{};
  params.input = rows.data;
  params.token_ids = static_cast<int32_t*>(token_ids.data);
  params.random.seed = options.seed;
  params.random.offset = options.offset;
  params.top_k_value = has_k ? options.top_k : 0x7FFFFFFF;
  params.top_p_value = options.top_p;
  params.min_p_value = options.min_p;
  params.row_indices = indices.data;
  params.row_indices_are_int64 = indices.dtype == Dtype::kInt64;
  params.num_inputs = rows.shape[0];
  params.input_stride = rows.stride[0];
  params.num_rows = int32_t(num_rows);
  params.vocab_size = int32_t(vocab_size);
  params.top_k_first = options.top_k_first;
  kernel.launch({uint32_t(num_rows) * uint32_t(kernel.entry().cluster_size)}, params, stream);
}

// Of probabilities, among the likeliest tokens whose sum reaches top_p.
inline void top_p_sample(Kernels& kernels, const Tensor& probs, const Tensor& token_ids, float top_p, uint64_t seed,
                         uint64_t offset, Stream stream = nullptr) {
  SampleOptions options;
  options.top_p = top_p;
  options.seed = seed;
  options.offset = offset;
  sample(kernels, probs, token_ids, options, stream);
}

}  // namespace flashinfer
