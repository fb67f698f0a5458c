// SPDX-License-Identifier: Apache-2.0
// Where a filter cuts a row, found without sorting.
//
// Top-k and top-p are one predicate: an element stays if all strictly larger ones together weigh less than a target. To
// top-k every element weighs one and the target is k. So equal elements stay or go together. The search holds a
// bracket (low, high]: low and what is smaller is cut, high and what is larger stays.
//
//   1. Top-k guesses from the maxima of groups of threads, a by-product of the one reading: if k groups reach a score,
//      the k-th largest element does. For the usual small k few elements do, and most threads need not look at theirs.
//   2. Otherwise weights above a few pivots between low and high, exact, narrow the bracket to the piece between two
//      of them, until few elements are left inside.
//   3. These go to the leader, which ranks them and decides. Where they do not fit, their extremes tighten the bracket:
//      it ends when all inside are equal.
//
// What all blocks must agree on, all compute from the same numbers in the same order.
#pragma once

#include "sampling/pivots.cuh"
#include "sampling/ranked_list.cuh"

namespace flashinfer {

template <class Config>
struct ThresholdSearch {
  using Slice = RowSlice<Config>;
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr bool kCounts = Config::kTopK;  // every element weighs one
  static_assert(kCounts || Config::kInput == kProbs);
  static constexpr int kNumPivots = 4;
  using RowPivots = Pivots<Config, kNumPivots>;
  using List = RankedList<Config>;

  struct Smem {
    float maxima[kNumThreads];            // of groups of threads, row-wide
    typename RowPivots::Table masses[2];  // of the rounds, in turn
    typename List::Smem list;
    float floor;
  };

  Slice& slice;
  Smem& smem;
  RowMail<kClusterSize>& mail;
  const RowTotals<Config>& totals;
  const float target;
  const int vocab_size;
  List list;

  // What is known when the search ends.
  float low, high;
  float mass_low, mass_high;  // the weight above each
  bool is_listed;             // the leader holds all elements in (low, high]; else they are equal, and stay

  __device__ __forceinline__ ThresholdSearch(Slice& slice, Smem& smem, RowMail<kClusterSize>& mail,
                                             const RowTotals<Config>& totals, float target, int vocab_size)
      : slice(slice),
        smem(smem),
        mail(mail),
        totals(totals),
        target(target),
        vocab_size(vocab_size),
        list{smem.list, mail} {}

  // Collective over the cluster.
  __device__ __forceinline__ void run() {
    low = lowest();
    high = totals.row.max;
    mass_low = kInfinity;
    mass_high = 0.f;
    is_listed = false;
    const bool has_bound = kCounts && bound_by_maxima();
    if (has_bound) gather();
#pragma unroll 1
    for (int round = 0; !is_listed && !holds_one_value<typename Config::T>(low, high); ++round) {
      narrow(round == 0 && !has_bound ? outward() : inward(), round);
      // Each element inside weighs more than low does, which limits their number. Else see from time to time whether
      // many equal ones are in the way.
      const bool may_fit = mass_low - mass_high <= List::kCapacity * weight_of(low);
      if (may_fit || round % 5 == 4) gather();
    }
  }

  // Whether all that stays is on the list.
  __device__ __forceinline__ bool is_complete() const { return is_listed && mass_high == 0.f; }

  // Ranks the list and returns the score above which elements stay. Called by the leader's threads.
  __device__ __forceinline__ float decide() {
    list.rank();
    float before = threadIdx.x;
    if constexpr (!kCounts) before = list.weight_before(list.is_listed ? weight_of(list.score) : 0.f);
    return list.floor_of_first(list.is_listed && mass_high + before < target);
  }

  // The score above which elements stay. Collective over the cluster.
  __device__ __forceinline__ float floor() {
    if (!is_listed) return low;
    if (cluster_rank<kClusterSize>() == 0) {
      const float decided = decide();
      if (threadIdx.x < kClusterSize) mail.floor.send(&smem.floor, decided, threadIdx.x);
    }
    mail.floor.receive(sizeof(float), 0);
    return smem.floor;
  }

 private:
  __device__ __forceinline__ static float weight_of(float score) { return kCounts ? 1.f : score; }

  // What is not above this score is certainly cut, or has no weight. For top-p: all elements lighter than the average
  // of half of what top-p leaves out weigh less than that together.
  __device__ __forceinline__ float lowest() const {
    if constexpr (!kCounts) return fmaxf(0.5f * (totals.row.sum - target) / vocab_size, 0.f);
    return RowSlice<Config>::kPadding;
  }

  // Raises low as far as the maxima tell. Every warp for itself.
  __device__ __forceinline__ bool bound_by_maxima() {
    if (vocab_size <= List::kCapacity) return true;  // all of it fits the list
    constexpr int kPerLane = kNumThreads / kWarpSize, kHalvings = 8;
    float maxima[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) maxima[i] = smem.maxima[i * kWarpSize + threadIdx.x % kWarpSize];
    const auto reached_by_k = [&](float score) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) count += maxima[i] >= score;
      return __reduce_add_sync(0xffffffffu, count) >= target;
    };
    float reached = totals.lowest_warp_max, missed = high;
    if (!reached_by_k(reached)) return false;
#pragma unroll 1
    for (int i = 0; i < kHalvings; ++i) {
      const float middle = between<Config>(reached, missed, 0.5f);
      if (reached_by_k(middle)) {
        reached = middle;
      } else {
        missed = middle;
      }
    }
    low = next_below(reached);
    return true;
  }

  // Pivots for the first round: ever further from the maximum, by the distance of a warp's maximum that is least.
  __device__ __forceinline__ RowPivots outward() const {
    RowPivots pivots;
#pragma unroll
    for (int i = 0; i < kNumPivots; ++i) {
      pivots.score[i] = i == kNumPivots - 1 ? low : fmaxf(beyond<Config>(high, totals.lowest_warp_max, 1 << i), low);
    }
    return pivots;
  }

  // Pivots in equal steps. One halves the floats between, so that no spacing of the scores can stall the search.
  __device__ __forceinline__ RowPivots inward() const {
    RowPivots pivots;
#pragma unroll
    for (int i = 0; i < kNumPivots; ++i) {
      pivots.score[i] =
          i == kNumPivots / 2 ? middle_float(low, high) : between<Config>(low, high, (i + 1) / (kNumPivots + 1.f));
    }
    return pivots;
  }

  // Lists what is inside, if there is room, and draws the bracket tight around it.
  __device__ __forceinline__ void gather() {
    is_listed = list.gather(slice, totals.thread_max, low, high);
    low = fmaxf(low, next_below(list.least));
    high = fminf(high, list.most);
  }

  __device__ __forceinline__ void narrow(const RowPivots& pivots, int round) {
    const auto masses = RowPivots::in_row(pivots.in_thread(slice, totals.thread_max, weight_of), smem.masses[round % 2],
                                          mail.pivots[round % 2], round / 2);
#pragma unroll
    for (int i = 0; i < kNumPivots; ++i) {
      const float pivot = pivots.score[i];
      const bool stays = masses.above[i] < target || masses.above[i] == 0.f;
      if (stays && pivot < high) {
        high = pivot;
        mass_high = masses.above[i];
      }
      if (!stays && pivot >= low) {
        low = pivot;
        mass_low = masses.above[i];
      }
    }
  }
};

template <class Config, bool kSearches>
struct SearchSmem : ThresholdSearch<Config>::Smem {};
template <class Config>
struct SearchSmem<Config, false> {};

// Where RowTotals leaves the maxima for the search, if there is one.
template <class Config, bool kSearches>
__device__ __forceinline__ float* search_maxima(SearchSmem<Config, kSearches>& smem) {
  if constexpr (kSearches) return smem.maxima;
  return nullptr;
}

}  // namespace flashinfer
