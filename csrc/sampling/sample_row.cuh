// SPDX-License-Identifier: Apache-2.0
// Draws one token from each row of logits or probabilities, after top-k, top-p or min-p.
//
// Of a row x, a token i has the weight w(i) = exp(x(i)) where x are logits, x(i) where they are probabilities, and
//
//   larger(i) = { j : x(j) > x(i) }        rank(i) = |larger(i)|        above(i) = sum of w over larger(i)
//
//   top-k    keeps i if  rank(i) < k
//   top-p    keeps i if  above(i) < p * W,  W the sum of w over the row, or over what top-k keeps if that comes first
//   min-p    keeps i if  x(i) >= m * max x
//
// and a kept token is drawn with probability w(i) / sum of w over what is kept. Each filter is a floor: what lies above
// it stays. So equal elements stay or go together, and the largest always stays.
//
//   input [num_inputs, vocab_size] T, fp16, bf16 or fp32      row_indices [num_rows]: the input row of each row drawn
//   token_ids [num_rows] int32      valid [num_rows]: 0 where there is nothing to draw, which is token 0
//   top_k, top_p, min_p: one number, or [num_rows]
//
// One cluster per row, one reading of device memory. Without a filter the row streams through registers. With one it
// stays in shared memory or, where it does not fit, is read again from the L2 cache. What happens then:
//
//   filter         how a token is found                                                              where
//   none           inverse CDF by levels: a warp of the cluster, a lane, a slot, an element           draw.cuh
//   min-p          the floor follows from the maximum; sums above it; inverse CDF                     totals.cuh
//   top-k          search: where is the k-th largest?                                                 threshold.cuh
//                    if all that stays fits a list of 256: ranked in one block, drawn from there      ranked_list.cuh
//                    else sums above the floor; inverse CDF                                           totals.cuh
//   top-p          rejection: draw candidates, then one look at the row for what lies above them      nucleus.cuh
//   top-k, top-p   top-k as above; from the list, prefix sums decide top-p as well; else rejection
//                    among what lies above the floor
//
// A limit that cuts nothing, k >= vocab_size or p >= 1, is skipped: that row is drawn as if without it.
#pragma once

#include "device/pdl.cuh"
#include "sampling/draw.cuh"
#include "sampling/filter.cuh"
#include "sampling/nucleus.cuh"
#include "sampling/threshold.cuh"

namespace flashinfer {

template <class Config>
struct SampleSmem {
  typename RowSlice<Config>::Smem slice;
  typename RowTotals<Config>::Smem totals;
  RowMail<Config::kClusterSize> mail;
  union {
    SearchSmem<Config, Config::kTopK> search;
    NucleusSmem<Config, Config::kTopP> nucleus;
  };
};

// One row's draw.
template <class Config>
struct RowDraw {
  static constexpr int kClusterSize = Config::kClusterSize;
  const SampleParams& params;
  const int row;
  RowSlice<Config>& slice;
  SampleSmem<Config>& smem;

  __device__ __forceinline__ RandomKey random() const { return RandomKey::of(params, row); }
  __device__ __forceinline__ void emit(int token_id) const {
    params.token_ids[row] = token_id;
    if (params.valid) params.valid[row] = 1;
  }
  __device__ __forceinline__ void emit_invalid() const {
    if (cluster_rank<kClusterSize>() != 0 || threadIdx.x != 0) return;
    params.token_ids[row] = 0;
    if (params.valid) params.valid[row] = 0;
  }

  // In proportion to the weights of what is above the floor.
  __device__ __forceinline__ void from(const RowTotals<Config>& part) const {
    const Weigh<Config> weigh{finite_or_zero(part.warp_max), part.scale};
    draw_from_warps<Config>(
        slice, random(), *part.warps, [&](const Stats& warp) { return rebase<Config>(warp, part.row.max, part.scale); },
        rebase<Config>(part.thread, part.warp_max, part.scale),
        [&](int slot, int thread_idx, float* weights) {
          const typename RowSlice<Config>::Granule granule = slice.at(slot, thread_idx);
#pragma unroll
          for (int i = 0; i < RowSlice<Config>::kVecSize; ++i) {
            const float score = to_float(granule[i]);
            weights[i] = score > part.floor ? weigh(score) : 0.f;
          }
        },
        [&](int slot, int thread_idx, int lane) { emit(slice.token_id(slot, thread_idx, lane)); });
  }

  // From the leader's list, which holds all that top-k leaves. Called by the leader's threads.
  template <class Search>
  __device__ __forceinline__ void from_list(Search& search, float top_p, const RowTotals<Config>& totals) const {
    auto& list = search.list;
    float floor = search.decide();
    float weight = list.is_listed && list.score > floor ? totals.weigh()(list.score) : 0.f;
    if (Config::kTopP && top_p < kInfinity) {
      const float before = list.weight_before(weight);
      const float whole = params.top_k_first ? list.total(weight) : totals.row.sum;
      floor = list.floor_of_first(list.is_listed && before < top_p * whole);
      if (!(list.score > floor)) weight = 0.f;
    }
    const int picked = list.pick(weight, random().words(0));
    if (picked == threadIdx.x) emit(list.token_id);
  }
};

template <class Config>
__device__ void sample_row(const SampleParams& params) {
  constexpr int kClusterSize = Config::kClusterSize;
  extern __shared__ __align__(16) unsigned char smem_raw[];
  static_assert(sizeof(SampleSmem<Config>) <= Config::kSmemBytes);
  SampleSmem<Config>& smem = *reinterpret_cast<SampleSmem<Config>*>(smem_raw);

  smem.mail.open();
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize;
  int64_t input_row = params.row_indices ? load_index(params.row_indices, params.row_indices_are_int64, row) : row;
  // An index that names no row reads nothing: there is nothing to draw.
  const bool exists = uint64_t(input_row) < uint64_t(params.num_inputs);
  if (!exists) input_row = 0;
  RowSlice<Config> slice(static_cast<const typename Config::T*>(params.input) + input_row * params.input_stride,
                         exists ? params.vocab_size : 0, smem.slice);
  const RowDraw<Config> draw{params, row, slice, smem};
  const Filter filter = Filter::load<Config>(params, row);

  const Stats mine = read_row(slice, kLog2E);
  allow_next_kernel();
  const auto totals = RowTotals<Config>::share(mine, kLog2E, smem.totals, smem.mail, search_maxima(smem.search));
  if (!totals.is_valid()) return draw.emit_invalid();

  RowTotals<Config> part = totals;
  if constexpr (Config::kMinP) {
    const float min_p = params.min_p ? params.min_p[row] : params.min_p_value;
    part = totals.above(next_below(fminf(min_p, 1.f) * totals.row.max), slice, smem.totals, smem.mail);
  }
  if constexpr (Config::kTopK) {
    if (filter.top_k < kInfinity) {
      ThresholdSearch<Config> search(slice, smem.search, smem.mail, totals, filter.top_k, params.vocab_size);
      search.run();
      if (search.is_complete()) {
        if (cluster_rank<kClusterSize>() == 0) draw.from_list(search, filter.top_p, totals);
        return;
      }
      part = totals.above(search.floor(), slice, smem.totals, smem.mail);
    }
  }
  if constexpr (Config::kTopP) {
    if (filter.top_p < kInfinity) {
      const float target = filter.top_p * (params.top_k_first ? part.row.sum : totals.row.sum);
      Nucleus<Config> nucleus{slice, smem.nucleus, smem.mail, totals.weigh()};
      return nucleus.draw(draw.random(), part, target, [&](int token_id) { draw.emit(token_id); });
    }
  }
  draw.from(part);
}

}  // namespace flashinfer
