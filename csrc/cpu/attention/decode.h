// SPDX-License-Identifier: Apache-2.0
// Decode attention on the CPU; what it computes stands in attention/decode/kernel.cuh.
//
// Work is cut into items (request, KV head, range of keys) that threads take one by one, so that one long request keeps
// them all busy. An item walks its keys in blocks that stay in the first-level cache: scores of all query heads of the
// group, online softmax, weighted sum of values. Ranges of one request are merged at the end.
#pragma once

#include <omp.h>

#include "attention/decode/params.h"
#include "attention/kv_view.cuh"
#include "attention/score.cuh"
#include "attention/sink.cuh"
#include "attention/visibility.cuh"
#include "cpu/math.h"
#include "cpu/rotary.h"
#include "cpu/scratch.h"
#include "cpu/types.h"

namespace flashinfer::cpu {

constexpr int kDecodeGroup = 8;     // query heads that share one pass over K and V
constexpr int kDecodeBlock = 16;    // keys converted to float at a time
constexpr int kMinRange = 256;      // keys of an item: below, starting and merging it costs more than it brings
constexpr int kItemsPerThread = 4;  // enough to even out items of different length

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline FloatLanes load_lanes(const float* src) {
  return *reinterpret_cast<const FloatLanes*>(src);
}
inline void store_lanes(float* dst, FloatLanes x) {
  *reinterpret_cast<FloatLanes*>(dst) = x;
}
// By halves, which vectorizes: four additions for sixteen lanes.
template <int kCount>
inline float sum_lanes(const float* lanes) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    float halves[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) halves[i] = lanes[i] + lanes[i + kCount / 2];
    return sum_lanes<kCount / 2>(halves);
  }
}
inline float sum_lanes(FloatLanes x) {
  return sum_lanes<kLanes>(reinterpret_cast<const float*>(&x));
}

// Rotate a row in place to its position; see attention/score.cuh.
template <int kHeadDim>
inline void rotate_row(const AttentionParams& params, float* row, int32_t position) {
  for (int i = 0; i < kHeadDim / 2; ++i) {
    float cos, sin;
    rotary_cos_sin(position, params.rope_frequencies[i], cos, sin);
    const float low = row[i], high = row[i + kHeadDim / 2];
    row[i] = low * cos - high * sin;
    row[i + kHeadDim / 2] = high * cos + low * sin;
  }
}

// The running softmax of up to kDecodeGroup query heads of one request over a range of keys.
template <class Config>
struct DecodeState {
  static constexpr int kDimQk = Config::kHeadDimQk, kDimVo = Config::kHeadDimVo;
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  using S = Score<Config>;
  static_assert(kDimQk % kLanes == 0 && kDimVo % kLanes == 0);

  float q[kDecodeGroup][kDimQk];
  float out[kDecodeGroup][kDimVo];
  float max[kDecodeGroup], sum[kDecodeGroup], slope[kDecodeGroup];
  int32_t request_idx, first_head;

  void begin(const AttentionParams& params, int32_t request_idx, int32_t first_head, int num_heads, int32_t kv_len) {
    std::memset(this, 0, sizeof(*this));
    this->request_idx = request_idx;
    this->first_head = first_head;
    for (int h = 0; h < num_heads; ++h) {
      const Q* src = static_cast<const Q*>(params.q) + request_idx * params.q_token_stride +
                     (first_head + h) * params.q_head_stride;
      for (int d = 0; d < kDimQk; ++d) q[h][d] = to_float(src[d]);
      if constexpr (S::kHasRope) rotate_row<kDimQk>(params, q[h], kv_len - 1);
      slope[h] = S::alibi_slope(params, first_head + h);
    }
    for (int h = 0; h < kDecodeGroup; ++h) max[h] = -kInfinity;
  }

  // num_heads is a constant after inlining for the common group sizes.
  template <class View>
  void attend(const AttentionParams& params, const View& view, int32_t kv_head, int num_heads, int32_t begin,
              int32_t end) {
    const float scale = S::scale_log2(params);
    alignas(64) float buffer[kDecodeBlock][kDimQk > kDimVo ? kDimQk : kDimVo];
    alignas(64) float scores[kDecodeGroup][kDecodeBlock];
    const float* rows[kDecodeBlock];
    KvRow located[kDecodeBlock];
    for (int32_t first = begin; first < end; first += kDecodeBlock) {
      const int num_rows = end - first < kDecodeBlock ? end - first : kDecodeBlock;
      if (visibility_of<Config>(params, request_idx).sees_tile(rows_of(num_heads, view.len), first, num_rows) ==
          kSeesNone)
        continue;
      for (int j = 0; j < kDecodeBlock; ++j) {
        located[j] = j < num_rows ? view.locate(first + j) : located[0];
        // Rows of one head lie far apart, where the hardware's prefetchers do not follow.
        prefetch<kDimVo>(static_cast<const Kv*>(params.kv.v) + View::v_offset(params.kv, located[j], kv_head));
        const KvRow ahead = first + kDecodeBlock + j < end ? view.locate(first + kDecodeBlock + j) : located[j];
        prefetch<kDimQk>(static_cast<const Kv*>(params.kv.k) + View::k_offset(params.kv, ahead, kv_head));
        const Kv* k = static_cast<const Kv*>(params.kv.k) + View::k_offset(params.kv, located[j], kv_head);
        rows[j] = as_floats<kDimQk, S::kHasRope>(k, buffer[j]);
        if constexpr (S::kHasRope) rotate_row<kDimQk>(params, buffer[j], first + j);
      }
      for (int h = 0; h < num_heads; ++h) {
        multiply_qk(rows, num_rows, h, scores[h]);
        transform(params, scores[h], h, first, num_rows, view.len);
        softmax(scores[h], h, scale);
      }
      for (int j = 0; j < num_rows; ++j) {
        const Kv* v = static_cast<const Kv*>(params.kv.v) + View::v_offset(params.kv, located[j], kv_head);
        rows[j] = as_floats<kDimVo, false>(v, buffer[j]);
      }
      for (int h = 0; h < num_heads; ++h) multiply_pv(rows, num_rows, scores[h], h);
    }
  }

 private:
  TileRows rows_of(int num_heads, int32_t kv_len) const {
    return {{first_head, first_head + num_heads - 1}, {kv_len - 1, kv_len - 1}};
  }

  template <int kDim>
  static void prefetch(const Kv* row) {
    for (int i = 0; i < int(kDim * sizeof(Kv)); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
  }

  // A row as floats: where it is, if it holds floats and none will be changed, else converted.
  template <int kDim, bool kCopy>
  static const float* as_floats(const Kv* row, float* buffer) {
    if constexpr (sizeof(Kv) == 4 && !kCopy) {
      return reinterpret_cast<const float*>(row);
    } else {
      for (int d = 0; d < kDim; ++d) buffer[d] = to_float(row[d]);
      return buffer;
    }
  }

  void multiply_qk(const float* const (&rows)[kDecodeBlock], int num_rows, int h, float* scores) const {
    for (int j = 0; j < num_rows; j += 4) {  // rows past num_rows repeat the first: transform overwrites their scores
      FloatLanes acc[4] = {};
      for (int d = 0; d < kDimQk; d += kLanes) {
        const FloatLanes x = load_lanes(&q[h][d]);
        for (int i = 0; i < 4; ++i) acc[i] += x * load_lanes(rows[j + i] + d);
      }
      for (int i = 0; i < 4; ++i) scores[j + i] = sum_lanes(acc[i]);
    }
  }

  // Keys before those that the query may see are none of an item's (DecodeItems).
  void transform(const AttentionParams& params, float* scores, int h, int32_t first, int num_rows,
                 int32_t kv_len) const {
    for (int j = num_rows; j < kDecodeBlock; ++j) scores[j] = -kInfinity;
    const int32_t head = first_head + h, position = kv_len - 1;
    if constexpr (!S::kIsPlain) {
      for (int j = 0; j < num_rows; ++j) {
        scores[j] = S::transform(params, scores[j], slope[h], {request_idx, head, position, first + j});
      }
    }
    using Function = typename Config::Function;
    if constexpr (Function::kHasEnd || Function::kHasHoles || Function::kHasGap) {
      const auto visibility = visibility_of<Config>(params, request_idx);
      const Range keys = visibility.keys_of(position, kv_len), gap = visibility.gap_of(position, kv_len);
      const Seen seen = visibility.sees_tile({{head, head}, {position, position}}, first, num_rows);
      if (seen == kSeesAll && visibility.contains_all(keys, first, num_rows, gap)) return;
      for (int j = 0; j < num_rows; ++j) {
        const bool is_inside = first + j < keys.end && !visibility.is_in_gap(gap, first + j);
        const bool visible = is_inside && visibility.sees(head, position, first + j);
        scores[j] = visible ? scores[j] : -kInfinity;
      }
    }
  }

  // Scores become weights.
  void softmax(float* scores, int h, float scale) {
    float new_max = max[h];
    for (int j = 0; j < kDecodeBlock; ++j) new_max = scores[j] > new_max ? scores[j] : new_max;
    const float shift = new_max == -kInfinity ? 0.f : new_max * scale;
    float block_sum = 0.f;
#pragma omp simd reduction(+ : block_sum)
    for (int j = 0; j < kDecodeBlock; ++j) {
      scores[j] = fast_exp2(scores[j] * scale - shift);
      block_sum += scores[j];
    }
    if (new_max != max[h]) {
      const float decay = fast_exp2(max[h] * scale - shift);
      sum[h] *= decay;
      for (int d = 0; d < kDimVo; ++d) out[h][d] *= decay;
      max[h] = new_max;
    }
    sum[h] += block_sum;
  }

  void multiply_pv(const float* const (&rows)[kDecodeBlock], int num_rows, const float* weights, int h) {
    constexpr int kStrip = kDimVo % (4 * kLanes) == 0 ? 4 : kDimVo % (2 * kLanes) == 0 ? 2 : 1;  // registers of output
    for (int d = 0; d < kDimVo; d += kStrip * kLanes) {
      FloatLanes acc[kStrip];
      for (int i = 0; i < kStrip; ++i) acc[i] = load_lanes(&out[h][d + i * kLanes]);
      for (int j = 0; j < num_rows; ++j) {
        for (int i = 0; i < kStrip; ++i) acc[i] += weights[j] * load_lanes(rows[j] + d + i * kLanes);
      }
      for (int i = 0; i < kStrip; ++i) store_lanes(&out[h][d + i * kLanes], acc[i]);
    }
  }
};

// A merged or unmerged result: output and LSE of the heads of one group.
template <class Config>
struct DecodePartial {
  float out[kDecodeGroup][Config::kHeadDimVo];
  float lse[kDecodeGroup];
};

template <class Config>
inline void store_decode(const AttentionParams& params, const DecodePartial<Config>& result, int32_t request_idx,
                         int32_t first_head, int num_heads) {
  using O = typename Config::O;
  const float v_scale = Score<Config>::v_scale(params);
  for (int h = 0; h < num_heads; ++h) {
    O* dst =
        static_cast<O*>(params.out) + request_idx * params.out_token_stride + (first_head + h) * params.out_head_stride;
    float lse = result.lse[h], factor = v_scale;
    if constexpr (Config::kHasSinks) factor *= add_sink(params.sinks[first_head + h], lse);
    for (int d = 0; d < Config::kHeadDimVo; ++d) dst[d] = from_float<O>(result.out[h][d] * factor);
    if (params.lse != nullptr) params.lse[int64_t(request_idx) * params.num_qo_heads + first_head + h] = lse;
  }
}

template <class Config>
inline void merge_decode(const DecodePartial<Config>* partials, int num_partials, int num_heads,
                         DecodePartial<Config>& merged) {
  for (int h = 0; h < num_heads; ++h) {
    float max = -kInfinity, sum = 0.f, out[Config::kHeadDimVo] = {};
    for (int i = 0; i < num_partials; ++i) max = __builtin_fmaxf(max, partials[i].lse[h]);
    for (int i = 0; i < num_partials; ++i) {
      const float weight = partials[i].lse[h] == -kInfinity ? 0.f : __builtin_exp2f(partials[i].lse[h] - max);
      sum += weight;
      for (int d = 0; d < Config::kHeadDimVo; ++d) out[d] += weight * partials[i].out[h][d];
    }
    for (int d = 0; d < Config::kHeadDimVo; ++d) merged.out[h][d] = sum > 0.f ? out[d] / sum : 0.f;
    merged.lse[h] = sum > 0.f ? max + __builtin_log2f(sum) : -kInfinity;
  }
}

// How a batch is cut into items. Item i of request r, head block b is entry (range_indptr[r] + i) * num_head_blocks +
// b.
template <class Config>
struct DecodeItems {
  using View = KvView<Config::kKvStorage>;
  int32_t range_len, num_head_blocks;
  int32_t* range_indptr;  // [batch_size + 1]

  static int32_t first_key(const AttentionParams& params, int32_t request_idx, int32_t kv_len) {
    return visibility_of<Config>(params, request_idx).keys_of(kv_len - 1, kv_len).begin;
  }

  void cut(const AttentionParams& params, int num_threads) {
    int64_t num_keys = 0;
    for (int32_t r = 0; r < params.batch_size; ++r) {
      const int32_t kv_len = View::of_request(params.kv.index, r).len;
      num_keys += kv_len - first_key(params, r, kv_len);
    }
    const int64_t even = num_keys * num_head_blocks / (int64_t(num_threads) * kItemsPerThread) + 1;
    range_len = int32_t(even < kMinRange ? kMinRange : ceil_div(even, kDecodeBlock) * kDecodeBlock);
    range_indptr[0] = 0;
    for (int32_t r = 0; r < params.batch_size; ++r) {
      const int32_t kv_len = View::of_request(params.kv.index, r).len;
      const int32_t num_ranges = ceil_div(kv_len - first_key(params, r, kv_len), range_len);
      range_indptr[r + 1] = range_indptr[r] + (num_ranges > 1 ? num_ranges : 1);
    }
  }

  int32_t request_of(int32_t range, int32_t batch_size) const {
    int32_t low = 0, high = batch_size;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (range_indptr[middle] <= range ? low : high) = middle;
    }
    return low;
  }
};

template <class Config>
bool decode(const DecodeParams& params) {
  using View = KvView<Config::kKvStorage>;
  using Partial = DecodePartial<Config>;
  if (params.batch_size == 0) return true;
  const int32_t group = params.num_qo_heads / params.num_kv_heads, blocks_per_kv_head = ceil_div(group, kDecodeGroup);
  const Scratch<int32_t> range_indptr(params.batch_size + 1);
  if (range_indptr.data == nullptr) return false;
  DecodeItems<Config> items{0, params.num_kv_heads * blocks_per_kv_head, range_indptr.data};
  items.cut(params, omp_get_max_threads());
  const int32_t num_ranges = items.range_indptr[params.batch_size];
  const int64_t num_items = int64_t(num_ranges) * items.num_head_blocks;
  const bool is_split = num_ranges > params.batch_size;
  const Scratch<Partial> partials(is_split ? num_items : 0);  // ranges of one request and head block side by side
  if (partials.data == nullptr) return false;
  const auto partial_of = [&](int32_t request_idx, int32_t block, int32_t range) -> Partial& {
    const int32_t first = items.range_indptr[request_idx], count = items.range_indptr[request_idx + 1] - first;
    return partials.data[int64_t(first) * items.num_head_blocks + int64_t(block) * count + range - first];
  };
  const auto head_block = [&](int32_t block, int32_t& first_head, int& num_heads) {
    const int32_t first = block % blocks_per_kv_head * kDecodeGroup;
    first_head = block / blocks_per_kv_head * group + first;
    num_heads = group - first < kDecodeGroup ? group - first : kDecodeGroup;
  };

#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < num_items; ++item) {
    const int32_t range = int32_t(item / items.num_head_blocks), block = int32_t(item % items.num_head_blocks);
    const int32_t request_idx = items.request_of(range, params.batch_size);
    const View view = View::of_request(params.kv.index, request_idx);
    int32_t first_head;
    int num_heads;
    head_block(block, first_head, num_heads);
    const int32_t first_key = DecodeItems<Config>::first_key(params, request_idx, view.len);
    const int32_t begin = first_key + (range - items.range_indptr[request_idx]) * items.range_len;
    const int32_t end = view.len - begin < items.range_len ? view.len : begin + items.range_len;

    DecodeState<Config> state;
    state.begin(params, request_idx, first_head, num_heads, view.len);
    state.attend(params, view, block / blocks_per_kv_head, num_heads, begin, end);
    Partial local;
    const bool whole = items.range_indptr[request_idx + 1] - items.range_indptr[request_idx] == 1;
    Partial& result = whole ? local : partial_of(request_idx, block, range);
    for (int h = 0; h < num_heads; ++h) {
      const float sum = state.sum[h], rcp_sum = sum > 0.f ? 1.f / sum : 0.f;
      for (int d = 0; d < Config::kHeadDimVo; ++d) result.out[h][d] = state.out[h][d] * rcp_sum;
      const float scale = Score<Config>::scale_log2(params);
      result.lse[h] = sum > 0.f ? state.max[h] * scale + __builtin_log2f(sum) : -kInfinity;
    }
    if (whole) store_decode<Config>(params, result, request_idx, first_head, num_heads);
  }

  if (is_split) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < int64_t(params.batch_size) * items.num_head_blocks; ++i) {
      const int32_t request_idx = int32_t(i / items.num_head_blocks), block = int32_t(i % items.num_head_blocks);
      const int32_t first_range = items.range_indptr[request_idx];
      const int32_t count = items.range_indptr[request_idx + 1] - first_range;
      if (count == 1) continue;
      int32_t first_head;
      int num_heads;
      head_block(block, first_head, num_heads);
      Partial merged;
      merge_decode<Config>(&partial_of(request_idx, block, first_range), count, num_heads, merged);
      store_decode<Config>(params, merged, request_idx, first_head, num_heads);
    }
  }
  return true;
}

}  // namespace flashinfer::cpu
