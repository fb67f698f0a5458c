// SPDX-License-Identifier: Apache-2.0
// The C interface: each function calls what flashinfer.hpp has, and turns exceptions into a status.
#include <exception>
#include <sstream>
#include <string>
#include <vector>

#include "flashinfer/flashinfer.h"
#include "flashinfer/flashinfer.hpp"
#include "flashinfer/jit.hpp"

struct flashinfer_kernels : flashinfer::Kernels {
  using Kernels::Kernels;
};
struct flashinfer_batch_decode : flashinfer::BatchDecode {
  using BatchDecode::BatchDecode;
};
struct flashinfer_batch_prefill : flashinfer::BatchPrefill {
  using BatchPrefill::BatchPrefill;
};
struct flashinfer_mla : flashinfer::Mla {
  using Mla::Mla;
};

namespace {

using namespace flashinfer;

thread_local std::string last_error;

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return FLASHINFER_OK;
  } catch (const KernelMissing& error) {
    last_error = error.what();
    return FLASHINFER_KERNEL_MISSING;
  } catch (const std::exception& error) {
    last_error = error.what();
    return FLASHINFER_ERROR;
  }
}

Dtype dtype_of(int32_t number) {
  host::require(number >= 0 && number <= FLASHINFER_INT64, "dtype ", number, " is unknown; expected 0 to ",
                int(FLASHINFER_INT64));
  return Dtype(number);
}

Tensor optional(const flashinfer_tensor* given) {
  Tensor x;
  if (given == nullptr) return x;
  host::require(given->rank >= 0 && given->rank <= Tensor::kMaxRank, "rank is ", given->rank, "; expected 0 to 5");
  x.data = given->data;
  x.dtype = dtype_of(given->dtype);
  x.rank = given->rank;
  std::copy(given->shape, given->shape + x.rank, x.shape);
  for (int32_t axis = 0; axis < x.rank; ++axis)
    host::require(x.shape[axis] >= 0, "a tensor is ", x.described(), "; expected sizes of 0 or more");
  std::copy(given->stride, given->stride + x.rank, x.stride);
  return x;
}

Tensor of(const flashinfer_tensor* given) {
  host::require(given != nullptr, "a tensor is null; expected all but those that may be left out");
  return optional(given);
}

template <class T>
const T& present(const T* given) {
  host::require(given != nullptr, "an argument is null");
  return *given;
}

// Makes one for the caller, who is looked at first.
template <class T, class... Args>
void make(T** made, Args&&... args) {
  host::require(made != nullptr, "where the object is to be put is null");
  *made = new T(std::forward<Args>(args)...);
}

// An object of the caller's.
template <class T>
T& object(T* given) {
  host::require(given != nullptr, "an object is null; expected one that was opened or made");
  return *given;
}

PageTable of(const flashinfer_page_table* table) {
  present(table);
  return {of(&table->indptr), of(&table->indices), of(&table->last_page_len)};
}

Workspace of(const flashinfer_workspace* workspace) {
  const auto& given = present(workspace);
  return {given.ints, given.int_bytes, given.floats, given.float_bytes};
}

AttentionShape of(const flashinfer_attention_shape* shape) {
  const auto& given = present(shape);
  return {given.num_qo_heads, given.num_kv_heads,      given.head_dim_qk,        given.head_dim_vo,
          given.page_size,    dtype_of(given.q_dtype), dtype_of(given.kv_dtype), dtype_of(given.o_dtype)};
}

AttentionOptions of(const flashinfer_attention_options* options) {
  if (options == nullptr) return {};
  AttentionOptions read;
  read.is_causal = options->is_causal != 0;
  read.sm_scale = options->sm_scale;
  read.window_left = options->window_left;
  read.logits_soft_cap = options->logits_soft_cap;
  read.sinks = options->sinks;
  read.q_scale = options->q_scale;
  read.k_scale = options->k_scale;
  read.v_scale = options->v_scale;
  return read;
}

}  // namespace

extern "C" {

const char* flashinfer_last_error(void) {
  return last_error.c_str();
}

flashinfer_tensor flashinfer_tensor_of(void* data, int32_t dtype, int32_t rank, const int64_t* shape) {
  flashinfer_tensor x = {data, dtype, rank, {}, {}};
  if (shape == nullptr && rank > 0) x.rank = -1;  // which functions refuse
  if (shape == nullptr) return x;
  int64_t dense = 1;
  for (int32_t axis = rank < 5 ? rank - 1 : 4; axis >= 0; --axis) {
    x.shape[axis] = shape[axis];
    x.stride[axis] = dense;
    dense *= shape[axis];
  }
  return x;
}

int flashinfer_kernels_open(const char* roots, int device, flashinfer_kernels** opened) {
  return flashinfer_kernels_open_jit(roots, device, nullptr, opened);
}

int flashinfer_kernels_open_jit(const char* roots, int device, const char* recipes, flashinfer_kernels** opened) {
  return guarded([&] {
    std::vector<std::string> folders;
    std::istringstream paths(roots == nullptr ? "" : roots);
    for (std::string path; std::getline(paths, path, ':');)
      if (!path.empty()) folders.push_back(path);
    JitOptions how;
    if (recipes != nullptr) how.recipes = recipes;
    make(opened, device == FLASHINFER_CPU ? Device::cpu() : Device::cuda(device), folders,
         recipes == nullptr ? nullptr : jit(how));
  });
}

void flashinfer_kernels_close(flashinfer_kernels* kernels) {
  delete kernels;
}

const char* flashinfer_kernels_target(const flashinfer_kernels* kernels) {
  return kernels == nullptr ? nullptr : kernels->device().target().c_str();
}

int flashinfer_synchronize(const flashinfer_kernels* kernels, void* stream) {
  return guarded([&] { present(kernels).device().synchronize(stream); });
}

int flashinfer_rmsnorm(flashinfer_kernels* kernels, const flashinfer_tensor* input, const flashinfer_tensor* weight,
                       const flashinfer_tensor* out, float eps, int is_gemma, void* stream) {
  return guarded([&] { rmsnorm(object(kernels), of(input), of(weight), of(out), eps, stream, is_gemma != 0); });
}

int flashinfer_fused_add_rmsnorm(flashinfer_kernels* kernels, const flashinfer_tensor* input,
                                 const flashinfer_tensor* residual, const flashinfer_tensor* weight, float eps,
                                 int is_gemma, void* stream) {
  return guarded(
      [&] { fused_add_rmsnorm(object(kernels), of(input), of(residual), of(weight), eps, stream, is_gemma != 0); });
}

int flashinfer_append(flashinfer_kernels* kernels, const flashinfer_tensor* key, const flashinfer_tensor* value,
                      const flashinfer_tensor* batch_indices, const flashinfer_tensor* positions,
                      const flashinfer_tensor* k_cache, const flashinfer_tensor* v_cache,
                      const flashinfer_page_table* table, float k_scale, float v_scale, void* stream) {
  return guarded([&] {
    append(object(kernels), of(key), of(value), of(batch_indices), of(positions), {of(k_cache), of(v_cache)}, of(table),
           stream, k_scale, v_scale);
  });
}

int flashinfer_rope(flashinfer_kernels* kernels, const flashinfer_tensor* q, const flashinfer_tensor* k,
                    const flashinfer_tensor* positions, const flashinfer_tensor* q_out, const flashinfer_tensor* k_out,
                    const flashinfer_rope_options* options, void* stream) {
  return guarded([&] {
    RopeOptions read;
    if (options != nullptr)
      read = {options->rotary_dim,      options->interleave != 0,  options->scale,          options->theta,
              options->low_freq_factor, options->high_freq_factor, options->old_context_len};
    rope(object(kernels), of(q), of(k), of(positions), of(q_out), of(k_out), read, stream);
  });
}

int flashinfer_sample(flashinfer_kernels* kernels, const flashinfer_tensor* rows, const flashinfer_tensor* token_ids,
                      const flashinfer_sample_options* options, void* stream) {
  return guarded([&] {
    const auto& given = present(options);
    const SampleOptions read = {given.are_logits != 0,  given.top_k, given.top_p,  given.min_p,
                                given.top_k_first != 0, given.seed,  given.offset, optional(given.row_indices)};
    sample(object(kernels), of(rows), of(token_ids), read, stream);
  });
}

int flashinfer_single_decode(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                             const flashinfer_tensor* q, const flashinfer_tensor* k, const flashinfer_tensor* v,
                             const flashinfer_tensor* out, const flashinfer_attention_options* options, void* stream) {
  return guarded(
      [&] { single_decode(object(kernels), of(workspace), of(q), of(k), of(v), of(out), of(options), stream); });
}

int flashinfer_single_prefill(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                              const flashinfer_tensor* q, const flashinfer_tensor* k, const flashinfer_tensor* v,
                              const flashinfer_tensor* out, const flashinfer_attention_options* options, void* stream) {
  return guarded(
      [&] { single_prefill(object(kernels), of(workspace), of(q), of(k), of(v), of(out), of(options), stream); });
}

int flashinfer_batch_decode_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                flashinfer_batch_decode** made) {
  return guarded([&] { make(made, object(kernels), of(workspace)); });
}

void flashinfer_batch_decode_free(flashinfer_batch_decode* decode) {
  delete decode;
}

int flashinfer_batch_decode_plan(flashinfer_batch_decode* decode, const flashinfer_page_table* table,
                                 const flashinfer_attention_shape* shape, const flashinfer_attention_options* options,
                                 void* stream) {
  return guarded([&] { object(decode).plan(of(table), of(shape), of(options), stream); });
}

int flashinfer_batch_decode_run(flashinfer_batch_decode* decode, const flashinfer_tensor* q,
                                const flashinfer_tensor* k_cache, const flashinfer_tensor* v_cache,
                                const flashinfer_tensor* out, const flashinfer_tensor* lse, void* stream) {
  return guarded([&] { object(decode).run(of(q), {of(k_cache), of(v_cache)}, of(out), optional(lse), stream); });
}

int flashinfer_batch_prefill_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                 flashinfer_batch_prefill** made) {
  return guarded([&] { make(made, object(kernels), of(workspace)); });
}

void flashinfer_batch_prefill_free(flashinfer_batch_prefill* prefill) {
  delete prefill;
}

int flashinfer_batch_prefill_plan(flashinfer_batch_prefill* prefill, const flashinfer_tensor* qo_indptr,
                                  int64_t num_tokens, const flashinfer_page_table* table,
                                  const flashinfer_attention_shape* shape, const flashinfer_attention_options* options,
                                  void* stream) {
  return guarded([&] { object(prefill).plan(of(qo_indptr), num_tokens, of(table), of(shape), of(options), stream); });
}

int flashinfer_batch_prefill_run(flashinfer_batch_prefill* prefill, const flashinfer_tensor* q,
                                 const flashinfer_tensor* k_cache, const flashinfer_tensor* v_cache,
                                 const flashinfer_tensor* out, const flashinfer_tensor* lse, void* stream) {
  return guarded([&] { object(prefill).run(of(q), {of(k_cache), of(v_cache)}, of(out), optional(lse), stream); });
}

int flashinfer_batch_prefill_plan_ragged(flashinfer_batch_prefill* prefill, const flashinfer_tensor* qo_indptr,
                                         int64_t num_tokens, const flashinfer_tensor* kv_indptr,
                                         const flashinfer_attention_shape* shape,
                                         const flashinfer_attention_options* options, void* stream) {
  return guarded(
      [&] { object(prefill).plan_ragged(of(qo_indptr), num_tokens, of(kv_indptr), of(shape), of(options), stream); });
}

int flashinfer_batch_prefill_run_ragged(flashinfer_batch_prefill* prefill, const flashinfer_tensor* q,
                                        const flashinfer_tensor* k, const flashinfer_tensor* v,
                                        const flashinfer_tensor* out, const flashinfer_tensor* lse, void* stream) {
  return guarded([&] { object(prefill).run_ragged(of(q), of(k), of(v), of(out), optional(lse), stream); });
}

int flashinfer_mla_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace, flashinfer_mla** made) {
  return guarded([&] { make(made, object(kernels), of(workspace)); });
}

void flashinfer_mla_free(flashinfer_mla* mla) {
  delete mla;
}

int flashinfer_mla_plan(flashinfer_mla* mla, const flashinfer_tensor* qo_indptr, int64_t num_tokens,
                        const flashinfer_page_table* table, const flashinfer_mla_shape* shape, int is_causal,
                        double sm_scale, double kv_scale, void* stream) {
  return guarded([&] {
    const auto& given = present(shape);
    const MlaShape read = {given.num_heads, given.head_dim_ckv,      given.head_dim_kpe,
                           given.page_size, dtype_of(given.q_dtype), dtype_of(given.kv_dtype)};
    object(mla).plan(of(qo_indptr), num_tokens, of(table), read, {is_causal != 0, sm_scale, kv_scale}, stream);
  });
}

int flashinfer_mla_run(flashinfer_mla* mla, const flashinfer_tensor* q_nope, const flashinfer_tensor* q_pe,
                       const flashinfer_tensor* ckv, const flashinfer_tensor* kpe, const flashinfer_tensor* out,
                       const flashinfer_tensor* lse, void* stream) {
  return guarded([&] { object(mla).run(of(q_nope), of(q_pe), of(ckv), of(kpe), of(out), optional(lse), stream); });
}

}  // extern "C"
