// Top-k and top-p of one row: their parameters, and what they leave.
#pragma once

#include "sampling/threshold.cuh"

namespace flashinfer {

// What the filters leave of a row: the elements above the search's window, and those on the leader's list from the
// threshold on.
struct Kept {
  float threshold;
  float list_weight;  // of those on the list
  float target;       // for searching again
  int again;          // top-p, after top-k, falls above the window
};

template <class Config, bool kSearches>
struct FilterSmem {
  typename ThresholdSearch<Config>::Smem search;
  Kept kept;
};
template <class Config>
struct FilterSmem<Config, false> {};

template <class Config>
struct Filter {
  static constexpr bool kSearches = Config::kTopK || Config::kTopP;
  using Smem = FilterSmem<Config, kSearches>;
  using Search = ThresholdSearch<Config>;

  uint32_t top_k = kKeepAll;
  float top_p = kInfinity;  // below 1, or infinity: no limit
  bool in_turn = false;     // top-p acts on what top-k leaves

  __device__ __forceinline__ static Filter load(const SamplingParams& params, int row) {
    Filter filter;
    if constexpr (Config::kTopK) {
      const int64_t k = params.top_k ? load_index(params.top_k, params.top_k_is_int64, row) : params.top_k_value;
      if (k < params.vocab_size) filter.top_k = k > 1 ? k : 1;
    }
    if constexpr (Config::kTopP) {
      const float p = params.top_p ? params.top_p[row] : params.top_p_value;
      if (p < 1.f) filter.top_p = fmaxf(p, 0.f);
    }
    filter.in_turn = params.top_k_first && filter.top_k != kKeepAll && filter.top_p < kInfinity;
    return filter;
  }

  // Where RowTotals leaves its sample for the search.
  __device__ __forceinline__ static float* maxima(Smem& smem) {
    if constexpr (kSearches) return smem.search.maxima;
    return nullptr;
  }

  __device__ __forceinline__ bool cuts() const { return top_k != kKeepAll || top_p < kInfinity; }

  __device__ __forceinline__ Search search(RowSlice<Config>& slice, const RowTotals<Config>& totals, float scale,
                                           float thread_max, int vocab_size, Smem& smem) const {
    constexpr float kWidestRange = 160.f;  // in log2; deeper, a weight is zero
    const float range = fminf(kWidestRange, 1.f - __log2f(negligible(totals, vocab_size)));
    const Depth<Config> depth(totals.row.max, scale, range);
    return Search{slice, smem.search, depth, Weigh<Config>{totals.row.max, scale}, thread_max, totals.lowest_warp_max};
  }

  // Collective over the cluster. With kLeaderMayFinish, returns false in blocks that hold nothing of what is kept.
  template <bool kLeaderMayFinish>
  __device__ __forceinline__ bool apply(Search& search, const RowTotals<Config>& totals, int vocab_size, Smem& smem,
                                        Kept& kept, typename Search::Ranking& ranking) const {
    const bool is_leader = cluster_rank<Config::kClusterSize>() == 0;
    uint32_t depth_end = last_depth(search.depth, negligible(totals, vocab_size)), k = top_k;
    float target = in_turn || top_p == kInfinity ? kInfinity : top_p * totals.row.sum, floor = -kInfinity;
#pragma unroll 1
    while (true) {
      search.run(k, target, depth_end, k == top_k);
      const bool is_alone = kLeaderMayFinish && search.is_listed && search.window.begin == 0;
      if (is_alone && !is_leader) return false;
      if (is_leader) {
        kept = lead(search, k, target, in_turn && k != kKeepAll, ranking);
        kept.threshold = fmaxf(kept.threshold, floor);
        if (!is_alone && threadIdx.x < Config::kClusterSize) {
          *shared_at_rank<Config::kClusterSize>(&smem.kept, threadIdx.x) = kept;
        }
      }
      if (is_alone) return true;
      cluster_sync<Config::kClusterSize>();
      kept = smem.kept;
      if (!kept.again) return true;
      floor = kept.threshold;
      target = kept.target;
      k = kKeepAll;
      depth_end = min(depth_end, search.depth(floor) + 1);
    }
  }

 private:
  // Step 4 of the search, in the leader.
  __device__ __forceinline__ Kept lead(Search& search, uint32_t k, float target, bool top_p_follows,
                                       typename Search::Ranking& ranking) const {
    Kept kept{search.tie_threshold, 0.f, kInfinity, false};
    if (search.is_listed) ranking = search.rank();
#pragma unroll 1
    while (true) {
      if (search.is_listed) {
        search.limit(ranking, k, target);
        kept.threshold = from_ordered_bits(ranking.lowest);
        kept.list_weight = ranking.total * ranking.unit;
      }
      if (!top_p_follows) return kept;
      // k stays: what it cuts, no share of what it leaves brings back.
      kept.target = top_p * (search.all.weight_above + kept.list_weight);
      kept.again = !search.is_listed || (search.all.count_above > 0 && search.all.weight_above >= kept.target);
      if (kept.again) return kept;
      target = kept.target;
      top_p_follows = false;
    }
  }

  __device__ __forceinline__ float negligible(const RowTotals<Config>& totals, int vocab_size) const {
    return top_p < kInfinity && !in_turn ? negligible_weight(top_p, totals.row.sum, vocab_size) : 0.f;
  }

  __device__ __forceinline__ static uint32_t last_depth(const Depth<Config>& depth, float negligible) {
    if constexpr (Config::kInput == kLogits) return uint32_t(Depth<Config>::kLinearEnd);
    if constexpr (Config::kInput == kProbs) return min(__float_as_uint(depth.max), depth(negligible) + 1);
    return 0xffffffffu;
  }
};

}  // namespace flashinfer
