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
  typename Draw<Config>::Smem draw;
  float blocks[Config::kClusterSize];
  float scratch[Config::kNumThreads / kWarpSize];
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

  // Draws from what is spread over the blocks. Lane r of each warp gives the weight of block r; weight_of(score) is the
  // weight behind thread_weight.
  template <class WeightOf>
  __device__ __forceinline__ void from_blocks(float lane_block_weight, float thread_weight, WeightOf weight_of) const {
    const RandomKey random = RandomKey::of(params, row);
    const RandomWords words = random.words(0);
    if constexpr (Config::kClusterSize > 1) {
      if (pick_lane(lane_block_weight, words.uniform(0)) != cluster_rank<Config::kClusterSize>()) return;
    }
    Draw<Config>::block_weight(thread_weight, smem.draw);
    Draw<Config>::pick_in_block(
        slice, thread_weight, random, words, smem.draw,
        [&](int slot, int thread_idx, float* weights) {
          const typename RowSlice<Config>::Granule granule = slice.at(slot, thread_idx);
#pragma unroll
          for (int i = 0; i < RowSlice<Config>::kVecSize; ++i) weights[i] = weight_of(to_float(granule[i]));
        },
        [&](int token_id) { emit(token_id); });
  }

  // The row as it is: the weights found while reading it are enough.
  __device__ __forceinline__ void unfiltered(const RowTotals<Config>& totals, Stats mine, float scale) const {
    const int lane_idx = threadIdx.x % kWarpSize;
    float block_weight = 0.f;
    if (lane_idx < Config::kClusterSize) {
      block_weight = rebase<Config>(smem.totals.blocks[lane_idx], totals.row.max, scale);
    }
    from_blocks(block_weight, rebase<Config>(mine, totals.block_max, scale), Weigh<Config>{totals.block_max, scale});
  }

  __device__ __forceinline__ void above(float threshold, const RowTotals<Config>& totals, float thread_max,
                                        float scale) const {
    const Weigh<Config> weigh{totals.row.max, scale};
    const auto weight_of = [&](float score) { return score >= threshold ? weigh(score) : 0.f; };
    float thread_weight = 0.f;
    if (thread_max >= threshold) slice.for_each([&](float score, int, int) { thread_weight += weight_of(score); });
    cluster_sum<Config>(thread_weight, smem.blocks, smem.scratch);
    const int lane_idx = threadIdx.x % kWarpSize;
    from_blocks(lane_idx < Config::kClusterSize ? smem.blocks[lane_idx] : 0.f, thread_weight, weight_of);
  }

  __device__ __forceinline__ void filtered(const Filter<Config>& filter, const RowTotals<Config>& totals,
                                           float thread_max, float scale) const {
    using Search = ThresholdSearch<Config>;
    Search search = filter.search(slice, totals, scale, thread_max, params.vocab_size, smem.filter);
    Kept kept;
    if (!filter.template apply<true>(search, totals, params.vocab_size, smem.filter, kept)) return;

    // Either from the leader's list or from what lies above the window.
    const RandomWords words = RandomKey::of(params, row).words(1);
    const float from_list = words.uniform(1) * (search.all.weight_above + kept.list_weight);
    if (from_list < kept.list_weight || search.all.weight_above == 0.f) {
      if (cluster_rank<Config::kClusterSize>() != 0) return;
      const uint64_t total = search.list_weight(kept.threshold);
      const uint64_t drawn = __umul64hi((uint64_t(words.word[2]) << 32) | words.word[3], total);
      const int token_id = search.draw(kept.threshold, drawn, params.vocab_size);
      if (threadIdx.x == 0) emit(token_id);
      return;
    }
    const int lane_idx = threadIdx.x % kWarpSize;
    const float block_weight = lane_idx < Config::kClusterSize ? smem.filter.search.collected[lane_idx].weight_above : 0.f;
    const Weigh<Config> weigh{totals.row.max, scale};
    from_blocks(block_weight, search.thread_weight_above,
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
  const RowTotals<Config> totals = RowTotals<Config>::share(mine, scale, smem.totals);
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
