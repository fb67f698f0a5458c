// The smallest score that top-k and top-p keep, found without sorting.
//
// Both filters are one monotone predicate: an element stays if fewer than k elements are larger, and if the weight of
// the larger ones is less than the target (p times the whole). Equal elements are kept or cut together. The search
// narrows a window of scores until the elements inside fit a short list, and decides the rest exactly on that list:
//
//   1. The threads' own maxima are a sample that is already in registers: where they alone exceed k or the target, the
//      row does. For the usual peaked row this leaves few elements, and most warps never look at theirs again.
//   2. If many are left: count the row's elements in 1024 bins of depth below the maximum. A count times the weights
//      at a bin's borders bounds its weight, so that only a bin or two stay undecided.
//   3. Collect the undecided elements, and the exact weight above them.
//   4. Select among the collected with fixed-point sums, in which order does not matter.
//
// Every block of the cluster merges the same numbers in the same order, so all arrive at the same answer.
#pragma once

#include "sampling/row.cuh"

namespace flashinfer {

constexpr uint32_t kKeepAll = 0x7fffffff;  // a top-k that cuts nothing

// Floats as integers in the same order; -0 counts as 0.
__device__ __forceinline__ int32_t ordered_bits(float x) {
  const int32_t bits = __float_as_int(x + 0.f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered_bits(int32_t bits) {
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
}

// How far a score lies below the row's maximum, as an integer that grows as the score falls. Probabilities and bare
// orders use their own bits, so a depth names one value; logits use a linear scale, in which a bin is a factor of
// weight.
template <class Config>
struct Depth {
  static constexpr float kLinearEnd = 4194304.f;  // 2^22 units cover the range of interest
  static constexpr float kLinearMax = 8388607.f;  // whatever lies deeper; exact in a float

  float max;
  float units;        // linear: depth units per unit of logit
  float log2_weight;  // linear: log2 of the weight lost per unit

  // range: where the window of interest ends, in log2 of the weight relative to the maximum's.
  __device__ __forceinline__ Depth(float max, float scale, float range)
      : max(max), units(kLinearEnd / range * scale), log2_weight(range / kLinearEnd) {}

  __device__ __forceinline__ uint32_t operator()(float score) const {
    if constexpr (Config::kInput == kLogits) {
      // Adding 2^23 leaves the rounded integer in the low bits of the float: no conversion instruction.
      const float depth = fminf((max - score) * units, kLinearMax);
      return __float_as_uint(depth + 8388608.f) - 0x4b000000u;
    } else if constexpr (Config::kInput == kProbs) {
      return __float_as_uint(max) - __float_as_uint(score);
    } else {
      return uint32_t(ordered_bits(max)) - uint32_t(ordered_bits(score));
    }
  }

  // The weight at a depth; what is deeper weighs no more.
  __device__ __forceinline__ float weight(uint32_t depth) const {
    if constexpr (Config::kInput == kLogits) return exp2_approx(float(depth) * -log2_weight);
    const uint32_t bits = __float_as_uint(max);
    return __uint_as_float(bits - min(depth, bits));
  }
};

// Exclusive scan over the block in thread order. V has operator+ and shifted_up(lanes).
template <int kNumThreads, class V>
__device__ __forceinline__ V block_exclusive_scan(V value, V* warps_smem) {
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  V inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const V below = inclusive.shifted_up(offset);
    if (lane_idx >= offset) inclusive = below + inclusive;
  }
  V exclusive = inclusive.shifted_up(1);
  if (lane_idx == 0) exclusive = V{};
  if (lane_idx == kWarpSize - 1) warps_smem[warp_idx] = inclusive;
  __syncthreads();
  V before{};
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) {
    if (warp < warp_idx) before = before + warps_smem[warp];
  }
  return before + exclusive;
}

// Elements counted from the top, with bounds on their weight.
struct Tally {
  uint32_t count = 0;
  float lower = 0.f, upper = 0.f;

  __device__ __forceinline__ Tally operator+(const Tally& other) const {
    return {count + other.count, lower + other.lower, upper + other.upper};
  }
  __device__ __forceinline__ Tally shifted_up(int lanes) const {
    return {__shfl_up_sync(0xffffffffu, count, lanes), __shfl_up_sync(0xffffffffu, lower, lanes),
            __shfl_up_sync(0xffffffffu, upper, lanes)};
  }
};

// The same, exactly: weights in units of 2^-40 of the largest.
struct ExactTally {
  uint32_t count = 0;
  uint64_t weight = 0;

  __device__ __forceinline__ ExactTally operator+(const ExactTally& other) const {
    return {count + other.count, weight + other.weight};
  }
  __device__ __forceinline__ ExactTally shifted_up(int lanes) const {
    return {__shfl_up_sync(0xffffffffu, count, lanes),
            static_cast<uint64_t>(__shfl_up_sync(0xffffffffu, static_cast<unsigned long long>(weight), lanes))};
  }
};

template <class Config>
struct ThresholdSearch {
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kNumBins = 1024, kBinsPerThread = kNumBins / kNumThreads;
  static constexpr int kListCapacity = kNumThreads < 512 ? 512 : kNumThreads;
  static constexpr int kListPerThread = kListCapacity / kNumThreads;
  static constexpr float kSlack = 1e-5f;  // rounding of bounds summed in float
  static constexpr uint32_t kNone = 0xffffffff;

  struct Collected {
    float weight_above;  // of the elements before the window
    uint32_t count;      // of the elements inside
    float max;           // of the elements inside
    float min;           // of all elements before the window's end: inside it, if it is not empty
  };
  struct Smem {
    // Two histograms take turns: one may be zeroed while other blocks still read the other.
    union {
      uint32_t bins[2][kNumBins];
      struct {
        uint64_t weight[kNumThreads];
        uint32_t count[kNumThreads];
      } exact;
    };
    float list[kListCapacity];
    Collected collected[kClusterSize];
    float scratch[3][kNumWarps];
    Tally tally_scratch[kNumWarps], tally_before_open;
    ExactTally exact_scratch[kNumWarps], exact_before;
    uint32_t list_size, first_open, first_cut, count_to_cut, chosen_bin;
  };

  RowSlice<Config>& slice;
  Smem& smem;
  const Depth<Config> depth;
  const Weigh<Config> weigh;
  const float thread_max;
  const float lowest_thread_max;
  int turn = 0;

  // [begin, end) in depth: all before is kept, all from `end` on is cut.
  struct Window {
    uint32_t begin, end;
    Tally above;      // elements before begin
    uint32_t inside;  // elements, if counted
  };

  // Collective over the cluster. Every score >= the result is kept. What lies at depth_end or
  // deeper is taken for cut.
  __device__ __forceinline__ float operator()(uint32_t top_k, float target, uint32_t depth_end) {
    Window window{0, depth_end, Tally{}, 0};
    bool is_crowded = !bound_by_maxima(window, top_k, target);
    Collected inside;
    while (true) {
      if (is_crowded) {
        narrow(window, top_k, target);
        is_crowded = window.inside > uint32_t(kListCapacity * kClusterSize) && window.end - window.begin > 1;
        if (is_crowded) continue;
      }
      bool overflow;
      inside = collect(window, overflow);
      if (inside.count == 0) return inside.min;  // all before the window's end stays
      if (!overflow) break;
      if (inside.max == inside.min || window.end - window.begin <= 1) return decide_tie(window, inside, top_k, target);
      is_crowded = true;
    }
    return select(inside, window.above.count, top_k, target);
  }

 private:
  // Step 1. Returns whether few enough elements can be left for a list.
  __device__ __forceinline__ bool bound_by_maxima(Window& window, uint32_t top_k, float target) {
    const uint32_t thread_depth = depth(thread_max);
    const bool is_occupied = thread_max > RowSlice<Config>::kPadding;
    const uint32_t sampled_end = lowest_thread_max < kInfinity ? depth(lowest_thread_max) + 1 : window.end;
    const Window maxima{0, min(window.end, max(sampled_end, 1u)), Tally{}, 0};
    uint32_t* bins = clear_bins();
    const int shift = bin_shift(maxima);
    if (is_occupied && thread_depth < maxima.end) atomicAdd(&bins[thread_depth >> shift], 1u);
    cut_bins(bins, maxima, shift, top_k, target);
    if (smem.first_cut == kNone) return false;
    window.end = border_after(maxima, smem.first_cut, shift);
    // Half the threads above the cut means about 0.7 elements a thread.
    return smem.count_to_cut <= uint32_t(kNumThreads * kClusterSize / 2);
  }

  // Step 2.
  __device__ __forceinline__ void narrow(Window& window, uint32_t top_k, float target) {
    uint32_t* bins = clear_bins();
    const int shift = bin_shift(window);
    const uint32_t begin = window.begin, width = window.end - window.begin;
    if (depth(thread_max) < window.end) {
      slice.for_each([&](float score) {
        const uint32_t below = depth(score) - begin;
        if (below < width) atomicAdd(&bins[below >> shift], 1u);
      });
    }
    cut_bins(bins, window, shift, top_k, target);
    const uint32_t end = smem.first_cut == kNone ? window.end : border_after(window, smem.first_cut, shift);
    window.begin = smem.first_open == kNone ? end : begin + (smem.first_open << shift);
    window.end = end;
    window.above = smem.tally_before_open;
    window.inside = smem.count_to_cut - window.above.count;
  }

  // Step 3. Stores the elements inside the window, in any order; returns them summed over the cluster.
  __device__ __forceinline__ Collected collect(const Window& window, bool& overflow) {
    if (threadIdx.x == 0) smem.list_size = 0;
    __syncthreads();
    float weight_above = 0.f, inside_max = -kInfinity, lowest = kInfinity;
    if (depth(thread_max) < window.end) {
      slice.for_each([&](float score) {
        const uint32_t d = depth(score);
        if (d >= window.end) return;
        lowest = fminf(lowest, score);
        if (d < window.begin) {
          if constexpr (Config::kTopP) weight_above += weigh(score);
          return;
        }
        inside_max = fmaxf(inside_max, score);
        const uint32_t place = atomicAdd(&smem.list_size, 1u);
        if (place < kListCapacity) smem.list[place] = score;
      });
    }
    Collected mine;
    mine.weight_above = Config::kTopP ? block_reduce<kNumThreads>(weight_above, Sum{}, smem.scratch[0]) : 0.f;
    mine.max = block_reduce<kNumThreads>(inside_max, Max{}, smem.scratch[1]);
    mine.min = -block_reduce<kNumThreads>(-lowest, Max{}, smem.scratch[2]);
    mine.count = smem.list_size;
    if (threadIdx.x < kClusterSize) {
      *shared_at_rank<kClusterSize>(&smem.collected[cluster_rank<kClusterSize>()], threadIdx.x) = mine;
    }
    cluster_sync<kClusterSize>();
    Collected all{0.f, 0, -kInfinity, kInfinity};
    overflow = false;
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      const Collected& block = smem.collected[rank];
      all.weight_above += block.weight_above;
      all.count += block.count;
      all.max = fmaxf(all.max, block.max);
      all.min = fminf(all.min, block.min);
      overflow |= block.count > kListCapacity;
    }
    return all;
  }

  // Step 4: radix selection on the collected scores, kNumThreads bins at a time, one bin a thread.
  __device__ __forceinline__ float select(const Collected& inside, uint32_t count_above, uint32_t top_k, float target) {
    const float kNoScore = __int_as_float(0x7fffffff);  // NaN: in no window of ordered bits
    float scores[kClusterSize][kListPerThread];
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      const float* list = shared_at_rank<kClusterSize>(smem.list, rank);
#pragma unroll
      for (int i = 0; i < kListPerThread; ++i) {
        const uint32_t place = i * kNumThreads + threadIdx.x;
        scores[rank][i] = kNoScore;
        if (place < smem.collected[rank].count) scores[rank][i] = list[place];
      }
    }
    const float to_fixed = 0x1p40f / (Config::kInput == kLogits ? 1.f : depth.max);
    uint64_t weight_left = ~0ull;
    if (Config::kTopP && target < kInfinity) {
      const float left = (target - inside.weight_above) * to_fixed;
      weight_left = left > 0.f ? static_cast<uint64_t>(left) : 0;
      if (count_above == 0 && weight_left == 0) weight_left = 1;  // the largest always stays
    }
    uint32_t count_left = top_k - min(top_k, count_above);
    const float above_all = from_ordered_bits(ordered_bits(inside.max) + 1);
    if (count_left == 0 || weight_left == 0) return above_all;

    uint32_t begin = ordered_bits(inside.max), width = begin - ordered_bits(inside.min) + 1;  // bits, counted downwards
    while (true) {
      const int shift = max(0, 32 - __clz(width - 1) - (31 - __clz(kNumThreads)));
      __syncthreads();
      smem.exact.weight[threadIdx.x] = 0;
      smem.exact.count[threadIdx.x] = 0;
      if (threadIdx.x == 0) smem.chosen_bin = kNone;
      __syncthreads();
#pragma unroll
      for (int rank = 0; rank < kClusterSize; ++rank) {
#pragma unroll
        for (int i = 0; i < kListPerThread; ++i) {
          const uint32_t below = begin - ordered_bits(scores[rank][i]);
          if (below >= width) continue;
          atomicAdd(&smem.exact.count[below >> shift], 1u);
          if constexpr (Config::kTopP) {
            const auto weight = static_cast<unsigned long long>(weigh(scores[rank][i]) * to_fixed);
            atomicAdd(reinterpret_cast<unsigned long long*>(&smem.exact.weight[below >> shift]), weight);
          }
        }
      }
      __syncthreads();
      const ExactTally bin{smem.exact.count[threadIdx.x], smem.exact.weight[threadIdx.x]};
      const ExactTally before = block_exclusive_scan<kNumThreads>(bin, smem.exact_scratch);
      const bool is_cut_before = before.count >= count_left || before.weight >= weight_left;
      const bool is_cut_after = before.count + bin.count >= count_left || before.weight + bin.weight >= weight_left;
      if (!is_cut_before && is_cut_after) {
        smem.chosen_bin = threadIdx.x;
        smem.exact_before = before;
      }
      __syncthreads();
      if (smem.chosen_bin == kNone) return inside.min;  // all of them stay
      begin -= smem.chosen_bin << shift;
      if (shift == 0) return from_ordered_bits(begin);
      width = 1u << shift;
      count_left -= smem.exact_before.count;
      weight_left -= smem.exact_before.weight;
    }
  }

  // More equal elements than a list holds: they stay or go together.
  __device__ __forceinline__ float decide_tie(const Window& window, const Collected& inside, uint32_t top_k,
                                              float target) {
    const bool stays = window.above.count < top_k && (window.above.count == 0 || inside.weight_above < target);
    return stays ? inside.min : from_ordered_bits(ordered_bits(inside.max) + 1);
  }

  __device__ __forceinline__ uint32_t* clear_bins() {
    uint32_t* bins = smem.bins[turn];
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) bins[i * kNumThreads + threadIdx.x] = 0;
    __syncthreads();  // the last results have been read
    if (threadIdx.x == 0) {
      smem.first_open = smem.first_cut = kNone;
      smem.count_to_cut = 0;
      smem.tally_before_open = Tally{};
    }
    __syncthreads();
    return bins;
  }

  __device__ __forceinline__ static int bin_shift(const Window& window) {
    constexpr int kLog2Bins = 10;
    static_assert(1 << kLog2Bins == kNumBins);
    return max(0, 32 - __clz(window.end - window.begin - 1) - kLog2Bins);
  }

  // The depth at which the bin after this one begins, within the window. In 64 bits: a window may span all of uint32.
  __device__ __forceinline__ static uint32_t border_after(const Window& window, uint32_t bin, int shift) {
    const uint64_t border = window.begin + ((uint64_t(bin) + 1) << shift);
    return border < window.end ? uint32_t(border) : window.end;
  }

  // Adds up the bins of all blocks and finds the first bin that is not certainly kept (first_open) and the first behind
  // which all is certainly cut (first_cut). Results in shared memory, visible to the block on return.
  __device__ __forceinline__ void cut_bins(uint32_t* bins, const Window& window, int shift, uint32_t top_k,
                                           float target) {
    cluster_sync<kClusterSize>();
    const int first_bin = threadIdx.x * kBinsPerThread;
    uint32_t counts[kBinsPerThread] = {};
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      const uint32_t* remote = shared_at_rank<kClusterSize>(bins, rank) + first_bin;
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) counts[i] += remote[i];
    }
    Tally mine[kBinsPerThread], sum;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      mine[i].count = counts[i];
      if constexpr (Config::kTopP) {
        const uint32_t top = window.begin + (uint32_t(first_bin + i) << shift), bottom = top + (1u << shift);
        mine[i].upper = counts[i] * depth.weight(top - min(top, 1u)) * (1.f + kSlack);
        mine[i].lower = counts[i] * depth.weight(bottom) * (1.f - kSlack);
      }
      sum = sum + mine[i];
    }
    Tally before = window.above + block_exclusive_scan<kNumThreads>(sum, smem.tally_scratch);
    uint32_t open_bin = kNone, cut_bin = kNone;
    Tally before_open;
    uint32_t count_to_cut = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const Tally after = before + mine[i];
      const bool is_kept = after.count < top_k && (!Config::kTopP || after.upper < target);
      const bool is_cut = after.count >= top_k || (Config::kTopP && after.lower >= target);
      if (!is_kept && open_bin == kNone) {
        open_bin = first_bin + i;
        before_open = before;
      }
      if (is_cut && cut_bin == kNone) {
        cut_bin = first_bin + i;
        count_to_cut = after.count;
      }
      before = after;
    }
    if (open_bin != kNone) atomicMin(&smem.first_open, open_bin);
    if (cut_bin != kNone) atomicMin(&smem.first_cut, cut_bin);
    __syncthreads();
    if (open_bin != kNone && smem.first_open == open_bin) smem.tally_before_open = before_open;
    if (cut_bin != kNone && smem.first_cut == cut_bin) smem.count_to_cut = count_to_cut;
    if (smem.first_cut == kNone && threadIdx.x == kNumThreads - 1) smem.count_to_cut = before.count;
    __syncthreads();
  }
};

// Where weights become too small to matter to top-p: everything lighter than this, together, weighs less than the part
// that top-p leaves out. With kSafety for rounding.
__device__ __forceinline__ float negligible_weight(float top_p, float sum, int vocab_size) {
  constexpr float kSafety = 0.5f;
  return kSafety * (1.f - top_p) * sum / vocab_size;
}

}  // namespace flashinfer
