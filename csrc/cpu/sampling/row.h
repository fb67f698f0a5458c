// SPDX-License-Identifier: Apache-2.0
// One row of the vocabulary on the CPU: its weights, the filters and the draw. What they mean stands in
// sampling/threshold.cuh; sums are taken in double. Every filter is a threshold here, and the draw an inverse CDF.
#pragma once

#include "cpu/scratch.h"
#include "cpu/types.h"
#include "sampling/params.h"

namespace flashinfer::cpu {

// e^x for x <= 0 (0 below -87, NaN for NaN), in plain arithmetic, so that a loop over it vectorizes. Relative error
// below 2e-7.
inline float exp_nonpositive(float x) {
  const float y = (x > -87.f ? x : -87.f) * 1.44269504088896340736f;
  const float whole = __builtin_floorf(y + 0.5f);
  // 2^(y - whole) by its Taylor polynomial on [-0.5, 0.5].
  const float z = (y - whole) * 0.69314718055994530942f;
  const float series =
      1.f + z * (1.f + z * (0.5f + z * (1.f / 6 + z * (1.f / 24 + z * (1.f / 120 + z * (1.f / 720))))));
  const float power = bit_cast<float>(static_cast<int32_t>(whole + 127.f) << 23);
  return x < -87.f ? 0.f : x == x ? series * power : x;
}

inline int64_t load_index(const void* ids, int are_int64, int64_t i) {
  return are_int64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

// Philox4x32-10; see device/philox.cuh.
struct RandomWords {
  uint32_t word[4];
  // Uniform on [0, 1) in steps of 2^-53, from two words.
  double uniform(int i) const { return static_cast<double>((uint64_t(word[i]) << 32 | word[i + 1]) >> 11) * 0x1p-53; }
};

inline RandomWords philox(uint64_t seed, uint64_t subsequence, uint64_t counter) {
  uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), uint32_t(subsequence), uint32_t(subsequence >> 32)};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[1] = uint32_t(p1);
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

template <class Params>
inline RandomWords random_words(const Params& params, int64_t row, int i) {
  const RandomState& state = params.random;
  const uint64_t seed = state.seeds ? state.seeds[params.seeds_per_row ? row : 0] : state.seed;
  const uint64_t offset = state.offsets ? state.offsets[params.offsets_per_row ? row : 0] : state.offset;
  return philox(seed, uint64_t(row), offset / 4 + i);
}

// One row's scores as floats, its weights, and space to search in.
struct RowBuffer {
  Scratch<float> memory;
  float* scores;   // [vocab_size]; null where there is no memory
  float* weights;  // [vocab_size]
  float* search;   // [vocab_size]

  explicit RowBuffer(int64_t vocab_size)
      : memory(3 * vocab_size),
        scores(memory.data),
        weights(scores != nullptr ? scores + vocab_size : nullptr),
        search(scores != nullptr ? scores + 2 * vocab_size : nullptr) {}
};

struct RowTotals {
  float max;
  double sum;
  bool is_valid() const { return sum > 0. && sum < kInfinity; }
};

// Weights of a row of logits are exp((logit - max) / temperature); of probabilities, themselves.
template <int kInput, class T>
inline RowTotals load_row(const T* input, int vocab_size, float temperature, RowBuffer& row) {
  float max = -kInfinity;
  int num_nan = 0;
#pragma omp simd reduction(max : max) reduction(+ : num_nan)
  for (int i = 0; i < vocab_size; ++i) {
    const float x = to_float(input[i]);
    row.scores[i] = x;
    num_nan += x != x;
    max = x > max ? x : max;
  }
  if constexpr (kInput == kOrderOnly) return {max, 1.};
  if constexpr (kInput == kLogits) {
    const float base = max == -kInfinity ? 0.f : max, inverse = 1.f / temperature;
#pragma omp simd
    for (int i = 0; i < vocab_size; ++i) row.weights[i] = exp_nonpositive((row.scores[i] - base) * inverse);
    if (max == kInfinity) num_nan = 1;
  } else {
#pragma omp simd
    for (int i = 0; i < vocab_size; ++i) row.weights[i] = row.scores[i];
  }
  double sum = 0.;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < vocab_size; ++i) sum += row.weights[i];
  return {max, num_nan ? static_cast<double>(kNaN) : sum};
}

// The weight of a score as the search needs it.
template <int kInput>
struct Weigh {
  float max, inverse_temperature;
  double operator()(float score) const {
    if (kInput == kLogits) return exp_nonpositive((score - max) * inverse_temperature);
    return kInput == kProbs ? score : 0.;
  }
};

// The smallest score that stays: fewer than top_k scores are larger, and their weight is below target. Quickselect on
// that predicate; scores[0, size) is reordered.
template <class Weight>
inline float smallest_kept(float* scores, int64_t size, int64_t top_k, double target, Weight weigh) {
  int64_t begin = 0, end = size, count_above = 0;
  double weight_above = 0.;
  float kept = -kInfinity;
  while (begin < end) {
    const float a = scores[begin], b = scores[begin + (end - begin) / 2], c = scores[end - 1];
    const float pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    // Three ways: larger, equal, smaller.
    int64_t larger_end = begin, next = begin, smaller_begin = end;
    double larger_weight = 0., equal_weight = 0.;
    while (next < smaller_begin) {
      const float x = scores[next];
      if (x > pivot) {
        larger_weight += weigh(x);
        scores[next++] = scores[larger_end];
        scores[larger_end++] = x;
      } else if (x < pivot) {
        scores[next] = scores[--smaller_begin];
        scores[smaller_begin] = x;
      } else {
        equal_weight += weigh(x);
        ++next;
      }
    }
    const int64_t num_larger = larger_end - begin;
    if (count_above + num_larger >= top_k || weight_above + larger_weight >= target) {
      end = larger_end;
      continue;
    }
    kept = pivot;
    count_above += smaller_begin - begin;
    weight_above += larger_weight + equal_weight;
    if (count_above >= top_k || weight_above >= target) break;
    begin = smaller_begin;
  }
  return kept;
}

// The score from which on elements are kept. `params` are those of either operator.
template <class Config, class Params>
inline float filter_threshold(const Params& params, int64_t row_idx, bool top_k_first, const RowTotals& totals,
                              float temperature, RowBuffer& row) {
  constexpr int kInput = Config::kInput;
  const int vocab_size = params.vocab_size;
  if constexpr (Config::kMinP) {
    return __builtin_fminf(params.min_p ? params.min_p[row_idx] : params.min_p_value, 1.f) * totals.max;
  }
  if constexpr (!Config::kTopK && !Config::kTopP) return -kInfinity;

  int64_t top_k = vocab_size;
  double top_p = 1.;
  if constexpr (Config::kTopK) {
    top_k = params.top_k ? load_index(params.top_k, params.top_k_is_int64, row_idx) : params.top_k_value;
    top_k = top_k < 1 ? 1 : top_k;
  }
  if constexpr (Config::kTopP) top_p = params.top_p ? params.top_p[row_idx] : params.top_p_value;
  const bool cuts_count = top_k < vocab_size, cuts_weight = top_p < 1.;
  if (!cuts_count && !cuts_weight) return -kInfinity;
  if (!cuts_count) top_k = INT64_MAX;

  int64_t size = 0;
  for (int i = 0; i < vocab_size; ++i) {
    if (row.scores[i] == row.scores[i]) row.search[size++] = row.scores[i];
  }
  const Weigh<kInput> weigh{totals.max, 1.f / temperature};
  const auto target = [&](double sum) { return cuts_weight ? __builtin_fmax(top_p * sum, 1e-300) : kInfinity; };
  if (!(top_k_first && cuts_count && cuts_weight)) {
    return smallest_kept(row.search, size, top_k, target(totals.sum), weigh);
  }
  const float k_threshold = smallest_kept(row.search, size, top_k, kInfinity, weigh);
  double kept_sum = 0.;
  for (int i = 0; i < vocab_size; ++i) kept_sum += row.scores[i] >= k_threshold ? row.weights[i] : 0.f;
  return __builtin_fmaxf(k_threshold, smallest_kept(row.search, size, INT64_MAX, target(kept_sum), weigh));
}

// The element at which the running sum of weights passes uniform * total; the last with weight if rounding hides it, or
// -1 if none has weight.
template <class Weight>
inline int draw(int size, double uniform, Weight weight_of) {
  double total = 0.;
  for (int i = 0; i < size; ++i) total += weight_of(i);
  const double target = uniform * total;
  double prefix = 0.;
  int last = -1;
  for (int i = 0; i < size; ++i) {
    const float weight = weight_of(i);
    if (!(weight > 0.f)) continue;
    last = i;
    prefix += weight;
    if (prefix > target) break;
  }
  return last;
}

}  // namespace flashinfer::cpu
