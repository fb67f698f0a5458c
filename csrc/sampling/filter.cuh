// The filters of one row: its parameters, and the score from which on elements are kept.
#pragma once

#include "sampling/threshold.cuh"

namespace flashinfer {

template <class Config, bool kSearches>
struct FilterSmem {
  typename ThresholdSearch<Config>::Smem search;
  float kept[Config::kClusterSize];
  float scratch[Config::kNumThreads / kWarpSize];
};
template <class Config>
struct FilterSmem<Config, false> {};

template <class Config>
struct Filter {
  static constexpr bool kSearches = Config::kTopK || Config::kTopP;
  using Smem = FilterSmem<Config, kSearches>;

  uint32_t top_k = kKeepAll;
  float top_p = 1.f, min_p = 0.f;
  bool top_k_first = false;

  __device__ __forceinline__ static Filter load(const SamplingParams& params, int row) {
    Filter filter;
    if constexpr (Config::kTopK) {
      const int64_t k = params.top_k ? load_index(params.top_k, params.top_k_is_int64, row) : params.top_k_value;
      if (k < params.vocab_size) filter.top_k = k > 1 ? k : 1;
    }
    if constexpr (Config::kTopP) filter.top_p = params.top_p ? params.top_p[row] : params.top_p_value;
    if constexpr (Config::kMinP) filter.min_p = params.min_p ? params.min_p[row] : params.min_p_value;
    filter.top_k_first = Config::kTopK && Config::kTopP && params.top_k_first;
    return filter;
  }

  // Collective over the cluster; the row must be valid unless only its order counts.
  __device__ __forceinline__ float threshold(RowSlice<Config>& slice, const RowTotals<Config>& totals, float scale,
                                             float thread_max, int vocab_size, Smem& smem) const {
    if constexpr (Config::kMinP) {
      return min_p * totals.row.max;
    } else if constexpr (kSearches) {
      const bool cuts_mass = Config::kTopP && top_p < 1.f;
      float target = cuts_mass ? fmaxf(top_p, 0.f) * totals.row.sum : kInfinity;
      if (top_k == kKeepAll && !cuts_mass) return -kInfinity;

      // One after the other, top-p acts on what top-k leaves.
      const bool in_turn = top_k_first && cuts_mass && top_k != kKeepAll;
      const float negligible = cuts_mass && !in_turn ? negligible_weight(top_p, totals.row.sum, vocab_size) : 0.f;
      constexpr float kWidestRange = 160.f;  // in log2; deeper, a weight is zero
      const float range = fminf(kWidestRange, -__log2f(negligible) + 1.f);
      const Depth<Config> depth(totals.row.max, scale, range);
      uint32_t depth_end = last_depth(depth, negligible);
      ThresholdSearch<Config> search{slice,      smem.search,      depth, Weigh<Config>{totals.row.max, scale},
                                     thread_max, totals.lowest_max};
      const Weigh<Config> weigh{totals.row.max, scale};
      float threshold = -kInfinity;
#pragma unroll 1  // one copy of the search
      for (int step = in_turn ? 0 : 1; step < 2; ++step) {
        const bool top_k_alone = step == 0, top_p_alone = in_turn && step == 1;
        threshold =
            fmaxf(threshold, search(top_p_alone ? kKeepAll : top_k, top_k_alone ? kInfinity : target, depth_end));
        if (!top_k_alone) break;
        float kept = 0.f;
        if (thread_max >= threshold) {
          slice.for_each([&](float score) { kept += score >= threshold ? weigh(score) : 0.f; });
        }
        target = fmaxf(top_p, 0.f) * cluster_sum<Config>(kept, smem.kept, smem.scratch);
        depth_end = min(depth_end, depth(threshold) + 1);
      }
      return threshold;
    } else {
      return -kInfinity;
    }
  }

 private:
  __device__ __forceinline__ static uint32_t last_depth(const Depth<Config>& depth, float negligible) {
    if constexpr (Config::kInput == kLogits) return uint32_t(Depth<Config>::kLinearEnd);
    if constexpr (Config::kInput == kProbs) return min(__float_as_uint(depth.max), depth(negligible) + 1);
    return 0xffffffffu;
  }
};

}  // namespace flashinfer
