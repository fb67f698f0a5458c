// SPDX-License-Identifier: Apache-2.0
// What kernels of this version and their hosts agree on. Written by scripts/cpp_contract.py from
// flashinfer/families; a test compares. Structs are those of the kernels' own headers, asserted here.
#pragma once

#include "activation/params.h"
#include "attention/decode/params.h"
#include "attention/merge_params.h"
#include "attention/mla/compact_params.h"
#include "attention/mla/params.h"
#include "attention/prefill/params.h"
#include "attention/sm90/mla/params.h"
#include "attention/sm90/params.h"
#include "concat/params.h"
#include "conv/params.h"
#include "gdn/decode_params.h"
#include "gdn/prefill/params.h"
#include "gemm/params.h"
#include "gemm/sm90/params.h"
#include "norm/params.h"
#include "page/params.h"
#include "quantization/params.h"
#include "rope/params.h"
#include "sampling/params.h"

namespace flashinfer {

constexpr const char* kVersion = "0.1.0";
constexpr int kRegistryFormat = 1;

namespace contract {

constexpr int kShortRows = 64;
constexpr int kLongRows = 4096;
constexpr int kManyRows = 262144;
constexpr int kMaxItems = 1048576;
constexpr int kMaxCounters = 32768;
constexpr int kMinBoxRows = 8;
constexpr int kMlaShortRows = 16;
constexpr int kMlaMaxBlocks = 960;
constexpr int kMaskNone = 0;
constexpr int kMaskCausal = 1;
constexpr int kMaskCustom = 2;
constexpr int kMaskDraft = 3;
constexpr int kMaskItems = 4;

constexpr PlanCosts kPrefillCosts = {1.5f, 3.0f, 2, 0};
constexpr PlanCosts kMlaCosts = {0.6f, 2.4f, 1, 0};
constexpr PlanCosts kMlaShortCosts = {2.0f, 2.5f, 4, 0};
constexpr PlanCosts kMlaSm90Costs = {0.9f, 0.5f, 1, 1};

// Levels of a CPU, each with the flags of /proc/cpuinfo that it takes besides those before it.
struct CpuLevel {
  const char *name, *flags;
};
constexpr CpuLevel kX86Levels[] = {
    {"x86-64", ""},
    {"x86-64-v2", "cx16 popcnt sse4_1 sse4_2 ssse3"},
    {"x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma movbe"},
    {"x86-64-v4", "avx512bw avx512cd avx512dq avx512f avx512vl"},
};
constexpr CpuLevel kArmLevels[] = {
    {"armv8-a", ""},
    {"armv8.2-a", "asimdhp fphp"},
};

}  // namespace contract

// The name that a registry has for a parameter struct, and for its layout.
template <class Params>
struct Layout;

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
#endif

template <>
struct Layout<ActAndMulParams> {
  static constexpr const char* kName = "ActAndMulParams";
  static constexpr uint64_t kAbi = 0x19b3ac62add17c54;
};
static_assert(sizeof(ActAndMulParams) == 64);
static_assert(__builtin_offsetof(ActAndMulParams, input) == 0);
static_assert(__builtin_offsetof(ActAndMulParams, output) == 8);
static_assert(__builtin_offsetof(ActAndMulParams, input_row_stride) == 16);
static_assert(__builtin_offsetof(ActAndMulParams, input_group_stride) == 24);
static_assert(__builtin_offsetof(ActAndMulParams, output_row_stride) == 32);
static_assert(__builtin_offsetof(ActAndMulParams, output_group_stride) == 40);
static_assert(__builtin_offsetof(ActAndMulParams, num_groups) == 48);
static_assert(__builtin_offsetof(ActAndMulParams, rows_per_group) == 52);
static_assert(__builtin_offsetof(ActAndMulParams, hidden_size) == 56);

template <>
struct Layout<ActAndMulQuantParams> {
  static constexpr const char* kName = "ActAndMulQuantParams";
  static constexpr uint64_t kAbi = 0xba297bab4b7c0358;
};
static_assert(sizeof(ActAndMulQuantParams) == 80);
static_assert(__builtin_offsetof(ActAndMulQuantParams, output_scale.device_value) == 0);
static_assert(__builtin_offsetof(ActAndMulQuantParams, output_scale.host_value) == 8);
static_assert(__builtin_offsetof(ActAndMulQuantParams, output_scale.reserved) == 12);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.input) == 16);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.output) == 24);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.input_row_stride) == 32);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.input_group_stride) == 40);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.output_row_stride) == 48);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.output_group_stride) == 56);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.num_groups) == 64);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.rows_per_group) == 68);
static_assert(__builtin_offsetof(ActAndMulQuantParams, act_and_mul.hidden_size) == 72);

template <>
struct Layout<AppendParams> {
  static constexpr const char* kName = "AppendParams";
  static constexpr uint64_t kAbi = 0xf85fcd42b8f52245;
};
static_assert(sizeof(AppendParams) == 200);
static_assert(__builtin_offsetof(AppendParams, key) == 0);
static_assert(__builtin_offsetof(AppendParams, value) == 8);
static_assert(__builtin_offsetof(AppendParams, key_cache) == 16);
static_assert(__builtin_offsetof(AppendParams, value_cache) == 24);
static_assert(__builtin_offsetof(AppendParams, slots.batch_indices) == 32);
static_assert(__builtin_offsetof(AppendParams, slots.positions) == 40);
static_assert(__builtin_offsetof(AppendParams, slots.page_indices) == 48);
static_assert(__builtin_offsetof(AppendParams, slots.page_indptr) == 56);
static_assert(__builtin_offsetof(AppendParams, key_scale.device_value) == 64);
static_assert(__builtin_offsetof(AppendParams, key_scale.host_value) == 72);
static_assert(__builtin_offsetof(AppendParams, key_scale.reserved) == 76);
static_assert(__builtin_offsetof(AppendParams, value_scale.device_value) == 80);
static_assert(__builtin_offsetof(AppendParams, value_scale.host_value) == 88);
static_assert(__builtin_offsetof(AppendParams, value_scale.reserved) == 92);
static_assert(__builtin_offsetof(AppendParams, bounds.batch_size) == 96);
static_assert(__builtin_offsetof(AppendParams, bounds.num_page_indices) == 100);
static_assert(__builtin_offsetof(AppendParams, bounds.num_pages) == 104);
static_assert(__builtin_offsetof(AppendParams, bounds.page_size) == 108);
static_assert(__builtin_offsetof(AppendParams, key_strides.token) == 112);
static_assert(__builtin_offsetof(AppendParams, key_strides.head) == 120);
static_assert(__builtin_offsetof(AppendParams, value_strides.token) == 128);
static_assert(__builtin_offsetof(AppendParams, value_strides.head) == 136);
static_assert(__builtin_offsetof(AppendParams, key_cache_strides.page) == 144);
static_assert(__builtin_offsetof(AppendParams, key_cache_strides.slot) == 152);
static_assert(__builtin_offsetof(AppendParams, key_cache_strides.head) == 160);
static_assert(__builtin_offsetof(AppendParams, value_cache_strides.page) == 168);
static_assert(__builtin_offsetof(AppendParams, value_cache_strides.slot) == 176);
static_assert(__builtin_offsetof(AppendParams, value_cache_strides.head) == 184);
static_assert(__builtin_offsetof(AppendParams, num_tokens) == 192);
static_assert(__builtin_offsetof(AppendParams, num_heads) == 196);

template <>
struct Layout<CausalConv1dParams> {
  static constexpr const char* kName = "CausalConv1dParams";
  static constexpr uint64_t kAbi = 0xfe27ca3087a99ad8;
};
static_assert(sizeof(CausalConv1dParams) == 136);
static_assert(__builtin_offsetof(CausalConv1dParams, x) == 0);
static_assert(__builtin_offsetof(CausalConv1dParams, weight) == 8);
static_assert(__builtin_offsetof(CausalConv1dParams, bias) == 16);
static_assert(__builtin_offsetof(CausalConv1dParams, states) == 24);
static_assert(__builtin_offsetof(CausalConv1dParams, offsets) == 32);
static_assert(__builtin_offsetof(CausalConv1dParams, slots) == 40);
static_assert(__builtin_offsetof(CausalConv1dParams, has_initial_state) == 48);
static_assert(__builtin_offsetof(CausalConv1dParams, output) == 56);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.slot_stride) == 64);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.channel_stride) == 72);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.time_stride) == 80);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.num_slots) == 88);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.length) == 92);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.pad_slot) == 96);
static_assert(__builtin_offsetof(CausalConv1dParams, layout.reserved) == 100);
static_assert(__builtin_offsetof(CausalConv1dParams, x_stride) == 104);
static_assert(__builtin_offsetof(CausalConv1dParams, output_stride) == 112);
static_assert(__builtin_offsetof(CausalConv1dParams, num_tokens) == 120);
static_assert(__builtin_offsetof(CausalConv1dParams, num_sequences) == 124);
static_assert(__builtin_offsetof(CausalConv1dParams, num_channels) == 128);

template <>
struct Layout<CausalConv1dUpdateParams> {
  static constexpr const char* kName = "CausalConv1dUpdateParams";
  static constexpr uint64_t kAbi = 0x41da9e976aaec025;
};
static_assert(sizeof(CausalConv1dUpdateParams) == 152);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, x) == 0);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, weight) == 8);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, bias) == 16);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, states) == 24);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, offsets) == 32);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, slots) == 40);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, num_accepted) == 48);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, output) == 56);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.slot_stride) == 64);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.channel_stride) == 72);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.time_stride) == 80);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.num_slots) == 88);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.length) == 92);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.pad_slot) == 96);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, layout.reserved) == 100);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, x_request_stride) == 104);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, x_stride) == 112);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, output_request_stride) == 120);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, output_stride) == 128);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, batch_size) == 136);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, num_tokens) == 140);
static_assert(__builtin_offsetof(CausalConv1dUpdateParams, num_channels) == 144);

template <>
struct Layout<CompactIndicesParams> {
  static constexpr const char* kName = "CompactIndicesParams";
  static constexpr uint64_t kAbi = 0xcd68b34131d096aa;
};
static_assert(sizeof(CompactIndicesParams) == 104);
static_assert(__builtin_offsetof(CompactIndicesParams, indices) == 0);
static_assert(__builtin_offsetof(CompactIndicesParams, qo_indptr) == 8);
static_assert(__builtin_offsetof(CompactIndicesParams, kv_indptr) == 16);
static_assert(__builtin_offsetof(CompactIndicesParams, compacted) == 24);
static_assert(__builtin_offsetof(CompactIndicesParams, lengths) == 32);
static_assert(__builtin_offsetof(CompactIndicesParams, items) == 40);
static_assert(__builtin_offsetof(CompactIndicesParams, schedule) == 48);
static_assert(__builtin_offsetof(CompactIndicesParams, counters) == 56);
static_assert(__builtin_offsetof(CompactIndicesParams, list_stride) == 64);
static_assert(__builtin_offsetof(CompactIndicesParams, num_lists) == 72);
static_assert(__builtin_offsetof(CompactIndicesParams, max_len) == 76);
static_assert(__builtin_offsetof(CompactIndicesParams, num_rows) == 80);
static_assert(__builtin_offsetof(CompactIndicesParams, num_heads) == 84);
static_assert(__builtin_offsetof(CompactIndicesParams, block_m) == 88);
static_assert(__builtin_offsetof(CompactIndicesParams, block_n) == 92);
static_assert(__builtin_offsetof(CompactIndicesParams, num_splits) == 96);

template <>
struct Layout<ConcatParams> {
  static constexpr const char* kName = "ConcatParams";
  static constexpr uint64_t kAbi = 0x7cc9895016068f17;
};
static_assert(sizeof(ConcatParams) == 72);
static_assert(__builtin_offsetof(ConcatParams, k_nope) == 0);
static_assert(__builtin_offsetof(ConcatParams, k_rope) == 8);
static_assert(__builtin_offsetof(ConcatParams, k) == 16);
static_assert(__builtin_offsetof(ConcatParams, k_nope_strides.token) == 24);
static_assert(__builtin_offsetof(ConcatParams, k_nope_strides.head) == 32);
static_assert(__builtin_offsetof(ConcatParams, k_strides.token) == 40);
static_assert(__builtin_offsetof(ConcatParams, k_strides.head) == 48);
static_assert(__builtin_offsetof(ConcatParams, k_rope_stride) == 56);
static_assert(__builtin_offsetof(ConcatParams, num_tokens) == 64);
static_assert(__builtin_offsetof(ConcatParams, num_heads) == 68);

template <>
struct Layout<DecodeParams> {
  static constexpr const char* kName = "DecodeParams";
  static constexpr uint64_t kAbi = 0xb0f7d24f462c84fe;
};
static_assert(sizeof(DecodeParams) == 424);
static_assert(__builtin_offsetof(DecodeParams, sinks) == 0);
static_assert(__builtin_offsetof(DecodeParams, q) == 8);
static_assert(__builtin_offsetof(DecodeParams, out) == 16);
static_assert(__builtin_offsetof(DecodeParams, lse) == 24);
static_assert(__builtin_offsetof(DecodeParams, kv.k) == 32);
static_assert(__builtin_offsetof(DecodeParams, kv.v) == 40);
static_assert(__builtin_offsetof(DecodeParams, kv.index.indptr) == 48);
static_assert(__builtin_offsetof(DecodeParams, kv.index.last_page_len) == 56);
static_assert(__builtin_offsetof(DecodeParams, kv.index.indices) == 64);
static_assert(__builtin_offsetof(DecodeParams, kv.index.len) == 72);
static_assert(__builtin_offsetof(DecodeParams, kv.index.page_size.divisor) == 76);
static_assert(__builtin_offsetof(DecodeParams, kv.index.page_size.magic) == 80);
static_assert(__builtin_offsetof(DecodeParams, kv.index.page_size.shift) == 84);
static_assert(__builtin_offsetof(DecodeParams, kv.k_page_stride) == 88);
static_assert(__builtin_offsetof(DecodeParams, kv.k_entry_stride) == 96);
static_assert(__builtin_offsetof(DecodeParams, kv.k_head_stride) == 104);
static_assert(__builtin_offsetof(DecodeParams, kv.v_page_stride) == 112);
static_assert(__builtin_offsetof(DecodeParams, kv.v_entry_stride) == 120);
static_assert(__builtin_offsetof(DecodeParams, kv.v_head_stride) == 128);
static_assert(__builtin_offsetof(DecodeParams, alibi_slopes) == 136);
static_assert(__builtin_offsetof(DecodeParams, rope_frequencies) == 144);
static_assert(__builtin_offsetof(DecodeParams, device_q_scale) == 152);
static_assert(__builtin_offsetof(DecodeParams, device_k_scale) == 160);
static_assert(__builtin_offsetof(DecodeParams, device_v_scale) == 168);
static_assert(__builtin_offsetof(DecodeParams, q_token_stride) == 176);
static_assert(__builtin_offsetof(DecodeParams, q_head_stride) == 184);
static_assert(__builtin_offsetof(DecodeParams, out_token_stride) == 192);
static_assert(__builtin_offsetof(DecodeParams, out_head_stride) == 200);
static_assert(__builtin_offsetof(DecodeParams, extras) == 208);
static_assert(__builtin_offsetof(DecodeParams, batch_size) == 336);
static_assert(__builtin_offsetof(DecodeParams, num_qo_heads) == 340);
static_assert(__builtin_offsetof(DecodeParams, num_kv_heads) == 344);
static_assert(__builtin_offsetof(DecodeParams, window_left) == 348);
static_assert(__builtin_offsetof(DecodeParams, sm_scale) == 352);
static_assert(__builtin_offsetof(DecodeParams, v_scale) == 356);
static_assert(__builtin_offsetof(DecodeParams, logits_soft_cap) == 360);
static_assert(__builtin_offsetof(DecodeParams, chunks) == 368);
static_assert(__builtin_offsetof(DecodeParams, requests) == 376);
static_assert(__builtin_offsetof(DecodeParams, empty) == 384);
static_assert(__builtin_offsetof(DecodeParams, counters) == 392);
static_assert(__builtin_offsetof(DecodeParams, partial_out) == 400);
static_assert(__builtin_offsetof(DecodeParams, partial_lse) == 408);
static_assert(__builtin_offsetof(DecodeParams, plan_is_settled) == 416);
static_assert(__builtin_offsetof(DecodeParams, num_tokens) == 420);

template <>
struct Layout<DecodePlanParams> {
  static constexpr const char* kName = "DecodePlanParams";
  static constexpr uint64_t kAbi = 0x2d08ccaf924476e6;
};
static_assert(sizeof(DecodePlanParams) == 224);
static_assert(__builtin_offsetof(DecodePlanParams, kv_indptr) == 0);
static_assert(__builtin_offsetof(DecodePlanParams, last_page_len) == 8);
static_assert(__builtin_offsetof(DecodePlanParams, qo_indptr) == 16);
static_assert(__builtin_offsetof(DecodePlanParams, chunks) == 24);
static_assert(__builtin_offsetof(DecodePlanParams, requests) == 32);
static_assert(__builtin_offsetof(DecodePlanParams, empty) == 40);
static_assert(__builtin_offsetof(DecodePlanParams, tile_indptr) == 48);
static_assert(__builtin_offsetof(DecodePlanParams, counters) == 56);
static_assert(__builtin_offsetof(DecodePlanParams, batch_size) == 64);
static_assert(__builtin_offsetof(DecodePlanParams, num_chunks) == 68);
static_assert(__builtin_offsetof(DecodePlanParams, num_head_blocks) == 72);
static_assert(__builtin_offsetof(DecodePlanParams, page_size) == 76);
static_assert(__builtin_offsetof(DecodePlanParams, table_len) == 80);
static_assert(__builtin_offsetof(DecodePlanParams, tile_len) == 84);
static_assert(__builtin_offsetof(DecodePlanParams, window_left) == 88);
static_assert(__builtin_offsetof(DecodePlanParams, has_lengths) == 92);
static_assert(__builtin_offsetof(DecodePlanParams, extras) == 96);

template <>
struct Layout<GdnDecodeParams> {
  static constexpr const char* kName = "GdnDecodeParams";
  static constexpr uint64_t kAbi = 0x1ff6f89df0f2afc3;
};
static_assert(sizeof(GdnDecodeParams) == 360);
static_assert(__builtin_offsetof(GdnDecodeParams, q) == 0);
static_assert(__builtin_offsetof(GdnDecodeParams, k) == 8);
static_assert(__builtin_offsetof(GdnDecodeParams, v) == 16);
static_assert(__builtin_offsetof(GdnDecodeParams, a_log) == 24);
static_assert(__builtin_offsetof(GdnDecodeParams, a) == 32);
static_assert(__builtin_offsetof(GdnDecodeParams, dt_bias) == 40);
static_assert(__builtin_offsetof(GdnDecodeParams, b) == 48);
static_assert(__builtin_offsetof(GdnDecodeParams, states) == 56);
static_assert(__builtin_offsetof(GdnDecodeParams, input_slots) == 64);
static_assert(__builtin_offsetof(GdnDecodeParams, output_slots) == 72);
static_assert(__builtin_offsetof(GdnDecodeParams, token_states) == 80);
static_assert(__builtin_offsetof(GdnDecodeParams, token_slots) == 88);
static_assert(__builtin_offsetof(GdnDecodeParams, output) == 96);
static_assert(__builtin_offsetof(GdnDecodeParams, q_strides.request) == 104);
static_assert(__builtin_offsetof(GdnDecodeParams, q_strides.token) == 112);
static_assert(__builtin_offsetof(GdnDecodeParams, q_strides.head) == 120);
static_assert(__builtin_offsetof(GdnDecodeParams, k_strides.request) == 128);
static_assert(__builtin_offsetof(GdnDecodeParams, k_strides.token) == 136);
static_assert(__builtin_offsetof(GdnDecodeParams, k_strides.head) == 144);
static_assert(__builtin_offsetof(GdnDecodeParams, v_strides.request) == 152);
static_assert(__builtin_offsetof(GdnDecodeParams, v_strides.token) == 160);
static_assert(__builtin_offsetof(GdnDecodeParams, v_strides.head) == 168);
static_assert(__builtin_offsetof(GdnDecodeParams, output_strides.request) == 176);
static_assert(__builtin_offsetof(GdnDecodeParams, output_strides.token) == 184);
static_assert(__builtin_offsetof(GdnDecodeParams, output_strides.head) == 192);
static_assert(__builtin_offsetof(GdnDecodeParams, a_strides.request) == 200);
static_assert(__builtin_offsetof(GdnDecodeParams, a_strides.token) == 208);
static_assert(__builtin_offsetof(GdnDecodeParams, a_strides.head) == 216);
static_assert(__builtin_offsetof(GdnDecodeParams, b_strides.request) == 224);
static_assert(__builtin_offsetof(GdnDecodeParams, b_strides.token) == 232);
static_assert(__builtin_offsetof(GdnDecodeParams, b_strides.head) == 240);
static_assert(__builtin_offsetof(GdnDecodeParams, state_strides.slot) == 248);
static_assert(__builtin_offsetof(GdnDecodeParams, state_strides.head) == 256);
static_assert(__builtin_offsetof(GdnDecodeParams, state_strides.row) == 264);
static_assert(__builtin_offsetof(GdnDecodeParams, token_state_strides.slot) == 272);
static_assert(__builtin_offsetof(GdnDecodeParams, token_state_strides.head) == 280);
static_assert(__builtin_offsetof(GdnDecodeParams, token_state_strides.row) == 288);
static_assert(__builtin_offsetof(GdnDecodeParams, token_state_request_stride) == 296);
static_assert(__builtin_offsetof(GdnDecodeParams, num_v_heads.divisor) == 304);
static_assert(__builtin_offsetof(GdnDecodeParams, num_v_heads.magic) == 308);
static_assert(__builtin_offsetof(GdnDecodeParams, num_v_heads.shift) == 312);
static_assert(__builtin_offsetof(GdnDecodeParams, v_heads_per_head.divisor) == 316);
static_assert(__builtin_offsetof(GdnDecodeParams, v_heads_per_head.magic) == 320);
static_assert(__builtin_offsetof(GdnDecodeParams, v_heads_per_head.shift) == 324);
static_assert(__builtin_offsetof(GdnDecodeParams, batch_size) == 328);
static_assert(__builtin_offsetof(GdnDecodeParams, num_tokens) == 332);
static_assert(__builtin_offsetof(GdnDecodeParams, num_slots) == 336);
static_assert(__builtin_offsetof(GdnDecodeParams, num_token_slots) == 340);
static_assert(__builtin_offsetof(GdnDecodeParams, update_state) == 344);
static_assert(__builtin_offsetof(GdnDecodeParams, use_qk_l2norm) == 348);
static_assert(__builtin_offsetof(GdnDecodeParams, scale) == 352);

template <>
struct Layout<GdnPrefillParams> {
  static constexpr const char* kName = "GdnPrefillParams";
  static constexpr uint64_t kAbi = 0x09531b8f82e502c4;
};
static_assert(sizeof(GdnPrefillParams) == 288);
static_assert(__builtin_offsetof(GdnPrefillParams, q) == 0);
static_assert(__builtin_offsetof(GdnPrefillParams, k) == 8);
static_assert(__builtin_offsetof(GdnPrefillParams, v) == 16);
static_assert(__builtin_offsetof(GdnPrefillParams, gate) == 24);
static_assert(__builtin_offsetof(GdnPrefillParams, beta) == 32);
static_assert(__builtin_offsetof(GdnPrefillParams, cu_seqlens) == 40);
static_assert(__builtin_offsetof(GdnPrefillParams, initial_state) == 48);
static_assert(__builtin_offsetof(GdnPrefillParams, initial_indices) == 56);
static_assert(__builtin_offsetof(GdnPrefillParams, final_indices) == 64);
static_assert(__builtin_offsetof(GdnPrefillParams, output) == 72);
static_assert(__builtin_offsetof(GdnPrefillParams, final_state) == 80);
static_assert(__builtin_offsetof(GdnPrefillParams, chunks) == 88);
static_assert(__builtin_offsetof(GdnPrefillParams, segments) == 96);
static_assert(__builtin_offsetof(GdnPrefillParams, q_strides.token) == 104);
static_assert(__builtin_offsetof(GdnPrefillParams, q_strides.head) == 112);
static_assert(__builtin_offsetof(GdnPrefillParams, k_strides.token) == 120);
static_assert(__builtin_offsetof(GdnPrefillParams, k_strides.head) == 128);
static_assert(__builtin_offsetof(GdnPrefillParams, v_strides.token) == 136);
static_assert(__builtin_offsetof(GdnPrefillParams, v_strides.head) == 144);
static_assert(__builtin_offsetof(GdnPrefillParams, output_strides.token) == 152);
static_assert(__builtin_offsetof(GdnPrefillParams, output_strides.head) == 160);
static_assert(__builtin_offsetof(GdnPrefillParams, gate_strides.token) == 168);
static_assert(__builtin_offsetof(GdnPrefillParams, gate_strides.head) == 176);
static_assert(__builtin_offsetof(GdnPrefillParams, beta_strides.token) == 184);
static_assert(__builtin_offsetof(GdnPrefillParams, beta_strides.head) == 192);
static_assert(__builtin_offsetof(GdnPrefillParams, initial_strides.slot) == 200);
static_assert(__builtin_offsetof(GdnPrefillParams, initial_strides.head) == 208);
static_assert(__builtin_offsetof(GdnPrefillParams, final_strides.slot) == 216);
static_assert(__builtin_offsetof(GdnPrefillParams, final_strides.head) == 224);
static_assert(__builtin_offsetof(GdnPrefillParams, num_seqs) == 232);
static_assert(__builtin_offsetof(GdnPrefillParams, num_tokens) == 236);
static_assert(__builtin_offsetof(GdnPrefillParams, num_heads) == 240);
static_assert(__builtin_offsetof(GdnPrefillParams, heads_per_q) == 244);
static_assert(__builtin_offsetof(GdnPrefillParams, heads_per_k) == 248);
static_assert(__builtin_offsetof(GdnPrefillParams, heads_per_v) == 252);
static_assert(__builtin_offsetof(GdnPrefillParams, num_initial_slots) == 256);
static_assert(__builtin_offsetof(GdnPrefillParams, num_final_slots) == 260);
static_assert(__builtin_offsetof(GdnPrefillParams, has_long_seqlens) == 264);
static_assert(__builtin_offsetof(GdnPrefillParams, has_long_indices) == 268);
static_assert(__builtin_offsetof(GdnPrefillParams, scale) == 272);
static_assert(__builtin_offsetof(GdnPrefillParams, segment_tokens) == 276);
static_assert(__builtin_offsetof(GdnPrefillParams, has_bf16_states) == 280);

template <>
struct Layout<GroupGemmParams> {
  static constexpr const char* kName = "GroupGemmParams";
  static constexpr uint64_t kAbi = 0xb13910116cd4d016;
};
static_assert(sizeof(GroupGemmParams) == 160);
static_assert(__builtin_offsetof(GroupGemmParams, a) == 0);
static_assert(__builtin_offsetof(GroupGemmParams, b) == 8);
static_assert(__builtin_offsetof(GroupGemmParams, a_scale) == 16);
static_assert(__builtin_offsetof(GroupGemmParams, b_scale) == 24);
static_assert(__builtin_offsetof(GroupGemmParams, indptr) == 32);
static_assert(__builtin_offsetof(GroupGemmParams, weight_indices) == 40);
static_assert(__builtin_offsetof(GroupGemmParams, output) == 48);
static_assert(__builtin_offsetof(GroupGemmParams, a_row_stride) == 56);
static_assert(__builtin_offsetof(GroupGemmParams, b_weight_stride) == 64);
static_assert(__builtin_offsetof(GroupGemmParams, b_row_stride) == 72);
static_assert(__builtin_offsetof(GroupGemmParams, output_row_stride) == 80);
static_assert(__builtin_offsetof(GroupGemmParams, a_scale_row_stride) == 88);
static_assert(__builtin_offsetof(GroupGemmParams, a_scale_block_stride) == 96);
static_assert(__builtin_offsetof(GroupGemmParams, b_scale_weight_stride) == 104);
static_assert(__builtin_offsetof(GroupGemmParams, b_scale_row_stride) == 112);
static_assert(__builtin_offsetof(GroupGemmParams, b_scale_block_stride) == 120);
static_assert(__builtin_offsetof(GroupGemmParams, num_rows) == 128);
static_assert(__builtin_offsetof(GroupGemmParams, num_columns) == 132);
static_assert(__builtin_offsetof(GroupGemmParams, depth) == 136);
static_assert(__builtin_offsetof(GroupGemmParams, num_groups) == 140);
static_assert(__builtin_offsetof(GroupGemmParams, num_weights) == 144);
static_assert(__builtin_offsetof(GroupGemmParams, has_long_indptr) == 148);
static_assert(__builtin_offsetof(GroupGemmParams, has_long_indices) == 152);
static_assert(__builtin_offsetof(GroupGemmParams, reserved) == 156);

template <>
struct Layout<MergeParams> {
  static constexpr const char* kName = "MergeParams";
  static constexpr uint64_t kAbi = 0x81174b87f29f2be9;
};
static_assert(sizeof(MergeParams) == 112);
static_assert(__builtin_offsetof(MergeParams, v) == 0);
static_assert(__builtin_offsetof(MergeParams, s) == 8);
static_assert(__builtin_offsetof(MergeParams, v_other) == 16);
static_assert(__builtin_offsetof(MergeParams, s_other) == 24);
static_assert(__builtin_offsetof(MergeParams, mask) == 32);
static_assert(__builtin_offsetof(MergeParams, indptr) == 40);
static_assert(__builtin_offsetof(MergeParams, v_out) == 48);
static_assert(__builtin_offsetof(MergeParams, s_out) == 56);
static_assert(__builtin_offsetof(MergeParams, num_rows) == 64);
static_assert(__builtin_offsetof(MergeParams, v_row_stride) == 72);
static_assert(__builtin_offsetof(MergeParams, v_state_stride) == 80);
static_assert(__builtin_offsetof(MergeParams, s_row_stride) == 88);
static_assert(__builtin_offsetof(MergeParams, s_state_stride) == 96);
static_assert(__builtin_offsetof(MergeParams, num_heads) == 104);
static_assert(__builtin_offsetof(MergeParams, num_states) == 108);

template <>
struct Layout<MlaParams> {
  static constexpr const char* kName = "MlaParams";
  static constexpr uint64_t kAbi = 0x9146f8ae7c7b8b51;
};
static_assert(sizeof(MlaParams) == 248);
static_assert(__builtin_offsetof(MlaParams, qo_indptr) == 0);
static_assert(__builtin_offsetof(MlaParams, mask) == 8);
static_assert(__builtin_offsetof(MlaParams, mask_indptr) == 16);
static_assert(__builtin_offsetof(MlaParams, q_pe) == 24);
static_assert(__builtin_offsetof(MlaParams, q_nope) == 32);
static_assert(__builtin_offsetof(MlaParams, out) == 40);
static_assert(__builtin_offsetof(MlaParams, lse) == 48);
static_assert(__builtin_offsetof(MlaParams, kv.ckv) == 56);
static_assert(__builtin_offsetof(MlaParams, kv.kpe) == 64);
static_assert(__builtin_offsetof(MlaParams, kv.index.indptr) == 72);
static_assert(__builtin_offsetof(MlaParams, kv.index.last_page_len) == 80);
static_assert(__builtin_offsetof(MlaParams, kv.index.indices) == 88);
static_assert(__builtin_offsetof(MlaParams, kv.index.len) == 96);
static_assert(__builtin_offsetof(MlaParams, kv.index.page_size.divisor) == 100);
static_assert(__builtin_offsetof(MlaParams, kv.index.page_size.magic) == 104);
static_assert(__builtin_offsetof(MlaParams, kv.index.page_size.shift) == 108);
static_assert(__builtin_offsetof(MlaParams, kv.ckv_page_stride) == 112);
static_assert(__builtin_offsetof(MlaParams, kv.ckv_entry_stride) == 120);
static_assert(__builtin_offsetof(MlaParams, kv.kpe_page_stride) == 128);
static_assert(__builtin_offsetof(MlaParams, kv.kpe_entry_stride) == 136);
static_assert(__builtin_offsetof(MlaParams, q_nope_token_stride) == 144);
static_assert(__builtin_offsetof(MlaParams, q_nope_head_stride) == 152);
static_assert(__builtin_offsetof(MlaParams, q_pe_token_stride) == 160);
static_assert(__builtin_offsetof(MlaParams, q_pe_head_stride) == 168);
static_assert(__builtin_offsetof(MlaParams, out_token_stride) == 176);
static_assert(__builtin_offsetof(MlaParams, out_head_stride) == 184);
static_assert(__builtin_offsetof(MlaParams, batch_size) == 192);
static_assert(__builtin_offsetof(MlaParams, num_qo_heads) == 196);
static_assert(__builtin_offsetof(MlaParams, sm_scale) == 200);
static_assert(__builtin_offsetof(MlaParams, v_scale) == 204);
static_assert(__builtin_offsetof(MlaParams, items) == 208);
static_assert(__builtin_offsetof(MlaParams, schedule) == 216);
static_assert(__builtin_offsetof(MlaParams, counters) == 224);
static_assert(__builtin_offsetof(MlaParams, partial_out) == 232);
static_assert(__builtin_offsetof(MlaParams, num_tokens) == 240);

template <>
struct Layout<NormParams> {
  static constexpr const char* kName = "NormParams";
  static constexpr uint64_t kAbi = 0xcb8274ce9cc9fa03;
};
static_assert(sizeof(NormParams) == 112);
static_assert(__builtin_offsetof(NormParams, input) == 0);
static_assert(__builtin_offsetof(NormParams, residual) == 8);
static_assert(__builtin_offsetof(NormParams, weight) == 16);
static_assert(__builtin_offsetof(NormParams, bias) == 24);
static_assert(__builtin_offsetof(NormParams, output) == 32);
static_assert(__builtin_offsetof(NormParams, input_row_stride) == 40);
static_assert(__builtin_offsetof(NormParams, input_group_stride) == 48);
static_assert(__builtin_offsetof(NormParams, residual_row_stride) == 56);
static_assert(__builtin_offsetof(NormParams, residual_group_stride) == 64);
static_assert(__builtin_offsetof(NormParams, output_row_stride) == 72);
static_assert(__builtin_offsetof(NormParams, output_group_stride) == 80);
static_assert(__builtin_offsetof(NormParams, num_rows) == 88);
static_assert(__builtin_offsetof(NormParams, rows_per_group.divisor) == 92);
static_assert(__builtin_offsetof(NormParams, rows_per_group.magic) == 96);
static_assert(__builtin_offsetof(NormParams, rows_per_group.shift) == 100);
static_assert(__builtin_offsetof(NormParams, eps) == 104);

template <>
struct Layout<NormQuantParams> {
  static constexpr const char* kName = "NormQuantParams";
  static constexpr uint64_t kAbi = 0xab7bd50da3279e44;
};
static_assert(sizeof(NormQuantParams) == 128);
static_assert(__builtin_offsetof(NormQuantParams, output_scale.device_value) == 0);
static_assert(__builtin_offsetof(NormQuantParams, output_scale.host_value) == 8);
static_assert(__builtin_offsetof(NormQuantParams, output_scale.reserved) == 12);
static_assert(__builtin_offsetof(NormQuantParams, norm.input) == 16);
static_assert(__builtin_offsetof(NormQuantParams, norm.residual) == 24);
static_assert(__builtin_offsetof(NormQuantParams, norm.weight) == 32);
static_assert(__builtin_offsetof(NormQuantParams, norm.bias) == 40);
static_assert(__builtin_offsetof(NormQuantParams, norm.output) == 48);
static_assert(__builtin_offsetof(NormQuantParams, norm.input_row_stride) == 56);
static_assert(__builtin_offsetof(NormQuantParams, norm.input_group_stride) == 64);
static_assert(__builtin_offsetof(NormQuantParams, norm.residual_row_stride) == 72);
static_assert(__builtin_offsetof(NormQuantParams, norm.residual_group_stride) == 80);
static_assert(__builtin_offsetof(NormQuantParams, norm.output_row_stride) == 88);
static_assert(__builtin_offsetof(NormQuantParams, norm.output_group_stride) == 96);
static_assert(__builtin_offsetof(NormQuantParams, norm.num_rows) == 104);
static_assert(__builtin_offsetof(NormQuantParams, norm.rows_per_group.divisor) == 108);
static_assert(__builtin_offsetof(NormQuantParams, norm.rows_per_group.magic) == 112);
static_assert(__builtin_offsetof(NormQuantParams, norm.rows_per_group.shift) == 116);
static_assert(__builtin_offsetof(NormQuantParams, norm.eps) == 120);

template <>
struct Layout<NormalizeParams> {
  static constexpr const char* kName = "NormalizeParams";
  static constexpr uint64_t kAbi = 0x011873c4872c09d1;
};
static_assert(sizeof(NormalizeParams) == 72);
static_assert(__builtin_offsetof(NormalizeParams, input) == 0);
static_assert(__builtin_offsetof(NormalizeParams, output) == 8);
static_assert(__builtin_offsetof(NormalizeParams, top_k) == 16);
static_assert(__builtin_offsetof(NormalizeParams, top_p) == 24);
static_assert(__builtin_offsetof(NormalizeParams, temperature) == 32);
static_assert(__builtin_offsetof(NormalizeParams, top_k_value) == 40);
static_assert(__builtin_offsetof(NormalizeParams, top_p_value) == 44);
static_assert(__builtin_offsetof(NormalizeParams, temperature_value) == 48);
static_assert(__builtin_offsetof(NormalizeParams, top_k_is_int64) == 52);
static_assert(__builtin_offsetof(NormalizeParams, input_stride) == 56);
static_assert(__builtin_offsetof(NormalizeParams, num_rows) == 64);
static_assert(__builtin_offsetof(NormalizeParams, vocab_size) == 68);

template <>
struct Layout<PackbitsParams> {
  static constexpr const char* kName = "PackbitsParams";
  static constexpr uint64_t kAbi = 0x1890d349d5d94ab7;
};
static_assert(sizeof(PackbitsParams) == 24);
static_assert(__builtin_offsetof(PackbitsParams, input) == 0);
static_assert(__builtin_offsetof(PackbitsParams, output) == 8);
static_assert(__builtin_offsetof(PackbitsParams, num_elements) == 16);

template <>
struct Layout<PackedIndptrParams> {
  static constexpr const char* kName = "PackedIndptrParams";
  static constexpr uint64_t kAbi = 0xbd86e4ea9cec7a08;
};
static_assert(sizeof(PackedIndptrParams) == 24);
static_assert(__builtin_offsetof(PackedIndptrParams, indptr) == 0);
static_assert(__builtin_offsetof(PackedIndptrParams, packed_indptr) == 8);
static_assert(__builtin_offsetof(PackedIndptrParams, num_segments) == 16);

template <>
struct Layout<PrefillParams> {
  static constexpr const char* kName = "PrefillParams";
  static constexpr uint64_t kAbi = 0x4a4bc0e2891c10e2;
};
static_assert(sizeof(PrefillParams) == 440);
static_assert(__builtin_offsetof(PrefillParams, qo_indptr) == 0);
static_assert(__builtin_offsetof(PrefillParams, mask) == 8);
static_assert(__builtin_offsetof(PrefillParams, mask_indptr) == 16);
static_assert(__builtin_offsetof(PrefillParams, sinks) == 24);
static_assert(__builtin_offsetof(PrefillParams, q) == 32);
static_assert(__builtin_offsetof(PrefillParams, out) == 40);
static_assert(__builtin_offsetof(PrefillParams, lse) == 48);
static_assert(__builtin_offsetof(PrefillParams, kv.k) == 56);
static_assert(__builtin_offsetof(PrefillParams, kv.v) == 64);
static_assert(__builtin_offsetof(PrefillParams, kv.index.indptr) == 72);
static_assert(__builtin_offsetof(PrefillParams, kv.index.last_page_len) == 80);
static_assert(__builtin_offsetof(PrefillParams, kv.index.indices) == 88);
static_assert(__builtin_offsetof(PrefillParams, kv.index.len) == 96);
static_assert(__builtin_offsetof(PrefillParams, kv.index.page_size.divisor) == 100);
static_assert(__builtin_offsetof(PrefillParams, kv.index.page_size.magic) == 104);
static_assert(__builtin_offsetof(PrefillParams, kv.index.page_size.shift) == 108);
static_assert(__builtin_offsetof(PrefillParams, kv.k_page_stride) == 112);
static_assert(__builtin_offsetof(PrefillParams, kv.k_entry_stride) == 120);
static_assert(__builtin_offsetof(PrefillParams, kv.k_head_stride) == 128);
static_assert(__builtin_offsetof(PrefillParams, kv.v_page_stride) == 136);
static_assert(__builtin_offsetof(PrefillParams, kv.v_entry_stride) == 144);
static_assert(__builtin_offsetof(PrefillParams, kv.v_head_stride) == 152);
static_assert(__builtin_offsetof(PrefillParams, alibi_slopes) == 160);
static_assert(__builtin_offsetof(PrefillParams, rope_frequencies) == 168);
static_assert(__builtin_offsetof(PrefillParams, device_q_scale) == 176);
static_assert(__builtin_offsetof(PrefillParams, device_k_scale) == 184);
static_assert(__builtin_offsetof(PrefillParams, device_v_scale) == 192);
static_assert(__builtin_offsetof(PrefillParams, q_token_stride) == 200);
static_assert(__builtin_offsetof(PrefillParams, q_head_stride) == 208);
static_assert(__builtin_offsetof(PrefillParams, out_token_stride) == 216);
static_assert(__builtin_offsetof(PrefillParams, out_head_stride) == 224);
static_assert(__builtin_offsetof(PrefillParams, extras) == 232);
static_assert(__builtin_offsetof(PrefillParams, batch_size) == 360);
static_assert(__builtin_offsetof(PrefillParams, num_qo_heads) == 364);
static_assert(__builtin_offsetof(PrefillParams, num_kv_heads) == 368);
static_assert(__builtin_offsetof(PrefillParams, window_left) == 372);
static_assert(__builtin_offsetof(PrefillParams, sm_scale) == 376);
static_assert(__builtin_offsetof(PrefillParams, v_scale) == 380);
static_assert(__builtin_offsetof(PrefillParams, logits_soft_cap) == 384);
static_assert(__builtin_offsetof(PrefillParams, items) == 392);
static_assert(__builtin_offsetof(PrefillParams, schedule) == 400);
static_assert(__builtin_offsetof(PrefillParams, counters) == 408);
static_assert(__builtin_offsetof(PrefillParams, partial_out) == 416);
static_assert(__builtin_offsetof(PrefillParams, partial_lse) == 424);
static_assert(__builtin_offsetof(PrefillParams, qo_len) == 432);
static_assert(__builtin_offsetof(PrefillParams, num_tokens) == 436);

template <>
struct Layout<PrefillPlanParams> {
  static constexpr const char* kName = "PrefillPlanParams";
  static constexpr uint64_t kAbi = 0x2ab7094db033e7e3;
};
static_assert(sizeof(PrefillPlanParams) == 280);
static_assert(__builtin_offsetof(PrefillPlanParams, qo_indptr) == 0);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.indptr) == 8);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.last_page_len) == 16);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.indices) == 24);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.len) == 32);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.page_size.divisor) == 36);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.page_size.magic) == 40);
static_assert(__builtin_offsetof(PrefillPlanParams, kv.page_size.shift) == 44);
static_assert(__builtin_offsetof(PrefillPlanParams, schedule) == 48);
static_assert(__builtin_offsetof(PrefillPlanParams, items) == 56);
static_assert(__builtin_offsetof(PrefillPlanParams, tile_indptr) == 64);
static_assert(__builtin_offsetof(PrefillPlanParams, counters) == 72);
static_assert(__builtin_offsetof(PrefillPlanParams, batch_size) == 80);
static_assert(__builtin_offsetof(PrefillPlanParams, qo_len) == 84);
static_assert(__builtin_offsetof(PrefillPlanParams, num_kv_heads) == 88);
static_assert(__builtin_offsetof(PrefillPlanParams, group_size) == 92);
static_assert(__builtin_offsetof(PrefillPlanParams, num_blocks) == 96);
static_assert(__builtin_offsetof(PrefillPlanParams, max_items) == 100);
static_assert(__builtin_offsetof(PrefillPlanParams, max_counters) == 104);
static_assert(__builtin_offsetof(PrefillPlanParams, max_partial_rows) == 108);
static_assert(__builtin_offsetof(PrefillPlanParams, block_m) == 112);
static_assert(__builtin_offsetof(PrefillPlanParams, block_n) == 116);
static_assert(__builtin_offsetof(PrefillPlanParams, mask) == 120);
static_assert(__builtin_offsetof(PrefillPlanParams, window_left) == 124);
static_assert(__builtin_offsetof(PrefillPlanParams, fixed_split) == 128);
static_assert(__builtin_offsetof(PrefillPlanParams, costs.of_item) == 132);
static_assert(__builtin_offsetof(PrefillPlanParams, costs.of_partial) == 136);
static_assert(__builtin_offsetof(PrefillPlanParams, costs.min_split) == 140);
static_assert(__builtin_offsetof(PrefillPlanParams, costs.fills_gaps) == 144);
static_assert(__builtin_offsetof(PrefillPlanParams, time_to_read) == 148);
static_assert(__builtin_offsetof(PrefillPlanParams, extras) == 152);

template <>
struct Layout<QkNormRopeParams> {
  static constexpr const char* kName = "QkNormRopeParams";
  static constexpr uint64_t kAbi = 0xb223a621e64c5ffd;
};
static_assert(sizeof(QkNormRopeParams) == 1144);
static_assert(__builtin_offsetof(QkNormRopeParams, q) == 0);
static_assert(__builtin_offsetof(QkNormRopeParams, k) == 8);
static_assert(__builtin_offsetof(QkNormRopeParams, q_weight) == 16);
static_assert(__builtin_offsetof(QkNormRopeParams, k_weight) == 24);
static_assert(__builtin_offsetof(QkNormRopeParams, rotation.positions) == 32);
static_assert(__builtin_offsetof(QkNormRopeParams, rotation.indptr) == 40);
static_assert(__builtin_offsetof(QkNormRopeParams, rotation.offsets) == 48);
static_assert(__builtin_offsetof(QkNormRopeParams, rotation.cos_sin_cache) == 56);
static_assert(__builtin_offsetof(QkNormRopeParams, setup.cos_sin_stride) == 64);
static_assert(__builtin_offsetof(QkNormRopeParams, setup.num_positions) == 72);
static_assert(__builtin_offsetof(QkNormRopeParams, setup.batch_size) == 76);
static_assert(__builtin_offsetof(QkNormRopeParams, setup.frequencies) == 80);
static_assert(__builtin_offsetof(QkNormRopeParams, qkv_strides.token) == 1104);
static_assert(__builtin_offsetof(QkNormRopeParams, qkv_strides.head) == 1112);
static_assert(__builtin_offsetof(QkNormRopeParams, eps) == 1120);
static_assert(__builtin_offsetof(QkNormRopeParams, weight_bias) == 1124);
static_assert(__builtin_offsetof(QkNormRopeParams, num_tokens) == 1128);
static_assert(__builtin_offsetof(QkNormRopeParams, num_qo_heads) == 1132);
static_assert(__builtin_offsetof(QkNormRopeParams, num_kv_heads) == 1136);

template <>
struct Layout<QuantizeGroupsParams> {
  static constexpr const char* kName = "QuantizeGroupsParams";
  static constexpr uint64_t kAbi = 0x6799b8b2255b21e1;
};
static_assert(sizeof(QuantizeGroupsParams) == 40);
static_assert(__builtin_offsetof(QuantizeGroupsParams, input) == 0);
static_assert(__builtin_offsetof(QuantizeGroupsParams, output) == 8);
static_assert(__builtin_offsetof(QuantizeGroupsParams, scale) == 16);
static_assert(__builtin_offsetof(QuantizeGroupsParams, input_row_stride) == 24);
static_assert(__builtin_offsetof(QuantizeGroupsParams, num_rows) == 32);
static_assert(__builtin_offsetof(QuantizeGroupsParams, num_columns) == 36);

template <>
struct Layout<RopeAppendParams> {
  static constexpr const char* kName = "RopeAppendParams";
  static constexpr uint64_t kAbi = 0xea0bd79de140b3a8;
};
static_assert(sizeof(RopeAppendParams) == 1328);
static_assert(__builtin_offsetof(RopeAppendParams, q) == 0);
static_assert(__builtin_offsetof(RopeAppendParams, k) == 8);
static_assert(__builtin_offsetof(RopeAppendParams, v) == 16);
static_assert(__builtin_offsetof(RopeAppendParams, q_out) == 24);
static_assert(__builtin_offsetof(RopeAppendParams, key_cache) == 32);
static_assert(__builtin_offsetof(RopeAppendParams, value_cache) == 40);
static_assert(__builtin_offsetof(RopeAppendParams, slots.batch_indices) == 48);
static_assert(__builtin_offsetof(RopeAppendParams, slots.positions) == 56);
static_assert(__builtin_offsetof(RopeAppendParams, slots.page_indices) == 64);
static_assert(__builtin_offsetof(RopeAppendParams, slots.page_indptr) == 72);
static_assert(__builtin_offsetof(RopeAppendParams, rotation.positions) == 80);
static_assert(__builtin_offsetof(RopeAppendParams, rotation.indptr) == 88);
static_assert(__builtin_offsetof(RopeAppendParams, rotation.offsets) == 96);
static_assert(__builtin_offsetof(RopeAppendParams, rotation.cos_sin_cache) == 104);
static_assert(__builtin_offsetof(RopeAppendParams, key_scale.device_value) == 112);
static_assert(__builtin_offsetof(RopeAppendParams, key_scale.host_value) == 120);
static_assert(__builtin_offsetof(RopeAppendParams, key_scale.reserved) == 124);
static_assert(__builtin_offsetof(RopeAppendParams, value_scale.device_value) == 128);
static_assert(__builtin_offsetof(RopeAppendParams, value_scale.host_value) == 136);
static_assert(__builtin_offsetof(RopeAppendParams, value_scale.reserved) == 140);
static_assert(__builtin_offsetof(RopeAppendParams, bounds.batch_size) == 144);
static_assert(__builtin_offsetof(RopeAppendParams, bounds.num_page_indices) == 148);
static_assert(__builtin_offsetof(RopeAppendParams, bounds.num_pages) == 152);
static_assert(__builtin_offsetof(RopeAppendParams, bounds.page_size) == 156);
static_assert(__builtin_offsetof(RopeAppendParams, setup.cos_sin_stride) == 160);
static_assert(__builtin_offsetof(RopeAppendParams, setup.num_positions) == 168);
static_assert(__builtin_offsetof(RopeAppendParams, setup.batch_size) == 172);
static_assert(__builtin_offsetof(RopeAppendParams, setup.frequencies) == 176);
static_assert(__builtin_offsetof(RopeAppendParams, q_strides.token) == 1200);
static_assert(__builtin_offsetof(RopeAppendParams, q_strides.head) == 1208);
static_assert(__builtin_offsetof(RopeAppendParams, k_strides.token) == 1216);
static_assert(__builtin_offsetof(RopeAppendParams, k_strides.head) == 1224);
static_assert(__builtin_offsetof(RopeAppendParams, v_strides.token) == 1232);
static_assert(__builtin_offsetof(RopeAppendParams, v_strides.head) == 1240);
static_assert(__builtin_offsetof(RopeAppendParams, q_out_strides.token) == 1248);
static_assert(__builtin_offsetof(RopeAppendParams, q_out_strides.head) == 1256);
static_assert(__builtin_offsetof(RopeAppendParams, key_cache_strides.page) == 1264);
static_assert(__builtin_offsetof(RopeAppendParams, key_cache_strides.slot) == 1272);
static_assert(__builtin_offsetof(RopeAppendParams, key_cache_strides.head) == 1280);
static_assert(__builtin_offsetof(RopeAppendParams, value_cache_strides.page) == 1288);
static_assert(__builtin_offsetof(RopeAppendParams, value_cache_strides.slot) == 1296);
static_assert(__builtin_offsetof(RopeAppendParams, value_cache_strides.head) == 1304);
static_assert(__builtin_offsetof(RopeAppendParams, num_tokens) == 1312);
static_assert(__builtin_offsetof(RopeAppendParams, num_qo_heads) == 1316);
static_assert(__builtin_offsetof(RopeAppendParams, num_kv_heads) == 1320);

template <>
struct Layout<RopeParams> {
  static constexpr const char* kName = "RopeParams";
  static constexpr uint64_t kAbi = 0xf0ab53960a944daf;
};
static_assert(sizeof(RopeParams) == 1184);
static_assert(__builtin_offsetof(RopeParams, q) == 0);
static_assert(__builtin_offsetof(RopeParams, k) == 8);
static_assert(__builtin_offsetof(RopeParams, q_out) == 16);
static_assert(__builtin_offsetof(RopeParams, k_out) == 24);
static_assert(__builtin_offsetof(RopeParams, rotation.positions) == 32);
static_assert(__builtin_offsetof(RopeParams, rotation.indptr) == 40);
static_assert(__builtin_offsetof(RopeParams, rotation.offsets) == 48);
static_assert(__builtin_offsetof(RopeParams, rotation.cos_sin_cache) == 56);
static_assert(__builtin_offsetof(RopeParams, setup.cos_sin_stride) == 64);
static_assert(__builtin_offsetof(RopeParams, setup.num_positions) == 72);
static_assert(__builtin_offsetof(RopeParams, setup.batch_size) == 76);
static_assert(__builtin_offsetof(RopeParams, setup.frequencies) == 80);
static_assert(__builtin_offsetof(RopeParams, q_strides.token) == 1104);
static_assert(__builtin_offsetof(RopeParams, q_strides.head) == 1112);
static_assert(__builtin_offsetof(RopeParams, k_strides.token) == 1120);
static_assert(__builtin_offsetof(RopeParams, k_strides.head) == 1128);
static_assert(__builtin_offsetof(RopeParams, q_out_strides.token) == 1136);
static_assert(__builtin_offsetof(RopeParams, q_out_strides.head) == 1144);
static_assert(__builtin_offsetof(RopeParams, k_out_strides.token) == 1152);
static_assert(__builtin_offsetof(RopeParams, k_out_strides.head) == 1160);
static_assert(__builtin_offsetof(RopeParams, num_tokens) == 1168);
static_assert(__builtin_offsetof(RopeParams, num_qo_heads) == 1172);
static_assert(__builtin_offsetof(RopeParams, num_kv_heads) == 1176);

template <>
struct Layout<SampleParams> {
  static constexpr const char* kName = "SampleParams";
  static constexpr uint64_t kAbi = 0x030e2bd5d2d7a39d;
};
static_assert(sizeof(SampleParams) == 144);
static_assert(__builtin_offsetof(SampleParams, input) == 0);
static_assert(__builtin_offsetof(SampleParams, token_ids) == 8);
static_assert(__builtin_offsetof(SampleParams, valid) == 16);
static_assert(__builtin_offsetof(SampleParams, row_indices) == 24);
static_assert(__builtin_offsetof(SampleParams, top_k) == 32);
static_assert(__builtin_offsetof(SampleParams, top_p) == 40);
static_assert(__builtin_offsetof(SampleParams, min_p) == 48);
static_assert(__builtin_offsetof(SampleParams, random.seeds) == 56);
static_assert(__builtin_offsetof(SampleParams, random.offsets) == 64);
static_assert(__builtin_offsetof(SampleParams, random.seed) == 72);
static_assert(__builtin_offsetof(SampleParams, random.offset) == 80);
static_assert(__builtin_offsetof(SampleParams, top_k_value) == 88);
static_assert(__builtin_offsetof(SampleParams, top_p_value) == 92);
static_assert(__builtin_offsetof(SampleParams, min_p_value) == 96);
static_assert(__builtin_offsetof(SampleParams, row_indices_are_int64) == 100);
static_assert(__builtin_offsetof(SampleParams, num_inputs) == 104);
static_assert(__builtin_offsetof(SampleParams, input_stride) == 112);
static_assert(__builtin_offsetof(SampleParams, num_rows) == 120);
static_assert(__builtin_offsetof(SampleParams, vocab_size) == 124);
static_assert(__builtin_offsetof(SampleParams, top_k_is_int64) == 128);
static_assert(__builtin_offsetof(SampleParams, top_k_first) == 132);
static_assert(__builtin_offsetof(SampleParams, seeds_per_row) == 136);
static_assert(__builtin_offsetof(SampleParams, offsets_per_row) == 140);

template <>
struct Layout<SegmentPackbitsParams> {
  static constexpr const char* kName = "SegmentPackbitsParams";
  static constexpr uint64_t kAbi = 0x17ec814663853340;
};
static_assert(sizeof(SegmentPackbitsParams) == 56);
static_assert(__builtin_offsetof(SegmentPackbitsParams, input) == 0);
static_assert(__builtin_offsetof(SegmentPackbitsParams, output) == 8);
static_assert(__builtin_offsetof(SegmentPackbitsParams, indptr) == 16);
static_assert(__builtin_offsetof(SegmentPackbitsParams, packed_indptr) == 24);
static_assert(__builtin_offsetof(SegmentPackbitsParams, num_elements) == 32);
static_assert(__builtin_offsetof(SegmentPackbitsParams, num_bytes) == 40);
static_assert(__builtin_offsetof(SegmentPackbitsParams, num_segments) == 48);

template <>
struct Layout<SeqLensParams> {
  static constexpr const char* kName = "SeqLensParams";
  static constexpr uint64_t kAbi = 0x1ab4f74e2dfe3b86;
};
static_assert(sizeof(SeqLensParams) == 32);
static_assert(__builtin_offsetof(SeqLensParams, page_indptr) == 0);
static_assert(__builtin_offsetof(SeqLensParams, last_page_len) == 8);
static_assert(__builtin_offsetof(SeqLensParams, seq_lens) == 16);
static_assert(__builtin_offsetof(SeqLensParams, batch_size) == 24);
static_assert(__builtin_offsetof(SeqLensParams, page_size) == 28);

template <>
struct Layout<Sm90GroupGemmParams> {
  static constexpr const char* kName = "Sm90GroupGemmParams";
  static constexpr uint64_t kAbi = 0xf0809410c684ccff;
};
static_assert(sizeof(Sm90GroupGemmParams) == 704);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_map) == 0);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_map) == 128);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, output_map) == 256);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_scale_map) == 384);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a) == 512);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b) == 520);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_scale) == 528);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_scale) == 536);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, indptr) == 544);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, weight_indices) == 552);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, output) == 560);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_row_stride) == 568);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_weight_stride) == 576);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_row_stride) == 584);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, output_row_stride) == 592);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_scale_row_stride) == 600);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_scale_block_stride) == 608);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_scale_weight_stride) == 616);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_scale_row_stride) == 624);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, b_scale_block_stride) == 632);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, num_rows) == 640);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, num_columns) == 644);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, depth) == 648);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, num_groups) == 652);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, num_weights) == 656);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, has_long_indptr) == 660);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, has_long_indices) == 664);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, reserved) == 668);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, a_box_rows) == 672);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, has_a_scale_map) == 676);
static_assert(__builtin_offsetof(Sm90GroupGemmParams, padding) == 680);

template <>
struct Layout<Sm90MlaParams> {
  static constexpr const char* kName = "Sm90MlaParams";
  static constexpr uint64_t kAbi = 0xce3368fddb62b942;
};
static_assert(sizeof(Sm90MlaParams) == 512);
static_assert(__builtin_offsetof(Sm90MlaParams, ckv_map) == 0);
static_assert(__builtin_offsetof(Sm90MlaParams, kpe_map) == 128);
static_assert(__builtin_offsetof(Sm90MlaParams, qo_indptr) == 256);
static_assert(__builtin_offsetof(Sm90MlaParams, mask) == 264);
static_assert(__builtin_offsetof(Sm90MlaParams, mask_indptr) == 272);
static_assert(__builtin_offsetof(Sm90MlaParams, q_pe) == 280);
static_assert(__builtin_offsetof(Sm90MlaParams, q_nope) == 288);
static_assert(__builtin_offsetof(Sm90MlaParams, out) == 296);
static_assert(__builtin_offsetof(Sm90MlaParams, lse) == 304);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.ckv) == 312);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.kpe) == 320);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.indptr) == 328);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.last_page_len) == 336);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.indices) == 344);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.len) == 352);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.page_size.divisor) == 356);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.page_size.magic) == 360);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.index.page_size.shift) == 364);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.ckv_page_stride) == 368);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.ckv_entry_stride) == 376);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.kpe_page_stride) == 384);
static_assert(__builtin_offsetof(Sm90MlaParams, kv.kpe_entry_stride) == 392);
static_assert(__builtin_offsetof(Sm90MlaParams, q_nope_token_stride) == 400);
static_assert(__builtin_offsetof(Sm90MlaParams, q_nope_head_stride) == 408);
static_assert(__builtin_offsetof(Sm90MlaParams, q_pe_token_stride) == 416);
static_assert(__builtin_offsetof(Sm90MlaParams, q_pe_head_stride) == 424);
static_assert(__builtin_offsetof(Sm90MlaParams, out_token_stride) == 432);
static_assert(__builtin_offsetof(Sm90MlaParams, out_head_stride) == 440);
static_assert(__builtin_offsetof(Sm90MlaParams, batch_size) == 448);
static_assert(__builtin_offsetof(Sm90MlaParams, num_qo_heads) == 452);
static_assert(__builtin_offsetof(Sm90MlaParams, sm_scale) == 456);
static_assert(__builtin_offsetof(Sm90MlaParams, v_scale) == 460);
static_assert(__builtin_offsetof(Sm90MlaParams, items) == 464);
static_assert(__builtin_offsetof(Sm90MlaParams, schedule) == 472);
static_assert(__builtin_offsetof(Sm90MlaParams, counters) == 480);
static_assert(__builtin_offsetof(Sm90MlaParams, partial_out) == 488);
static_assert(__builtin_offsetof(Sm90MlaParams, num_tokens) == 496);
static_assert(__builtin_offsetof(Sm90MlaParams, box_rows) == 500);
static_assert(__builtin_offsetof(Sm90MlaParams, reserved) == 504);

template <>
struct Layout<Sm90PrefillParams> {
  static constexpr const char* kName = "Sm90PrefillParams";
  static constexpr uint64_t kAbi = 0xc4eed90cda95bf10;
};
static_assert(sizeof(Sm90PrefillParams) == 704);
static_assert(__builtin_offsetof(Sm90PrefillParams, k_map) == 0);
static_assert(__builtin_offsetof(Sm90PrefillParams, v_map) == 128);
static_assert(__builtin_offsetof(Sm90PrefillParams, qo_indptr) == 256);
static_assert(__builtin_offsetof(Sm90PrefillParams, mask) == 264);
static_assert(__builtin_offsetof(Sm90PrefillParams, mask_indptr) == 272);
static_assert(__builtin_offsetof(Sm90PrefillParams, sinks) == 280);
static_assert(__builtin_offsetof(Sm90PrefillParams, q) == 288);
static_assert(__builtin_offsetof(Sm90PrefillParams, out) == 296);
static_assert(__builtin_offsetof(Sm90PrefillParams, lse) == 304);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.k) == 312);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.v) == 320);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.indptr) == 328);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.last_page_len) == 336);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.indices) == 344);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.len) == 352);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.page_size.divisor) == 356);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.page_size.magic) == 360);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.index.page_size.shift) == 364);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.k_page_stride) == 368);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.k_entry_stride) == 376);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.k_head_stride) == 384);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.v_page_stride) == 392);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.v_entry_stride) == 400);
static_assert(__builtin_offsetof(Sm90PrefillParams, kv.v_head_stride) == 408);
static_assert(__builtin_offsetof(Sm90PrefillParams, alibi_slopes) == 416);
static_assert(__builtin_offsetof(Sm90PrefillParams, rope_frequencies) == 424);
static_assert(__builtin_offsetof(Sm90PrefillParams, device_q_scale) == 432);
static_assert(__builtin_offsetof(Sm90PrefillParams, device_k_scale) == 440);
static_assert(__builtin_offsetof(Sm90PrefillParams, device_v_scale) == 448);
static_assert(__builtin_offsetof(Sm90PrefillParams, q_token_stride) == 456);
static_assert(__builtin_offsetof(Sm90PrefillParams, q_head_stride) == 464);
static_assert(__builtin_offsetof(Sm90PrefillParams, out_token_stride) == 472);
static_assert(__builtin_offsetof(Sm90PrefillParams, out_head_stride) == 480);
static_assert(__builtin_offsetof(Sm90PrefillParams, extras) == 488);
static_assert(__builtin_offsetof(Sm90PrefillParams, batch_size) == 616);
static_assert(__builtin_offsetof(Sm90PrefillParams, num_qo_heads) == 620);
static_assert(__builtin_offsetof(Sm90PrefillParams, num_kv_heads) == 624);
static_assert(__builtin_offsetof(Sm90PrefillParams, window_left) == 628);
static_assert(__builtin_offsetof(Sm90PrefillParams, sm_scale) == 632);
static_assert(__builtin_offsetof(Sm90PrefillParams, v_scale) == 636);
static_assert(__builtin_offsetof(Sm90PrefillParams, logits_soft_cap) == 640);
static_assert(__builtin_offsetof(Sm90PrefillParams, items) == 648);
static_assert(__builtin_offsetof(Sm90PrefillParams, schedule) == 656);
static_assert(__builtin_offsetof(Sm90PrefillParams, counters) == 664);
static_assert(__builtin_offsetof(Sm90PrefillParams, partial_out) == 672);
static_assert(__builtin_offsetof(Sm90PrefillParams, partial_lse) == 680);
static_assert(__builtin_offsetof(Sm90PrefillParams, qo_len) == 688);
static_assert(__builtin_offsetof(Sm90PrefillParams, num_tokens) == 692);
static_assert(__builtin_offsetof(Sm90PrefillParams, box_rows) == 696);
static_assert(__builtin_offsetof(Sm90PrefillParams, reserved) == 700);

template <>
struct Layout<SpeculativeParams> {
  static constexpr const char* kName = "SpeculativeParams";
  static constexpr uint64_t kAbi = 0x6d525117e26d9c36;
};
static_assert(sizeof(SpeculativeParams) == 144);
static_assert(__builtin_offsetof(SpeculativeParams, draft_probs) == 0);
static_assert(__builtin_offsetof(SpeculativeParams, target_probs) == 8);
static_assert(__builtin_offsetof(SpeculativeParams, draft_ids) == 16);
static_assert(__builtin_offsetof(SpeculativeParams, output_ids) == 24);
static_assert(__builtin_offsetof(SpeculativeParams, num_accepted) == 32);
static_assert(__builtin_offsetof(SpeculativeParams, num_emitted) == 40);
static_assert(__builtin_offsetof(SpeculativeParams, random.seeds) == 48);
static_assert(__builtin_offsetof(SpeculativeParams, random.offsets) == 56);
static_assert(__builtin_offsetof(SpeculativeParams, random.seed) == 64);
static_assert(__builtin_offsetof(SpeculativeParams, random.offset) == 72);
static_assert(__builtin_offsetof(SpeculativeParams, draft_row_stride) == 80);
static_assert(__builtin_offsetof(SpeculativeParams, draft_step_stride) == 88);
static_assert(__builtin_offsetof(SpeculativeParams, target_row_stride) == 96);
static_assert(__builtin_offsetof(SpeculativeParams, target_step_stride) == 104);
static_assert(__builtin_offsetof(SpeculativeParams, num_rows) == 112);
static_assert(__builtin_offsetof(SpeculativeParams, num_draft) == 116);
static_assert(__builtin_offsetof(SpeculativeParams, vocab_size) == 120);
static_assert(__builtin_offsetof(SpeculativeParams, draft_ids_are_int64) == 124);
static_assert(__builtin_offsetof(SpeculativeParams, adds_accepted) == 128);
static_assert(__builtin_offsetof(SpeculativeParams, adds_emitted) == 132);
static_assert(__builtin_offsetof(SpeculativeParams, seeds_per_row) == 136);
static_assert(__builtin_offsetof(SpeculativeParams, offsets_per_row) == 140);

template <>
struct Layout<TokenPositionsParams> {
  static constexpr const char* kName = "TokenPositionsParams";
  static constexpr uint64_t kAbi = 0x7963ed72fc70dfba;
};
static_assert(sizeof(TokenPositionsParams) == 40);
static_assert(__builtin_offsetof(TokenPositionsParams, append_indptr) == 0);
static_assert(__builtin_offsetof(TokenPositionsParams, seq_lens) == 8);
static_assert(__builtin_offsetof(TokenPositionsParams, batch_indices) == 16);
static_assert(__builtin_offsetof(TokenPositionsParams, positions) == 24);
static_assert(__builtin_offsetof(TokenPositionsParams, num_tokens) == 32);
static_assert(__builtin_offsetof(TokenPositionsParams, batch_size) == 36);
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

}  // namespace flashinfer
