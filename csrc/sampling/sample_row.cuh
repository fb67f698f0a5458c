// Draws one token from each row of logits or probabilities, after top-k, top-p or min-p.
//
// One cluster per row, one reading of the row. Without a filter the row streams through registers: each thread keeps
// the weight of its part, and only the part that is drawn from is looked at again. With a filter the row stays in
// shared memory (or, where it does not fit, is read again from the L2 cache).
#pragma once

#include "device/pdl.cuh"
#include "sampling/draw.cuh"
#include "sampling/filter.cuh"

namespace flashinfer {

template <class Config>
struct SampleSmem {
  typename RowSlice<Config>::Smem slice;
  typename RowTotals<Config>::Smem totals;
  typename Filter<Config>::Smem filter;
};

// One row's draw.
template <class Config>
struct RowDraw {
  const SamplingParams& params;
  const int row;
  RowSlice<Config>& slice;
  SampleSmem<Config>& smem;

  __device__ __forceinline__ void emit(int token_id) const {
    params.token_ids[row] = token_id;
    if (params.valid) params.valid[row] = 1;
  }
  __device__ __forceinline__ void emit_invalid() const {
    if (cluster_rank<Config::kClusterSize>() != 0 || threadIdx.x != 0) return;
    params.token_ids[row] = 0;
    if (params.valid) params.valid[row] = 0;
  }

  // Draws from what is spread over the warps; weight_of(score) is the weight behind thread_weight.
  template <class Table, class WarpWeightOf, class WeightOf>
  __device__ __forceinline__ void from_warps(const Table& table, WarpWeightOf warp_weight_of, float thread_weight,
                                             WeightOf weight_of) const {
    draw_from_warps<Config>(
        slice, RandomKey::of(params, row), table, warp_weight_of, thread_weight,
        [&](int slot, int thread_idx, float* weights) {
          const typename RowSlice<Config>::Granule granule = slice.at(slot, thread_idx);
#pragma unroll
          for (int i = 0; i < RowSlice<Config>::kVecSize; ++i) weights[i] = weight_of(to_float(granule[i]));
        },
        [&](int token_id) { emit(token_id); });
  }

  // The row as it is: the weights found while reading it are enough.
  __device__ __forceinline__ void unfiltered(const RowTotals<Config>& totals, Stats mine, float scale) const {
    from_warps(
        smem.totals.warps, [&](const Stats& warp) { return rebase<Config>(warp, totals.row.max, scale); },
        rebase<Config>(mine, totals.warp_max, scale), Weigh<Config>{finite_or_zero(totals.warp_max), scale});
  }

  // What reaches a threshold.
  __device__ __forceinline__ void above(float threshold, const RowTotals<Config>& totals, float thread_max,
                                        float scale) const {
    const Weigh<Config> weigh{totals.row.max, scale};
    const auto weight_of = [&](float score) { return score >= threshold ? weigh(score) : 0.f; };
    float thread_weight = 0.f;
    if (thread_max >= threshold) slice.for_each([&](float score, int, int) { thread_weight += weight_of(score); });
    cluster_sync<Config::kClusterSize>();  // all have read the table
    smem.totals.warps.push({0.f, warp_reduce(thread_weight, Sum{})});
    cluster_sync<Config::kClusterSize>();
    from_warps(smem.totals.warps, [](const Stats& warp) { return warp.sum; }, thread_weight, weight_of);
  }

  // What top-k and top-p leave: part of it is on the leader's list, the rest above the search's window.
  __device__ __forceinline__ void filtered(const Filter<Config>& filter, const RowTotals<Config>& totals,
                                           float thread_max, float scale) const {
    using Search = ThresholdSearch<Config>;
    Search search = filter.search(slice, totals, scale, thread_max, params.vocab_size, smem.filter);
    Kept kept;
    typename Search::Ranking ranking;
    if (!filter.template apply<true>(search, totals, params.vocab_size, smem.filter, kept, ranking)) return;

    const RandomWords words = RandomKey::of(params, row).words(1);
    const float drawn = words.uniform(1) * (search.all.weight_above + kept.list_weight);
    if (drawn < kept.list_weight || search.all.weight_above == 0.f) {
      if (cluster_rank<Config::kClusterSize>() != 0) return;
      // Candidates in descending order share out [0, total); weight_before is where a share begins.
      const uint32_t place = __umulhi(words.word[2], ranking.total);
      if (ranking.is_kept && place - ranking.weight_before < ranking.weight) emit(ranking.candidate.token_id);
      return;
    }
    const Weigh<Config> weigh{totals.row.max, scale};
    from_warps(
        smem.filter.search.tallies, [](const WindowTally& warp) { return warp.weight_above; },
        search.thread_weight_above,
        [&](float score) { return search.depth(score) < search.window.begin ? weigh(score) : 0.f; });
  }
};

template <class Config>
__device__ void sample_row(const SamplingParams& params) {
  constexpr int kClusterSize = Config::kClusterSize;
  extern __shared__ __align__(16) unsigned char smem_raw[];
  static_assert(sizeof(SampleSmem<Config>) <= Config::kSmemBytes);
  SampleSmem<Config>& smem = *reinterpret_cast<SampleSmem<Config>*>(smem_raw);

  cluster_announce<kClusterSize>();
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize;
  RowSlice<Config> slice(input_row<typename Config::T>(params, row), params.vocab_size, smem.slice);
  const RowDraw<Config> draw{params, row, slice, smem};
  const Filter<Config> filter = Filter<Config>::load(params, row);
  const float scale = softmax_scale(params, row);

  const Stats mine = read_row(slice, scale);
  allow_next_kernel();
  const RowTotals<Config> totals =
      RowTotals<Config>::share(mine, scale, smem.totals, Filter<Config>::maxima(smem.filter));
  if (!totals.is_valid()) return draw.emit_invalid();
  if constexpr (Config::kMinP) {
    const float min_p = params.min_p ? params.min_p[row] : params.min_p_value;
    draw.above(min_p * totals.row.max, totals, mine.max, scale);
  } else if constexpr (Filter<Config>::kSearches) {
    if (filter.cuts()) return draw.filtered(filter, totals, mine.max, scale);
    draw.unfiltered(totals, mine, scale);
  } else {
    draw.unfiltered(totals, mine, scale);
  }
}

}  // namespace flashinfer
