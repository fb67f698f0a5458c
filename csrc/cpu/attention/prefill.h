// SPDX-License-Identifier: Apache-2.0
// Prefill attention on the CPU; what it computes stands in attention/prefill/kernel.cuh.
//
// A work unit is a tile of query rows of one KV head, a row being (token, head in group) with the head innermost. It
// walks the keys in blocks: the block is converted to float once, keys transposed, so that S = Q Kᵀ and O += P V are
// both sums of "one number times a row of registers"; 128 query rows share the conversion. Threads take units one by
// one, the later tiles of a request first, which under a causal mask are the longer ones.
#pragma once

#include "attention/prefill/params.h"
#include "cpu/attention/decode.h"

namespace flashinfer::cpu {

constexpr int kPrefillBlockM = 128;
constexpr int kPrefillBlockN = 64;

// c[kNumRows, kNumVecs * kLanes] (+)= a[kNumRows, depth] b[depth, kNumVecs * kLanes], c in registers throughout.
template <int kNumRows, int kNumVecs>
inline void multiply_micro_tile(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                                int depth, bool accumulate) {
  FloatLanes acc[kNumRows][kNumVecs] = {};
  if (accumulate) {
    for (int r = 0; r < kNumRows; ++r) {
      for (int i = 0; i < kNumVecs; ++i) acc[r][i] = load_lanes(c + r * c_stride + i * kLanes);
    }
  }
  for (int k = 0; k < depth; ++k) {
    FloatLanes row[kNumVecs];
    for (int i = 0; i < kNumVecs; ++i) row[i] = load_lanes(b + k * b_stride + i * kLanes);
    for (int r = 0; r < kNumRows; ++r) {
      const float x = a[r * a_stride + k];
      for (int i = 0; i < kNumVecs; ++i) acc[r][i] += x * row[i];
    }
  }
  for (int r = 0; r < kNumRows; ++r) {
    for (int i = 0; i < kNumVecs; ++i) store_lanes(c + r * c_stride + i * kLanes, acc[r][i]);
  }
}

// c[num_rows, kNumColumns] (+)= a[num_rows, depth] b[depth, kNumColumns]; num_rows is rounded up to a micro tile.
template <int kNumColumns>
inline void multiply(const float* a, int a_stride, const float* b, float* c, int num_rows, int depth, bool accumulate) {
  constexpr int kMicroRows = 4;
  constexpr int kMaxVecs = kLanes == 16 ? 4 : 2;  // 16 accumulators of the 32 registers, or 8 of the 16
  constexpr int kNumVecs = kNumColumns % (kMaxVecs * kLanes) == 0 ? kMaxVecs : kNumColumns % (2 * kLanes) == 0 ? 2 : 1;
  static_assert(kNumColumns % (kNumVecs * kLanes) == 0);
  for (int column = 0; column < kNumColumns; column += kNumVecs * kLanes) {
    for (int row = 0; row < num_rows; row += kMicroRows) {
      multiply_micro_tile<kMicroRows, kNumVecs>(a + row * a_stride, a_stride, b + column, kNumColumns,
                                                c + row * kNumColumns + column, kNumColumns, depth, accumulate);
    }
  }
}

// Up to kM query rows and kN keys of one unit as floats, and its running softmax; too large for the stack.
template <int kDimQk, int kDimVo>
struct TileState {
  static constexpr int kM = kPrefillBlockM, kN = kPrefillBlockN;
  alignas(64) float q[kM][kDimQk];
  alignas(64) float out[kM][kDimVo];
  alignas(64) float scores[kM][kN];
  alignas(64) float k_transposed[kDimQk][kN];
  alignas(64) float v[kN][kDimVo];
  float max[kM], sum[kM];
  int32_t token[kM];  // of a row, within the request
  int32_t qo_head[kM];
  int num_rows;

  // The rows of a query tile, token by token; load(row) fills q[row].
  template <class Load>
  void begin(int32_t q_tile, int32_t kv_head, int32_t group_size, int32_t qo_len, const Load& load) {
    const int32_t first_row = q_tile * kM, num_left = qo_len * group_size - first_row;
    num_rows = num_left < kM ? num_left : kM;
    for (int row = 0; row < num_rows; ++row) {
      token[row] = (first_row + row) / group_size;
      qo_head[row] = kv_head * group_size + (first_row + row) % group_size;
      load(row);
      max[row] = -kInfinity;
      sum[row] = 0.f;
      std::memset(out[row], 0, sizeof(out[row]));
    }
    // A product takes whole micro tiles; rows past the last are computed and never looked at.
    for (int row = num_rows; row < kM && row % 4 != 0; ++row) {
      std::memset(q[row], 0, sizeof(q[row]));
      std::memset(out[row], 0, sizeof(out[row]));
      std::memset(scores[row], 0, sizeof(scores[row]));
    }
  }

  // What lies beyond the last key may be NaN, and 0 x NaN is NaN.
  void clear_keys_from(int num_keys) {
    for (int j = num_keys; j < kN; ++j) {
      for (int d = 0; d < kDimQk; ++d) k_transposed[d][j] = 0.f;
      std::memset(v[j], 0, sizeof(v[j]));
    }
  }

  // The keys from first_key on that were loaded; mask(row) hides scores of a row.
  template <class Mask>
  void attend_block(float scale, const Mask& mask) {
    multiply<kN>(q[0], kDimQk, k_transposed[0], scores[0], num_rows, kDimQk, false);
    for (int row = 0; row < num_rows; ++row) {
      mask(row);
      softmax(row, scale);
    }
    multiply<kDimVo>(scores[0], kN, v[0], out[0], num_rows, kN, true);
  }

  // sink: of the row's head, or null.
  template <class Out>
  void store_row(int row, Out* dst, float* lse, float scale, float v_scale, const float* sink = nullptr) const {
    float row_lse = sum[row] > 0.f ? max[row] * scale + __builtin_log2f(sum[row]) : -kInfinity;
    float factor = sum[row] > 0.f ? v_scale / sum[row] : 0.f;
    if (sink != nullptr) factor *= add_sink(*sink, row_lse);
    for (int d = 0; d < kDimVo; ++d) dst[d] = from_float<Out>(out[row][d] * factor);
    if (lse != nullptr) *lse = row_lse;
  }

 private:
  // Scores become weights; the sums and the output so far are rescaled to the new maximum.
  void softmax(int row, float scale) {
    float* row_scores = scores[row];
    float new_max = max[row];
#pragma omp simd reduction(max : new_max)
    for (int j = 0; j < kN; ++j) new_max = row_scores[j] > new_max ? row_scores[j] : new_max;
    const float shift = new_max == -kInfinity ? 0.f : new_max * scale;
    float block_sum = 0.f;
#pragma omp simd reduction(+ : block_sum)
    for (int j = 0; j < kN; ++j) {
      row_scores[j] = fast_exp2(row_scores[j] * scale - shift);
      block_sum += row_scores[j];
    }
    if (new_max != max[row]) {
      const float decay = fast_exp2(max[row] * scale - shift);
      sum[row] *= decay;
      for (int d = 0; d < kDimVo; ++d) out[row][d] *= decay;
      max[row] = new_max;
    }
    sum[row] += block_sum;
  }
};

// What one unit works on.
template <class Config>
struct PrefillState : TileState<Config::kHeadDimQk, Config::kHeadDimVo> {
  static constexpr int kDimQk = Config::kHeadDimQk, kDimVo = Config::kHeadDimVo;
  using Base = TileState<kDimQk, kDimVo>;
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using Out = typename Config::Out;
  using S = Score<Config>;
  using View = KvView<Config::kKvStorage>;
  using Base::kM, Base::kN, Base::q, Base::scores, Base::k_transposed, Base::v, Base::token, Base::qo_head;
  float slope[kPrefillBlockM];

  void attend(const PrefillParams& params, int32_t request_idx, int32_t q_tile, int32_t kv_head) {
    const int32_t q_begin = params.qo_indptr != nullptr ? params.qo_indptr[request_idx] : request_idx * params.qo_len;
    const int32_t qo_len = params.qo_indptr != nullptr ? params.qo_indptr[request_idx + 1] - q_begin : params.qo_len;
    const View view = View::of_request(params.kv.index, request_idx);
    const int32_t group_size = params.num_qo_heads / params.num_kv_heads;
    this->begin(q_tile, kv_head, group_size, qo_len, [&](int row) { load_q(params, row, q_begin, qo_len, view.len); });

    const auto visibility = visibility_of<Config>(params, request_idx);
    const Range blocks = visibility.tiles_of(q_tile, kM, group_size, qo_len, view.len, kN);
    Range hidden = {0, 0};
    if (Config::Function::kHasGap) hidden = visibility.tiles_hidden_of(q_tile, kM, group_size, qo_len, view.len, kN);
    const float scale = S::scale_log2(params), v_scale = S::v_scale(params);
    for (int32_t block = blocks.begin; block < blocks.end; ++block) {
      if (block >= hidden.begin && block < hidden.end) continue;
      const int32_t first_key = block * kN, num_keys = view.len - first_key < kN ? view.len - first_key : kN;
      if constexpr (Config::Function::kProvesTiles) {
        const TileRows rows = rows_of(kv_head, group_size, qo_len, view.len);
        if (visibility.sees_tile(rows, first_key, num_keys) == kSeesNone) continue;
      }
      load_kv(params, view, kv_head, first_key, num_keys);
      this->attend_block(scale,
                         [&](int row) { mask(params, row, request_idx, first_key, num_keys, qo_len, view.len); });
    }
    for (int row = 0; row < this->num_rows; ++row) {
      const int64_t token_idx = q_begin + token[row];
      Out* dst =
          static_cast<Out*>(params.out) + token_idx * params.out_token_stride + qo_head[row] * params.out_head_stride;
      float* lse = params.lse != nullptr ? params.lse + token_idx * params.num_qo_heads + qo_head[row] : nullptr;
      const float* sink = Config::kHasSinks ? params.sinks + qo_head[row] : nullptr;
      this->store_row(row, dst, lse, scale, v_scale, sink);
    }
  }

 private:
  TileRows rows_of(int32_t kv_head, int32_t group_size, int32_t qo_len, int32_t kv_len) const {
    const int32_t first_head = kv_head * group_size, last_row = this->num_rows - 1;
    return {{first_head, first_head + group_size - 1},
            {position_of(token[0], qo_len, kv_len), position_of(token[last_row], qo_len, kv_len)}};
  }

  void load_q(const PrefillParams& params, int row, int32_t q_begin, int32_t qo_len, int32_t kv_len) {
    slope[row] = S::alibi_slope(params, qo_head[row]);
    const Q* src = static_cast<const Q*>(params.q) + int64_t(q_begin + token[row]) * params.q_token_stride +
                   qo_head[row] * params.q_head_stride;
    for (int d = 0; d < kDimQk; ++d) q[row][d] = to_float(src[d]);
    if constexpr (S::kHasRope) rotate_row<kDimQk>(params, q[row], position_of(token[row], qo_len, kv_len));
  }

  void load_kv(const PrefillParams& params, const View& view, int32_t kv_head, int32_t first_key, int num_keys) {
    alignas(64) float row[kDimQk];
    for (int j = 0; j < num_keys; ++j) {
      const KvRow at = view.locate(first_key + j);
      const Kv* k_src = static_cast<const Kv*>(params.kv.k) + View::k_offset(params.kv, at, kv_head);
      const Kv* v_src = static_cast<const Kv*>(params.kv.v) + View::v_offset(params.kv, at, kv_head);
      for (int d = 0; d < kDimQk; ++d) row[d] = to_float(k_src[d]);
      if constexpr (S::kHasRope) rotate_row<kDimQk>(params, row, first_key + j);
      for (int d = 0; d < kDimQk; ++d) k_transposed[d][j] = row[d];
      for (int d = 0; d < kDimVo; ++d) v[j][d] = to_float(v_src[d]);
    }
    this->clear_keys_from(num_keys);
  }

  void mask(const PrefillParams& params, int row, int32_t request_idx, int32_t first_key, int num_keys, int32_t qo_len,
            int32_t kv_len) {
    float* row_scores = scores[row];
    const int32_t position = position_of(token[row], qo_len, kv_len);
    if constexpr (!S::kIsPlain) {
      for (int j = 0; j < num_keys; ++j) {
        const ScoreAt at = {request_idx, qo_head[row], position, first_key + j};
        row_scores[j] = S::transform(params, row_scores[j], slope[row], at);
      }
    }
    const auto visibility = visibility_of<Config>(params, request_idx);
    const Range keys = visibility.keys_of(position, kv_len), gap = visibility.gap_of(position, kv_len);
    const Seen seen = visibility.sees_tile({{qo_head[row], qo_head[row]}, {position, position}}, first_key, kN);
    if (!visibility.has_bits() && seen == kSeesAll && visibility.contains_all(keys, first_key, kN, gap)) return;
    for (int word = 0; word < kN; word += 32) {
      uint32_t bits = 0xffffffffu;
      if (visibility.has_bits()) {
        bits = visibility.bits_of(params, request_idx, token[row], first_key + word, qo_len, kv_len);
      }
      for (int j = 0; j < 32; ++j) {
        const int32_t key = first_key + word + j;
        const bool is_inside = visibility.contains(keys, key) && !visibility.is_in_gap(gap, key);
        const bool visible = is_inside && (bits >> j) & 1 && visibility.sees(qo_head[row], position, key);
        row_scores[word + j] = visible ? row_scores[word + j] : -kInfinity;
      }
    }
  }
};

// attend(state, request_idx, q_tile, kv_head) for every unit, by the threads, which have a state each. False: there was
// no memory for that.
template <class State, class Attend>
inline bool for_each_unit(int32_t batch_size, int32_t num_kv_heads, int32_t group_size, const int32_t* qo_indptr,
                          int32_t single_qo_len, const Attend& attend) {
  const Scratch<int64_t> starts(batch_size + 1);
  int64_t* const tile_indptr = starts.data;
  if (tile_indptr == nullptr) return false;
  tile_indptr[0] = 0;
  for (int32_t i = 0; i < batch_size; ++i) {
    const int64_t qo_len = qo_indptr != nullptr ? qo_indptr[i + 1] - qo_indptr[i] : single_qo_len;
    tile_indptr[i + 1] = tile_indptr[i] + ceil_div(qo_len * group_size, int64_t(kPrefillBlockM));
  }
  const int64_t num_tiles = tile_indptr[batch_size];

  bool fits = true;
#pragma omp parallel if (num_tiles * num_kv_heads > 1) reduction(&& : fits)
  {
    const Scratch<State> state;
    fits = state.data != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t unit = num_tiles * num_kv_heads - 1; unit >= 0; --unit) {
      if (!fits) continue;
      const int64_t tile = unit / num_kv_heads;
      int32_t low = 0, high = batch_size;  // tile_indptr[low] <= tile < tile_indptr[high]
      while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (tile_indptr[middle] <= tile ? low : high) = middle;
      }
      attend(*state.data, low, int32_t(tile - tile_indptr[low]), int32_t(unit % num_kv_heads));
    }
  }
  return fits;
}

template <class Config>
bool prefill(const PrefillParams& params) {
  using State = PrefillState<Config>;
  return for_each_unit<State>(params.batch_size, params.num_kv_heads, params.num_qo_heads / params.num_kv_heads,
                              params.qo_indptr, params.qo_len,
                              [&](State& state, int32_t request_idx, int32_t q_tile, int32_t kv_head) {
                                state.attend(params, request_idx, q_tile, kv_head);
                              });
}

}  // namespace flashinfer::cpu
