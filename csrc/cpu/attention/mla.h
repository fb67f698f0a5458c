// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention on the CPU; what it computes stands in attention/mla/params.h. Tiles, threads and the
// order of work are those of prefill (cpu/attention/prefill.h), with all query heads in one group.
#pragma once

#include "attention/mla/params.h"
#include "cpu/attention/prefill.h"

namespace flashinfer::cpu {

template <class Config>
struct MlaState : TileState<Config::kHeadDimQk, Config::kHeadDimVo> {
  static constexpr int kDimCkv = Config::kHeadDimCkv, kDimKpe = Config::kHeadDimKpe;
  using Base = TileState<Config::kHeadDimQk, Config::kHeadDimVo>;
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using Kpe = typename Config::Kpe;
  using Out = typename Config::Out;
  using View = KvView<Config::kKvStorage>;
  using Base::kM, Base::kN, Base::q, Base::scores, Base::k_transposed, Base::v, Base::token, Base::qo_head;

  void attend(const MlaParams& params, int32_t request_idx, int32_t q_tile) {
    const int32_t q_begin = params.qo_indptr[request_idx], qo_len = params.qo_indptr[request_idx + 1] - q_begin;
    const View view = View::of_request(params.kv.index, request_idx);
    this->begin(q_tile, 0, params.num_qo_heads, qo_len, [&](int row) { load_q(params, row, q_begin + token[row]); });

    const Visibility visibility{Config::kMask, false, 0};
    const Range blocks = visibility.tiles_of(q_tile, kM, params.num_qo_heads, qo_len, view.len, kN);
    const float scale = params.sm_scale * kLog2E;
    for (int32_t block = blocks.begin; block < blocks.end; ++block) {
      const int32_t first_key = block * kN, num_keys = view.len - first_key < kN ? view.len - first_key : kN;
      load_kv(params.kv, view, first_key, num_keys);
      this->attend_block(scale, [&](int row) {
        const Range keys = visibility.keys_of(position_of(token[row], qo_len, view.len), view.len);
        const int32_t num_seen = keys.end - first_key;
        for (int j = num_seen > 0 ? num_seen : 0; j < kN; ++j) scores[row][j] = -kInfinity;
      });
    }
    for (int row = 0; row < this->num_rows; ++row) {
      const int64_t token_idx = q_begin + token[row];
      Out* dst =
          static_cast<Out*>(params.out) + token_idx * params.out_token_stride + qo_head[row] * params.out_head_stride;
      float* lse = params.lse != nullptr ? params.lse + token_idx * params.num_qo_heads + qo_head[row] : nullptr;
      this->store_row(row, dst, lse, scale, params.v_scale);
    }
  }

 private:
  void load_q(const MlaParams& params, int row, int64_t token_idx) {
    const Q* nope = static_cast<const Q*>(params.q_nope) + token_idx * params.q_nope_token_stride +
                    qo_head[row] * params.q_nope_head_stride;
    const Q* pe = static_cast<const Q*>(params.q_pe) + token_idx * params.q_pe_token_stride +
                  qo_head[row] * params.q_pe_head_stride;
    for (int d = 0; d < kDimCkv; ++d) q[row][d] = to_float(nope[d]);
    for (int d = 0; d < kDimKpe; ++d) q[row][kDimCkv + d] = to_float(pe[d]);
  }

  void load_kv(const LatentKvParams& kv, const View& view, int32_t first_key, int num_keys) {
    for (int j = 0; j < num_keys; ++j) {
      const KvRow at = view.locate(first_key + j);
      const Kv* ckv =
          static_cast<const Kv*>(kv.ckv) + at.page_idx * kv.ckv_page_stride + at.entry_idx * kv.ckv_entry_stride;
      const Kpe* kpe =
          static_cast<const Kpe*>(kv.kpe) + at.page_idx * kv.kpe_page_stride + at.entry_idx * kv.kpe_entry_stride;
      for (int d = 0; d < kDimCkv; ++d) v[j][d] = to_float(ckv[d]);
      if constexpr (Config::kScaleBlock > 0) {
        const float* scales = reinterpret_cast<const float*>(ckv + kDimCkv);
        for (int d = 0; d < kDimCkv; ++d) v[j][d] *= scales[d / Config::kScaleBlock];
      }
      for (int d = 0; d < kDimCkv; ++d) k_transposed[d][j] = v[j][d];
      for (int d = 0; d < kDimKpe; ++d) k_transposed[kDimCkv + d][j] = to_float(kpe[d]);
    }
    this->clear_keys_from(num_keys);
  }
};

template <class Config>
bool mla(const MlaParams& params) {
  using State = MlaState<Config>;
  return for_each_unit<State>(
      params.batch_size, 1, params.num_qo_heads, params.qo_indptr, 0,
      [&](State& state, int32_t request_idx, int32_t q_tile, int32_t) { state.attend(params, request_idx, q_tile); });
}

}  // namespace flashinfer::cpu
