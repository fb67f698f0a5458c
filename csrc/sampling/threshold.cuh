// The smallest score that top-k and top-p keep, found without sorting.
//
// Both filters are one monotone predicate: an element stays if fewer than k elements are larger, and if the weight of
// the larger ones is less than the target (p times the whole). Equal elements are kept or cut together. The search
// narrows a window of scores until the elements inside fit a short list, and one block decides the rest exactly on it:
//
//   1. The threads' own maxima are a sample that is already in registers: where they alone exceed k or the target, the
//      row does. For the usual peaked row this leaves few elements, and most warps never look at theirs again.
//   2. If many are left: count the row's elements in 1024 bins of depth below the maximum. Counts times the bins'
//      weights say where the target falls, to within a bin or two. Weights summed in step 3 check that; if they do not
//      agree (rows of few distinct values), the weights at the bins' borders give bounds that cannot fail.
//   3. Sum the weight above the window exactly, and send the elements inside to the leader, the cluster's first block.
//   4. The leader selects on the list with fixed-point sums, in which order does not matter.
//
// What all blocks must agree on, all compute from the same numbers in the same order.
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

constexpr int floor_log2(int n) { return n <= 1 ? 0 : 1 + floor_log2(n / 2); }

struct Candidate {
  float score;
  int32_t token_id;
};

template <class Config>
struct ThresholdSearch {
  using Slice = RowSlice<Config>;
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kLog2Bins = 10, kNumBins = 1 << kLog2Bins, kBinsPerThread = kNumBins / kNumThreads;
  static constexpr int kLog2Threads = floor_log2(kNumThreads);
  // Two counts share a word where a block cannot hold more elements than a half word counts.
  static constexpr bool kPacksBins =
      Slice::kResident && Config::kRowSlots * kNumThreads * Slice::kVecSize < 65536;
  static constexpr int kBinWords = kPacksBins ? kNumBins / 2 : kNumBins;
  static constexpr int kListCapacity = 896, kListPerBlock = kListCapacity / kClusterSize;
  static constexpr float kTightSlack = 1e-3f;   // how far binned weights may be off, usually
  static constexpr float kRoundingSlack = 1e-5f;  // of bounds summed in float
  static constexpr uint32_t kNone = 0xffffffff;

  // [begin, end) in depth: all before is kept, all from `end` on is cut.
  struct Window {
    uint32_t begin, end;
    Tally above;      // elements before begin
    uint32_t inside;   // number of elements
    bool ends_by_cut;  // because a limit is reached before `end`, not for want of more elements
    bool is_counted;   // by step 2
  };
  struct Collected {
    float weight_above, weight_inside;  // of the elements before the window, and inside
    uint32_t count;                     // of the elements inside
    float max;                          // of the elements inside
    float min;                          // of all before the window's end: inside it, if it is not empty
  };
  struct Smem {
    union {
      struct {
        uint32_t maxima[kNumThreads];
        uint32_t words[kBinWords];
      } bins;
      struct {
        uint32_t count[kNumThreads], weight_high[kNumThreads], weight_low[kNumThreads];
      } exact;
    };
    Candidate list[kListCapacity];  // the leader's is filled by all blocks, each in its own part
    Collected collected[kClusterSize];
    Window window;
    float scratch[4][kNumWarps];
    Tally tally_scratch[kNumWarps], tally_before_open;
    ExactTally exact_scratch[kNumWarps], exact_before;
    uint32_t list_size, first_open, first_cut, count_to_cut, chosen_bin;
  };

  Slice& slice;
  Smem& smem;
  const Depth<Config> depth;
  const Weigh<Config> weigh;
  const float thread_max;
  const float lowest_thread_max;

  // What is known when the search ends.
  Window window;
  Collected all;              // over the cluster
  float thread_weight_above;  // this thread's part of all.weight_above
  bool is_listed;             // the leader holds the elements inside the window; else none of them is open
  float tie_threshold;        // the threshold, if not

  // Steps 1 to 3. Collective over the cluster; ends with its barrier. What lies at depth_end or deeper is taken for cut.
  __device__ __forceinline__ void run(uint32_t top_k, float target, uint32_t depth_end) {
    window = {0, depth_end, Tally{}, 0, false, false};
    bool is_crowded = !bound_by_maxima(top_k, target);
    const uint32_t widest_end = window.end;
    const bool widest_ends_by_cut = window.ends_by_cut;
    bool is_tight = Config::kTopP;
    is_listed = true;
#pragma unroll 1
    while (true) {
      if (is_crowded) {
        narrow(top_k, target, is_tight);
        is_crowded = window.inside > kListCapacity && window.end - window.begin > 1;
        if (is_crowded) continue;
      }
      const bool overflows = collect();
      if (Config::kTopP && is_tight && is_off_target(top_k, target)) {
        is_tight = false;
        window = {0, widest_end, Tally{}, 0, widest_ends_by_cut, false};
        is_crowded = true;
        continue;
      }
      if (all.count == 0) {  // all before the window's end stays
        is_listed = false;
        tie_threshold = all.min;
        return;
      }
      if (!overflows) return;
      if (all.max == all.min || window.end - window.begin <= 1) break;
      is_crowded = true;
    }
    // More equal elements than the list holds: they stay or go together.
    is_listed = false;
    const bool stays = window.above.count < top_k && (window.above.count == 0 || all.weight_above < target);
    tie_threshold = stays ? all.min : next_above(all.max);
    if (stays && Config::kInput != kOrderOnly) {
      cluster_sync<kClusterSize>();  // all have read what was collected
      window.begin = window.end;
      collect();
    }
  }

  // ------------------------------------------------------------------------------------------- step 4, leader only

  __device__ __forceinline__ float fixed_scale() const {
    return 0x1p40f / (Config::kInput == kLogits ? 1.f : depth.max);
  }
  __device__ __forceinline__ uint64_t fixed_weight(float score) const {
    return static_cast<uint64_t>(weigh(score) * fixed_scale());
  }

  // The threshold on the list, given the limits on the row.
  __device__ __forceinline__ float select(uint32_t top_k, float target) {
    uint64_t weight_left = ~0ull;
    if (Config::kTopP && target < kInfinity) {
      const float left = (target - all.weight_above) * fixed_scale();
      weight_left = left > 0.f ? static_cast<uint64_t>(left) : 0;
      if (window.above.count == 0 && weight_left == 0) weight_left = 1;  // the largest always stays
    }
    const uint32_t count_left = top_k - min(top_k, window.above.count);
    if (count_left == 0 || weight_left == 0) return next_above(all.max);
    const int32_t top = ordered_bits(all.max);
    const uint32_t width = uint32_t(top) - uint32_t(ordered_bits(all.min)) + 1;
    const uint32_t found = radix_select(
        width, count_left, weight_left, [&](Candidate candidate) { return uint32_t(top) - ordered_bits(candidate.score); },
        [&](Candidate candidate) { return Config::kTopP ? fixed_weight(candidate.score) : 0; });
    return found == kNone ? all.min : from_ordered_bits(top - found);
  }

  // The weight of the list from a threshold on. Collective over the block.
  __device__ __forceinline__ uint64_t list_weight(float threshold) {
    ExactTally sum;
    for_each_listed([&](Candidate candidate) {
      if (candidate.score >= threshold) sum.weight += fixed_weight(candidate.score);
    });
    __syncthreads();
    const ExactTally before = block_exclusive_scan<kNumThreads>(sum, smem.exact_scratch);
    if (threadIdx.x == kNumThreads - 1) smem.exact_before = before + sum;
    __syncthreads();
    return smem.exact_before.weight;
  }

  // The token at which the weights from the threshold on, summed in order of token ids, exceed `drawn`.
  __device__ __forceinline__ int draw(float threshold, uint64_t drawn, int vocab_size) {
    return radix_select(
        vocab_size, kNone, drawn + 1, [](Candidate candidate) { return uint32_t(candidate.token_id); },
        [&](Candidate candidate) { return candidate.score >= threshold ? fixed_weight(candidate.score) : 0; });
  }

 private:
  __device__ __forceinline__ static float next_above(float score) {
    return from_ordered_bits(ordered_bits(score) + 1);
  }

  // Step 1. Returns whether few enough elements can be left for the list.
  __device__ __forceinline__ bool bound_by_maxima(uint32_t top_k, float target) {
    const uint32_t sampled_end = lowest_thread_max < kInfinity ? depth(lowest_thread_max) + 1 : window.end;
    const uint32_t end = min(window.end, max(sampled_end, 1u));
    const int shift = max(0, 32 - __clz(end - 1) - kLog2Threads);
    clear_results();
    smem.bins.maxima[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t thread_depth = depth(thread_max);
    if (thread_max > Slice::kPadding && thread_depth < end) atomicAdd(&smem.bins.maxima[thread_depth >> shift], 1u);
    cluster_sync<kClusterSize>();
    Tally bin;
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      bin.count += load_shared_at_rank<kClusterSize>(&smem.bins.maxima[threadIdx.x], rank);
    }
    if constexpr (Config::kTopP) {
      bin.lower = bin.count * depth.weight((threadIdx.x + 1u) << shift) * (1.f - kRoundingSlack);
    }
    find_bins(&bin, 1, Tally{}, top_k, target);
    if (smem.first_cut == kNone) return false;
    window.end = border_after(0, end, smem.first_cut, shift);
    window.ends_by_cut = true;
    // At 0.8 of the threads, 1.6 elements a thread of them are to be expected.
    const uint32_t few = kNumThreads * kClusterSize * 4 / 5;
    return smem.count_to_cut <= (few < kListCapacity / 2 ? few : kListCapacity / 2);
  }

  // Step 2. The leader adds the blocks' bins and tells all of them the window.
  __device__ __forceinline__ void narrow(uint32_t top_k, float target, bool is_tight) {
    const uint32_t begin = window.begin, width = window.end - window.begin;
    const int shift = max(0, 32 - __clz(width - 1) - kLog2Bins);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBinWords / kNumThreads; ++i) smem.bins.words[i * kNumThreads + threadIdx.x] = 0;
    clear_results();
    if (depth(thread_max) < window.end) {
      slice.for_each([&](float score, int, int) {
        const uint32_t below = depth(score) - begin;
        if (below >= width) return;
        const uint32_t bin = below >> shift;
        atomicAdd(&smem.bins.words[bin % kBinWords], bin < kBinWords ? 1u : 0x10000u);
      });
    }
    cluster_sync<kClusterSize>();
    if (cluster_rank<kClusterSize>() == 0) {
      Tally bins[kBinsPerThread];
      add_bins(bins);
      if constexpr (Config::kTopP) {
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
          const uint32_t top = begin + (uint32_t(threadIdx.x * kBinsPerThread + i) << shift), bottom = top + (1u << shift);
          float lightest = depth.weight(bottom), heaviest = depth.weight(top - min(top, 1u));
          if (is_tight) lightest = heaviest = 0.5f * (lightest + heaviest);
          const float slack = is_tight ? kTightSlack : kRoundingSlack;
          bins[i].lower = bins[i].count * lightest * (1.f - slack);
          bins[i].upper = bins[i].count * heaviest * (1.f + slack);
        }
      }
      find_bins(bins, kBinsPerThread, window.above, top_k, target);
      Window found = window;
      if (smem.first_cut != kNone) {
        found.end = border_after(begin, window.end, smem.first_cut, shift);
        found.ends_by_cut = true;
      }
      found.begin = smem.first_open == kNone ? found.end : begin + (smem.first_open << shift);
      found.above = smem.tally_before_open;
      found.inside = smem.count_to_cut - found.above.count;
      found.is_counted = true;
      if (threadIdx.x < kClusterSize) *shared_at_rank<kClusterSize>(&smem.window, threadIdx.x) = found;
    }
    cluster_sync<kClusterSize>();
    window = smem.window;
  }

  // Step 3. Returns whether a block had more elements inside than its part of the list.
  __device__ __forceinline__ bool collect() {
    __syncthreads();
    if (threadIdx.x == 0) smem.list_size = 0;
    __syncthreads();
    float weight_above = 0.f, weight_inside = 0.f, inside_max = -kInfinity, lowest = kInfinity;
    if (depth(thread_max) < window.end) {
      Candidate* const list =
          shared_at_rank<kClusterSize>(smem.list, 0) + cluster_rank<kClusterSize>() * kListPerBlock;
      slice.for_each([&](float score, int slot, int lane) {
        const uint32_t d = depth(score);
        if (d >= window.end) return;
        lowest = fminf(lowest, score);
        if (d < window.begin) {
          if constexpr (Config::kInput != kOrderOnly) weight_above += weigh(score);
          return;
        }
        inside_max = fmaxf(inside_max, score);
        if constexpr (Config::kTopP) weight_inside += weigh(score);
        const uint32_t place = atomicAdd(&smem.list_size, 1u);
        if (place < kListPerBlock) list[place] = {score, slice.token_id(slot, threadIdx.x, lane)};
      });
    }
    thread_weight_above = weight_above;
    Collected mine;
    mine.weight_above = 0.f;
    if constexpr (Config::kInput != kOrderOnly) {
      mine.weight_above = block_reduce<kNumThreads>(weight_above, Sum{}, smem.scratch[0]);
    }
    mine.weight_inside = Config::kTopP ? block_reduce<kNumThreads>(weight_inside, Sum{}, smem.scratch[1]) : 0.f;
    mine.max = block_reduce<kNumThreads>(inside_max, Max{}, smem.scratch[2]);
    mine.min = -block_reduce<kNumThreads>(-lowest, Max{}, smem.scratch[3]);
    mine.count = smem.list_size;
    if (threadIdx.x < kClusterSize) {
      *shared_at_rank<kClusterSize>(&smem.collected[cluster_rank<kClusterSize>()], threadIdx.x) = mine;
    }
    cluster_sync<kClusterSize>();
    all = {0.f, 0.f, 0, -kInfinity, kInfinity};
    bool overflows = false;
#pragma unroll
    for (int rank = 0; rank < kClusterSize; ++rank) {
      const Collected& block = smem.collected[rank];
      all.weight_above += block.weight_above;
      all.weight_inside += block.weight_inside;
      all.count += block.count;
      all.max = fmaxf(all.max, block.max);
      all.min = fminf(all.min, block.min);
      overflows |= block.count > kListPerBlock;
    }
    return overflows;
  }

  // Whether the exact weights contradict the window that binned weights gave.
  __device__ __forceinline__ bool is_off_target(uint32_t top_k, float target) const {
    if (!window.is_counted) return false;
    const bool begins_too_deep = window.above.count > 0 && all.weight_above >= target;
    const bool is_cut_by_weight = window.ends_by_cut && window.above.count + window.inside < top_k;
    const float weight = all.weight_above + all.weight_inside;
    return begins_too_deep || (is_cut_by_weight && weight < target * (1.f - kRoundingSlack));
  }

  template <class Visit>
  __device__ __forceinline__ void for_each_listed(Visit visit) const {
#pragma unroll 1
    for (int rank = 0; rank < kClusterSize; ++rank) {
      const uint32_t count = smem.collected[rank].count;
      for (uint32_t i = threadIdx.x; i < count; i += kNumThreads) visit(smem.list[rank * kListPerBlock + i]);
    }
  }

  // The smallest rank at which the candidates up to it number at least count_left or weigh at least weight_left, or
  // kNone. rank_of(candidate) < width takes part. kNumThreads bins at a time, one bin a thread.
  template <class RankOf, class WeightOf>
  __device__ __forceinline__ uint32_t radix_select(uint32_t width, uint32_t count_left, uint64_t weight_left,
                                                   RankOf rank_of, WeightOf weight_of) {
    uint32_t begin = 0;
#pragma unroll 1
    while (true) {
      const int shift = max(0, 32 - __clz(width - 1) - kLog2Threads);
      __syncthreads();
      smem.exact.count[threadIdx.x] = smem.exact.weight_high[threadIdx.x] = smem.exact.weight_low[threadIdx.x] = 0;
      if (threadIdx.x == 0) smem.chosen_bin = kNone;
      __syncthreads();
      for_each_listed([&](Candidate candidate) {
        const uint32_t below = rank_of(candidate) - begin;
        if (below >= width) return;
        const uint32_t bin = below >> shift;
        atomicAdd(&smem.exact.count[bin], 1u);
        // 40 bits in two halves, so that 2^10 of them add up in a word each.
        const uint64_t weight = weight_of(candidate);
        if (weight > 0) {
          atomicAdd(&smem.exact.weight_high[bin], uint32_t(weight >> 20));
          atomicAdd(&smem.exact.weight_low[bin], uint32_t(weight) & 0xfffffu);
        }
      });
      __syncthreads();
      const ExactTally bin{smem.exact.count[threadIdx.x],
                           (uint64_t(smem.exact.weight_high[threadIdx.x]) << 20) + smem.exact.weight_low[threadIdx.x]};
      const ExactTally before = block_exclusive_scan<kNumThreads>(bin, smem.exact_scratch);
      const bool is_reached_before = before.count >= count_left || before.weight >= weight_left;
      const bool is_reached_after = before.count + bin.count >= count_left || before.weight + bin.weight >= weight_left;
      if (!is_reached_before && is_reached_after) {
        smem.chosen_bin = threadIdx.x;
        smem.exact_before = before;
      }
      __syncthreads();
      if (smem.chosen_bin == kNone) return kNone;
      begin += smem.chosen_bin << shift;
      if (shift == 0) return begin;
      width = 1u << shift;
      count_left -= smem.exact_before.count;
      weight_left -= smem.exact_before.weight;
    }
  }

  __device__ __forceinline__ void clear_results() {
    if (threadIdx.x == 0) {
      smem.first_open = smem.first_cut = kNone;
      smem.count_to_cut = 0;
      smem.tally_before_open = Tally{};
    }
    __syncthreads();
  }

  // This thread's bins, added over the blocks.
  __device__ __forceinline__ void add_bins(Tally* bins) const {
#pragma unroll 2
    for (int rank = 0; rank < kClusterSize; ++rank) {
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        const int bin = threadIdx.x * kBinsPerThread + i;
        const uint32_t word = load_shared_at_rank<kClusterSize>(&smem.bins.words[bin % kBinWords], rank);
        bins[i].count += !kPacksBins ? word : bin < kBinWords ? word & 0xffffu : word >> 16;
      }
    }
  }

  // The depth at which the bin after this one begins, within the window. In 64 bits: a window may span all of uint32.
  __device__ __forceinline__ static uint32_t border_after(uint32_t begin, uint32_t end, uint32_t bin, int shift) {
    const uint64_t border = begin + ((uint64_t(bin) + 1) << shift);
    return border < end ? uint32_t(border) : end;
  }

  // Given each thread's next num_bins bins, finds the first bin that is not certainly kept (first_open) and the first
  // behind which all is certainly cut (first_cut). Results in shared memory, visible to the block on return.
  __device__ __forceinline__ void find_bins(const Tally* bins, int num_bins, const Tally& above, uint32_t top_k,
                                            float target) {
    Tally sum;
#pragma unroll
    for (int i = 0; i < num_bins; ++i) sum = sum + bins[i];
    Tally before = above + block_exclusive_scan<kNumThreads>(sum, smem.tally_scratch);
    uint32_t open_bin = kNone, cut_bin = kNone, count_to_cut = 0;
    Tally before_open;
#pragma unroll
    for (int i = 0; i < num_bins; ++i) {
      const Tally after = before + bins[i];
      const bool is_kept = after.count < top_k && (!Config::kTopP || after.upper < target);
      const bool is_cut = after.count >= top_k || (Config::kTopP && after.lower >= target);
      if (!is_kept && open_bin == kNone) {
        open_bin = threadIdx.x * num_bins + i;
        before_open = before;
      }
      if (is_cut && cut_bin == kNone) {
        cut_bin = threadIdx.x * num_bins + i;
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
    if (smem.first_open == kNone && threadIdx.x == kNumThreads - 1) smem.tally_before_open = before;
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
