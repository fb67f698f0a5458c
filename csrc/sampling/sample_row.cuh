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
  float kept_blocks[Config::kClusterSize];
};

template <class Config>
__device__ void sample_row(const SamplingParams& params) {
  using Slice = RowSlice<Config>;
  constexpr bool kFilters = Filter<Config>::kSearches || Config::kMinP;
  constexpr int kClusterSize = Config::kClusterSize;
  extern __shared__ __align__(16) unsigned char smem_raw[];
  static_assert(sizeof(SampleSmem<Config>) <= Config::kSmemBytes);
  SampleSmem<Config>& smem = *reinterpret_cast<SampleSmem<Config>*>(smem_raw);

  cluster_announce<kClusterSize>();
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize;
  Slice slice(input_row<typename Config::T>(params, row), params.vocab_size, smem.slice);
  const Filter<Config> filter = Filter<Config>::load(params, row);
  const float scale = softmax_scale(params, row);

  const Stats mine = read_row(slice, scale);
  allow_next_kernel();
  float thread_weight, thread_base;  // the weight of this thread's part, and the maximum it is relative to
  float block_weights[kClusterSize];
  float threshold = -kInfinity;
  bool is_valid;
  {
    const RowTotals<Config> totals = RowTotals<Config>::share(mine, scale, smem.totals);
    is_valid = totals.is_valid();
    if constexpr (!kFilters) {
      thread_base = totals.block_max;
      thread_weight = rebase<Config>(mine, thread_base, scale);
#pragma unroll
      for (int rank = 0; rank < kClusterSize; ++rank) {
        block_weights[rank] = rebase<Config>(smem.totals.blocks[rank], totals.row.max, scale);
      }
      Draw<Config>::block_weight(thread_weight, smem.draw);
    } else {
      thread_base = totals.row.max;
      thread_weight = 0.f;
      if (is_valid) {
        threshold = filter.threshold(slice, totals, scale, mine.max, params.vocab_size, smem.filter);
        const Weigh<Config> weigh{thread_base, scale};
        if (mine.max >= threshold) {
          slice.for_each([&](float score) { thread_weight += score >= threshold ? weigh(score) : 0.f; });
        }
      }
      const float block_weight = Draw<Config>::block_weight(thread_weight, smem.draw);
      if (threadIdx.x < kClusterSize) {
        *shared_at_rank<kClusterSize>(&smem.kept_blocks[cluster_rank<kClusterSize>()], threadIdx.x) = block_weight;
      }
      cluster_sync<kClusterSize>();
#pragma unroll
      for (int rank = 0; rank < kClusterSize; ++rank) block_weights[rank] = smem.kept_blocks[rank];
    }
  }

  if (!is_valid) {
    if (cluster_rank<kClusterSize>() == 0 && threadIdx.x == 0) {
      params.token_ids[row] = 0;
      if (params.valid) params.valid[row] = 0;
    }
    return;
  }
  const RandomKey random = RandomKey::of(params, row);
  const RandomWords words = random.words(0);
  if constexpr (kClusterSize > 1) {
    const int lane_idx = threadIdx.x % kWarpSize;
    float weight = 0.f;
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) weight = lane_idx == rank ? block_weights[rank] : weight;
    if (pick_lane(weight, words.uniform(0)) != cluster_rank<kClusterSize>()) return;
  }
  const Weigh<Config> weigh{thread_base, scale};
  Draw<Config>::pick_in_block(
      slice, thread_weight, random, words, smem.draw,
      [&](int slot, int thread_idx, float* weights) {
        const typename Slice::Granule granule = slice.at(slot, thread_idx);
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) {
          const float score = to_float(granule[i]);
          weights[i] = !kFilters || score >= threshold ? weigh(score) : 0.f;
        }
      },
      [&](int token_id) {
        params.token_ids[row] = token_id;
        if (params.valid) params.valid[row] = 1;
      });
}

}  // namespace flashinfer
