// SPDX-License-Identifier: Apache-2.0
// Writes a whole row. With x[i] the row, T its temperature, kept the elements that top-k or top-p keeps
// (sample_row.cuh),
//
//   softmax        output[i] = exp((x[i] − max x) / T) / sum_j exp((x[j] − max x) / T)
//   renormalize    output[i] = x[i] / sum_{j in kept} x[j]  for i in kept, else 0
//   mask           output[i] = x[i]  for i in kept, else −infinity
//
//   input [num_rows, vocab_size] T, logits or probabilities      output [num_rows, vocab_size] T, of softmax fp32
//
// One cluster a row, one reading of the row, one writing. In between, for the search (threshold.cuh) and the results,
// it stays in shared memory, or, where it does not fit, is read again from the L2 cache.
#pragma once

#include "device/pdl.cuh"
#include "sampling/filter.cuh"
#include "sampling/threshold.cuh"

namespace flashinfer {

template <class Config>
struct NormalizeSmem {
  typename RowSlice<Config>::Smem slice;
  typename RowTotals<Config>::Smem totals;
  RowMail<Config::kClusterSize> mail;
  SearchSmem<Config, Config::kTopK || Config::kTopP> search;
};

// Stores a granule's worth of results where it lies inside the row, by vectors if the output is aligned as the input.
template <class Config, class TOut>
__device__ __forceinline__ void store_granule(const RowSlice<Config>& slice, int g, TOut* output_base, bool is_aligned,
                                              const float* values) {
  constexpr int kVecSize = RowSlice<Config>::kVecSize;
  constexpr int kOutVecSize = 16 / sizeof(TOut) < kVecSize ? 16 / sizeof(TOut) : kVecSize;
  if (is_aligned && g >= slice.full_begin && g < slice.full_end) {
#pragma unroll
    for (int begin = 0; begin < kVecSize; begin += kOutVecSize) {
      Vec<TOut, kOutVecSize> vec;
#pragma unroll
      for (int i = 0; i < kOutVecSize; ++i) vec[i] = from_float<TOut>(values[begin + i]);
      vec.store(output_base + int64_t(g) * kVecSize + begin);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) {
    const int element = g * kVecSize + i;
    if (element >= slice.head && element < slice.end) output_base[element] = from_float<TOut>(values[i]);
  }
}

// log2(e) / temperature. What is not positive makes the row NaN; the smallest numbers leave the largest element alone.
__device__ __forceinline__ float softmax_scale(const NormalizeParams& params, int row) {
  constexpr float kSmallest = 0x1p-126f;
  const float temperature = params.temperature ? params.temperature[row] : params.temperature_value;
  return temperature > 0.f ? kLog2E / fmaxf(temperature, kSmallest) : kNaN;
}

template <class Config>
__device__ void normalize_row(const NormalizeParams& params) {
  using Slice = RowSlice<Config>;
  using TOut = typename Config::TOut;
  constexpr int kClusterSize = Config::kClusterSize;
  extern __shared__ __align__(16) unsigned char smem_raw[];
  static_assert(sizeof(NormalizeSmem<Config>) <= Config::kSmemBytes);
  NormalizeSmem<Config>& smem = *reinterpret_cast<NormalizeSmem<Config>*>(smem_raw);

  smem.mail.open();
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize;
  using T = typename Config::T;
  Slice slice(static_cast<const T*>(params.input) + row * params.input_stride, params.vocab_size, smem.slice);
  const Filter filter = Filter::load<Config>(params, row);
  const float scale = softmax_scale(params, row);

  const Stats mine = read_row(slice, scale);
  const auto totals = RowTotals<Config>::share(mine, scale, smem.totals, smem.mail, search_maxima(smem.search));
  const Weigh<Config> weigh = totals.weigh();

  float floor = -kInfinity, kept_sum = totals.row.sum;
  if constexpr (Config::kTopK || Config::kTopP) {
    const bool has_order = Config::kInput == kOrderOnly ? totals.row.max > -kInfinity : totals.is_valid();
    if (has_order && (filter.top_k < kInfinity || filter.top_p < kInfinity)) {
      const float target = Config::kTopK ? filter.top_k : filter.top_p * totals.row.sum;
      ThresholdSearch<Config> search(slice, smem.search, smem.mail, totals, target, params.vocab_size);
      search.run();
      floor = search.floor();
      if constexpr (Config::kInput != kOrderOnly) kept_sum = totals.above(floor, slice, smem.totals, smem.mail).row.sum;
    }
  }

  // A row of probabilities without any weight stays zero; one with NaN or infinity becomes NaN, as does a row of logits
  // without a largest.
  const float factor = totals.is_valid() ? 1.f / kept_sum : Config::kInput == kProbs && kept_sum == 0.f ? 0.f : kNaN;
  TOut* output_base = static_cast<TOut*>(params.output) + int64_t(row) * params.vocab_size - slice.head;
  const bool is_aligned = (reinterpret_cast<uint64_t>(output_base) & 15) == 0;
#pragma unroll 2
  for (int slot = 0; slot < slice.num_slots; ++slot) {
    const typename Slice::Granule granule = slice.at(slot, threadIdx.x);
    float values[Slice::kVecSize];
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) {
      const float score = to_float(granule[i]);
      if constexpr (Config::kInput == kOrderOnly) {
        values[i] = score > floor ? score : -kInfinity;
      } else {
        values[i] = (score > floor ? weigh(score) : 0.f) * factor;
      }
    }
    store_granule<Config, TOut>(slice, slice.granule_idx(slot, threadIdx.x), output_base, is_aligned, values);
  }
  allow_next_kernel();
}

}  // namespace flashinfer
