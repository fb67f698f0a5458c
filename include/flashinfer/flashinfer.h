/* SPDX-License-Identifier: Apache-2.0 */
/* Precompiled kernels from C, and from whatever calls C: the same as flashinfer.hpp, from the library flashinfer_c that
 * CMake builds of cpp/c_api.cpp. docs/cpp.md.
 *
 * A function returns FLASHINFER_OK, or an error whose text flashinfer_last_error() has. Tensors, index tensors and
 * workspaces are the caller's, in the memory of the device; a stream is a CUstream or cudaStream_t, null the default.
 * What a plan was given has to stay where it is until its last run has ended. A tensor that may be left out may be
 * null.
 */
#ifndef FLASHINFER_H_
#define FLASHINFER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLASHINFER_API __attribute__((visibility("default")))
#define FLASHINFER_CPU (-1) /* in the place of the number of a GPU */

enum flashinfer_status {
  FLASHINFER_OK = 0,
  FLASHINFER_ERROR = 1,         /* an argument, a registry, a device */
  FLASHINFER_KERNEL_MISSING = 2 /* no registry has the kernel: the text ends with the rows for a config */
};

enum flashinfer_dtype {
  FLASHINFER_FP32 = 0,
  FLASHINFER_FP16 = 1,
  FLASHINFER_BF16 = 2,
  FLASHINFER_FP8_E4M3 = 3,
  FLASHINFER_FP8_E5M2 = 4,
  FLASHINFER_INT32 = 5,
  FLASHINFER_INT64 = 6
};

typedef struct {
  void* data;
  int32_t dtype, rank;
  int64_t shape[5], stride[5]; /* of elements */
} flashinfer_tensor;

typedef struct {
  flashinfer_tensor indptr, indices, last_page_len; /* int32 [batch_size + 1], pages, [batch_size] */
} flashinfer_page_table;

typedef struct {
  void* ints;
  size_t int_bytes;
  void* floats;
  size_t float_bytes;
} flashinfer_workspace;

typedef struct {
  int32_t num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size;
  int32_t q_dtype, kv_dtype, o_dtype;
} flashinfer_attention_shape;

typedef struct { /* of all zeros, but for window_left -1 and the last three 1: nothing special */
  int32_t is_causal;
  double sm_scale; /* 0: 1 / sqrt(head_dim_qk) */
  int64_t window_left;
  double logits_soft_cap;
  const float* sinks;
  double q_scale, k_scale, v_scale;
} flashinfer_attention_options;

typedef struct {
  int32_t num_heads, head_dim_ckv, head_dim_kpe, page_size, q_dtype, kv_dtype;
} flashinfer_mla_shape;

typedef struct {
  int32_t rotary_dim, interleave; /* 0: all of a head, in halves */
  double scale, theta, low_freq_factor, high_freq_factor;
  int64_t old_context_len; /* 0: not as in Llama 3.1 */
} flashinfer_rope_options;

typedef struct {
  int32_t are_logits, top_k; /* top_k 0: all */
  float top_p, min_p;
  int32_t top_k_first;
  uint64_t seed, offset;
  const flashinfer_tensor* row_indices; /* null: each row in order */
} flashinfer_sample_options;

typedef struct flashinfer_kernels flashinfer_kernels;
typedef struct flashinfer_batch_decode flashinfer_batch_decode;
typedef struct flashinfer_batch_prefill flashinfer_batch_prefill;
typedef struct flashinfer_mla flashinfer_mla;

/* Of the last error of this thread. */
FLASHINFER_API const char* flashinfer_last_error(void);

/* A contiguous one. */
FLASHINFER_API flashinfer_tensor flashinfer_tensor_of(void* data, int32_t dtype, int32_t rank, const int64_t* shape);

/* roots: folders with a registry.json, parted by ':', null: those of FLASHINFER_AOT_PATH. device: of a GPU its number.
 */
FLASHINFER_API int flashinfer_kernels_open(const char* roots, int device, flashinfer_kernels** opened);
/* The same, where NVRTC compiles what no set holds: recipes is the file of `flashinfer aot recipes`. Each compile is
 * told in a line on stderr. */
FLASHINFER_API int flashinfer_kernels_open_jit(const char* roots, int device, const char* recipes,
                                               flashinfer_kernels** opened);
FLASHINFER_API void flashinfer_kernels_close(flashinfer_kernels* kernels);
FLASHINFER_API const char* flashinfer_kernels_target(const flashinfer_kernels* kernels); /* null of null */
FLASHINFER_API int flashinfer_synchronize(const flashinfer_kernels* kernels, void* stream);

FLASHINFER_API int flashinfer_rmsnorm(flashinfer_kernels* kernels, const flashinfer_tensor* input,
                                      const flashinfer_tensor* weight, const flashinfer_tensor* out, float eps,
                                      int is_gemma, void* stream);
FLASHINFER_API int flashinfer_fused_add_rmsnorm(flashinfer_kernels* kernels, const flashinfer_tensor* input,
                                                const flashinfer_tensor* residual, const flashinfer_tensor* weight,
                                                float eps, int is_gemma, void* stream);
FLASHINFER_API int flashinfer_append(flashinfer_kernels* kernels, const flashinfer_tensor* key,
                                     const flashinfer_tensor* value, const flashinfer_tensor* batch_indices,
                                     const flashinfer_tensor* positions, const flashinfer_tensor* k_cache,
                                     const flashinfer_tensor* v_cache, const flashinfer_page_table* table,
                                     float k_scale, float v_scale, void* stream);
FLASHINFER_API int flashinfer_rope(flashinfer_kernels* kernels, const flashinfer_tensor* q, const flashinfer_tensor* k,
                                   const flashinfer_tensor* positions, const flashinfer_tensor* q_out,
                                   const flashinfer_tensor* k_out, const flashinfer_rope_options* options,
                                   void* stream);
FLASHINFER_API int flashinfer_sample(flashinfer_kernels* kernels, const flashinfer_tensor* rows,
                                     const flashinfer_tensor* token_ids, const flashinfer_sample_options* options,
                                     void* stream);

FLASHINFER_API int flashinfer_single_decode(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                            const flashinfer_tensor* q, const flashinfer_tensor* k,
                                            const flashinfer_tensor* v, const flashinfer_tensor* out,
                                            const flashinfer_attention_options* options, void* stream);
FLASHINFER_API int flashinfer_single_prefill(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                             const flashinfer_tensor* q, const flashinfer_tensor* k,
                                             const flashinfer_tensor* v, const flashinfer_tensor* out,
                                             const flashinfer_attention_options* options, void* stream);

FLASHINFER_API int flashinfer_batch_decode_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                               flashinfer_batch_decode** made);
FLASHINFER_API void flashinfer_batch_decode_free(flashinfer_batch_decode* decode);
FLASHINFER_API int flashinfer_batch_decode_plan(flashinfer_batch_decode* decode, const flashinfer_page_table* table,
                                                const flashinfer_attention_shape* shape,
                                                const flashinfer_attention_options* options, void* stream);
FLASHINFER_API int flashinfer_batch_decode_run(flashinfer_batch_decode* decode, const flashinfer_tensor* q,
                                               const flashinfer_tensor* k_cache, const flashinfer_tensor* v_cache,
                                               const flashinfer_tensor* out, const flashinfer_tensor* lse,
                                               void* stream);

FLASHINFER_API int flashinfer_batch_prefill_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                                flashinfer_batch_prefill** made);
FLASHINFER_API void flashinfer_batch_prefill_free(flashinfer_batch_prefill* prefill);
FLASHINFER_API int flashinfer_batch_prefill_plan(flashinfer_batch_prefill* prefill, const flashinfer_tensor* qo_indptr,
                                                 int64_t num_tokens, const flashinfer_page_table* table,
                                                 const flashinfer_attention_shape* shape,
                                                 const flashinfer_attention_options* options, void* stream);
FLASHINFER_API int flashinfer_batch_prefill_run(flashinfer_batch_prefill* prefill, const flashinfer_tensor* q,
                                                const flashinfer_tensor* k_cache, const flashinfer_tensor* v_cache,
                                                const flashinfer_tensor* out, const flashinfer_tensor* lse,
                                                void* stream);
FLASHINFER_API int flashinfer_batch_prefill_plan_ragged(flashinfer_batch_prefill* prefill,
                                                        const flashinfer_tensor* qo_indptr, int64_t num_tokens,
                                                        const flashinfer_tensor* kv_indptr,
                                                        const flashinfer_attention_shape* shape,
                                                        const flashinfer_attention_options* options, void* stream);
FLASHINFER_API int flashinfer_batch_prefill_run_ragged(flashinfer_batch_prefill* prefill, const flashinfer_tensor* q,
                                                       const flashinfer_tensor* k, const flashinfer_tensor* v,
                                                       const flashinfer_tensor* out, const flashinfer_tensor* lse,
                                                       void* stream);

/* table->last_page_len: lengths of whole requests. */
FLASHINFER_API int flashinfer_mla_new(flashinfer_kernels* kernels, const flashinfer_workspace* workspace,
                                      flashinfer_mla** made);
FLASHINFER_API void flashinfer_mla_free(flashinfer_mla* mla);
FLASHINFER_API int flashinfer_mla_plan(flashinfer_mla* mla, const flashinfer_tensor* qo_indptr, int64_t num_tokens,
                                       const flashinfer_page_table* table, const flashinfer_mla_shape* shape,
                                       int is_causal, double sm_scale, double kv_scale, void* stream);
FLASHINFER_API int flashinfer_mla_run(flashinfer_mla* mla, const flashinfer_tensor* q_nope,
                                      const flashinfer_tensor* q_pe, const flashinfer_tensor* ckv,
                                      const flashinfer_tensor* kpe, const flashinfer_tensor* out,
                                      const flashinfer_tensor* lse, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* FLASHINFER_H_ */
