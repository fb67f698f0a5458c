// The smallest score that top-k and top-p keep, found without sorting.
//
// Both filters are one monotone predicate: an element stays if fewer than k elements are larger, and if the weight of
// the larger ones is less than the target (p times the whole). Equal elements are kept or cut together. The search
// guesses a window of scores that holds the threshold and few elements, checks the guess exactly, and lets one block
// decide on the elements inside:
//
//   1. The maxima of groups of threads, a by-product of the one reading, are a sample of the large elements. Where they
//      exceed k, the row does; where they exceed the target or come near it, it is worth a try. For the usual peaked
//      row that is the whole search, and most warps never look at their elements again.
//   2. Otherwise: count the row's elements in 1024 bins of depth below the maximum. Counts times the bins' weights say
//      where in which bin the limit falls.
//   3. Count and weigh what lies above the window, exactly, and send what lies inside to the leader, the cluster's
//   first
//      block. If the guess was wrong or too many are inside (rows of few distinct values), the tallies still bracket
//      the threshold: guess again inside, and after a few guesses halve.
//   4. The leader decides on its list with fixed-point sums, in which order does not matter.
//
// What all blocks must agree on, all compute from the same numbers in the same order.
#pragma once

#include "device/atomic.cuh"
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

// Elements counted and weighed from the top.
struct Tally {
  uint32_t count = 0;
  float weight = 0.f;

  __device__ __forceinline__ Tally operator+(const Tally& other) const {
    return {count + other.count, weight + other.weight};
  }
  __device__ __forceinline__ Tally shifted_up(int lanes) const {
    return {__shfl_up_sync(0xffffffffu, count, lanes), __shfl_up_sync(0xffffffffu, weight, lanes)};
  }
};

// [begin, end) in depth. If the guess is right, all before is kept and all from `end` on is cut.
struct Window {
  uint32_t begin, end;
};

// What a warp, and then the row, finds about a window.
struct alignas(16) WindowTally {
  float weight_above, weight_inside;
  uint32_t count_above, count_inside;
  int32_t max, min;    // ordered bits of the elements inside
  uint32_t overflows;  // elements inside that found no place in the list
};

constexpr int32_t kLowestOrder = -0x7fffffff - 1, kHighestOrder = 0x7fffffff;

constexpr int floor_log2(int n) {
  return n <= 1 ? 0 : 1 + floor_log2(n / 2);
}

struct Candidate {
  float score;
  int32_t token_id;
};

// A candidate as the others see it.
struct alignas(16) RankedCandidate {
  float score;
  int32_t token_id;
  uint32_t weight;  // in units of 2^-31 of the list's
};

template <class Config>
struct ThresholdSearch {
  using Slice = RowSlice<Config>;
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr bool kWeighs = Config::kInput != kOrderOnly;
  static constexpr int kLog2Bins = 10, kNumBins = 1 << kLog2Bins, kBinsPerThread = kNumBins / kNumThreads;
  // Two counts share a word where a block cannot hold more elements than a half word counts.
  static constexpr bool kPacksBins = Slice::kResident && Config::kRowSlots * kNumThreads * Slice::kVecSize < 65536;
  static constexpr int kBinWords = kPacksBins ? kNumBins / 2 : kNumBins;
  static constexpr int kNumSampleBins = 2 * kWarpSize;
  // The list has room for uneven blocks; ranking takes one candidate a thread.
  static constexpr int kListCapacity = 2 * kNumThreads, kListPerBlock = kListCapacity / kClusterSize;
  static constexpr uint32_t kNone = 0xffffffff;

  struct Smem {
    union {
      float maxima[kNumThreads];  // of groups of threads, row-wide; read in step 1 alone
      uint32_t words[kBinWords];  // bins of step 2
    };
    uint32_t sample_bins[kNumSampleBins];
    union {
      Candidate list[kListCapacity];  // the leader's is filled by all blocks, each in its own part
      RankedCandidate ranked[kNumThreads];
    };
    WarpTable<Config, WindowTally> tallies;
    Window guess, guess_bin;
    Tally scan[kNumWarps], before_cut, at_cut;
    uint32_t list_size, first_cut;
    uint32_t block_counts[kClusterSize], totals[kNumWarps];
    int32_t lowest[kNumWarps];
  };

  Slice& slice;
  Smem& smem;
  const Depth<Config> depth;
  const Weigh<Config> weigh;
  const float thread_max;
  const float lowest_warp_max;

  // What is known when the search ends.
  Window window;              // the last guess
  WindowTally all;            // over the cluster
  float thread_weight_above;  // this thread's part of all.weight_above
  bool is_listed;             // the leader holds the elements inside the window; else none of them is open
  float tie_threshold;        // the threshold, if not

  // Steps 1 to 3. Collective over the cluster; ends with its barrier. What lies at depth_end or deeper is taken for
  // cut.
  __device__ __forceinline__ void run(uint32_t top_k, float target, uint32_t depth_end, bool has_maxima) {
    Window bracket{0, depth_end};  // holds the threshold for certain
    Tally above;                   // what lies above it
    Window bin{0, depth_end};      // the bin of the last guess
    int attempt = has_maxima && sample(top_k, target, depth_end) ? 0 : 1;
    is_listed = true;
#pragma unroll 1
    while (true) {
      const Window rest{max(bin.begin, bracket.begin), min(bin.end, bracket.end)};  // of the bin, after its first guess
      if (attempt == 1 || attempt == 3 || (attempt == 2 && rest.begin >= rest.end)) {
        guess_by_bins(bracket, above, top_k, target, bin);
      } else if (attempt > 0) {
        cluster_sync<kClusterSize>();  // all have read the tallies
        const uint32_t middle = bracket.begin + (bracket.end - bracket.begin) / 2;
        window = attempt == 2 ? rest : Window{middle, bracket.end};
      }
      window = {max(window.begin, bracket.begin), min(window.end, bracket.end)};
      ++attempt;
      collect();

      const Tally to_end{all.count_above + all.count_inside, all.weight_above + all.weight_inside};
      const bool begins_right =
          all.count_above == 0 || !reaches({all.count_above - 1, all.weight_above}, top_k, target);
      const bool ends_right = window.end == depth_end || reaches(to_end, top_k, target);
      if (begins_right && ends_right) {
        if (all.count_inside > 0 && all.overflows == 0 && all.count_inside <= kNumThreads) return;
        if (all.count_inside == 0 || all.max == all.min || window.end - window.begin <= 1) break;
      }
      if (begins_right) {
        bracket.begin = window.begin;
        above = {all.count_above, all.weight_above};
      } else {
        bracket.end = window.begin;
      }
      if (ends_right) {
        bracket.end = min(bracket.end, window.end);
      } else {
        bracket.begin = window.end;
        above = to_end;
      }
      if (bracket.begin >= bracket.end) {  // sums of another order disagree: the limit is at this border
        window = {bracket.end, bracket.end};
        cluster_sync<kClusterSize>();  // all have read the tallies
        collect();
        break;
      }
    }
    // Nothing inside, or more equal elements than can be ranked: they stay or go together.
    is_listed = false;
    if (all.count_inside == 0) {
      tie_threshold = find_lowest();
      return;
    }
    const bool stays = all.count_above == 0 || !reaches({all.count_above, all.weight_above}, top_k, target);
    tie_threshold = from_ordered_bits(stays ? all.min : all.max + 1);
    if (stays) {
      cluster_sync<kClusterSize>();  // all have read the tallies
      window.begin = window.end;
      collect();
    }
  }

  // ---------------------------------------------------------------------------------------------- step 4, leader only

  // The leader's view of its list: one candidate a thread.
  struct Ranking {
    Candidate candidate;
    bool is_candidate, is_kept;
    uint32_t weight, total;  // of this candidate, and of all
    uint32_t count_larger;   // candidates with a larger score
    uint32_t weight_larger;  // and their weight
    uint32_t weight_before;  // the same with ties broken by token id
    float unit;              // weights are in multiples of it
    int32_t lowest;          // ordered bits of the smallest kept score
  };

  // Compares each candidate with all others. Collective over the block; the list is gone afterwards.
  __device__ __forceinline__ Ranking rank() {
    if (threadIdx.x < kClusterSize) {
      uint32_t count = 0;
      for (int warp = 0; warp < kNumWarps; ++warp) {
        count += smem.tallies.entries[threadIdx.x * kNumWarps + warp].count_inside;
      }
      smem.block_counts[threadIdx.x] = count;
    }
    __syncthreads();
    Ranking mine;
    mine.is_candidate = false;
    mine.candidate = {0.f, 0};
    int place = threadIdx.x;
#pragma unroll
    for (int block = 0; block < kClusterSize; ++block) {
      const int count = smem.block_counts[block];
      if (place >= 0 && place < count) {
        mine.candidate = smem.list[block * kListPerBlock + place];
        mine.is_candidate = true;
      }
      place -= count;
    }
    mine.unit = all.weight_inside * 0x1p-31f;
    mine.weight = 0;
    if (kWeighs && mine.is_candidate && mine.unit > 0.f) {
      mine.weight = __float2uint_rz(weigh(mine.candidate.score) / mine.unit);
    }
    __syncthreads();
    smem.ranked[threadIdx.x] = {mine.candidate.score, mine.candidate.token_id, mine.weight};
    __syncthreads();
    mine.count_larger = mine.weight_larger = 0;
    uint32_t weight_tied = 0;
    // Whole warps without a candidate have nothing to compare.
    if (threadIdx.x / kWarpSize * kWarpSize < all.count_inside) {
#pragma unroll 4
      for (uint32_t i = 0; i < all.count_inside; ++i) {
        const RankedCandidate other = smem.ranked[i];
        if constexpr (kWeighs) {
          // Masks instead of predicates, whose latency would set the pace: all ones if the condition holds.
          const int32_t difference = __float_as_int(mine.candidate.score - other.score);
          const uint32_t is_larger = difference >> 31;
          const uint32_t is_tied_before =
              ~((difference | -difference) >> 31) & ((other.token_id - mine.candidate.token_id) >> 31);
          mine.count_larger -= is_larger;
          mine.weight_larger += is_larger & other.weight;
          weight_tied += is_tied_before & other.weight;
        } else {
          mine.count_larger += other.score > mine.candidate.score;
        }
      }
    }
    mine.weight_before = mine.weight_larger + weight_tied;
    return mine;
  }

  // Applies limits on the row to the ranked candidates: which are kept, their total and the smallest.
  __device__ __forceinline__ void limit(Ranking& mine, uint32_t top_k, float target) {
    const uint32_t count_left = top_k - min(top_k, all.count_above);
    uint32_t weight_left = 0xffffffffu;
    if (kWeighs && target < kInfinity) {
      weight_left = __float2uint_rz((target - all.weight_above) / mine.unit);  // saturates at both ends
      if (all.count_above == 0) weight_left = max(weight_left, 1u);            // the largest stays
    }
    mine.is_kept = mine.is_candidate && mine.count_larger < count_left && mine.weight_larger < weight_left;
    const uint32_t total = __reduce_max_sync(0xffffffffu, mine.is_kept ? mine.weight_before + mine.weight : 0u);
    const int32_t lowest =
        __reduce_min_sync(0xffffffffu, mine.is_kept ? ordered_bits(mine.candidate.score) : all.max + 1);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) {
      smem.totals[threadIdx.x / kWarpSize] = total;
      smem.lowest[threadIdx.x / kWarpSize] = lowest;
    }
    __syncthreads();
    mine.total = 0;
    mine.lowest = all.max + 1;
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) {
      mine.total = max(mine.total, smem.totals[warp]);
      mine.lowest = min(mine.lowest, smem.lowest[warp]);
    }
  }

 private:
  // Step 1. Returns whether the maxima suggest a window.
  __device__ __forceinline__ bool sample(uint32_t top_k, float target, uint32_t depth_end) {
    const int lane_idx = threadIdx.x % kWarpSize;
    const uint32_t sampled_end = lowest_warp_max < kInfinity ? depth(lowest_warp_max) : depth_end - 1;
    const uint32_t end = min(depth_end, sampled_end + 1);
    const int shift = max(0, 32 - __clz(end - 1) - floor_log2(kNumSampleBins));
    const uint32_t group_depth = depth(smem.maxima[threadIdx.x]);
    const bool is_occupied = smem.maxima[threadIdx.x] > Slice::kPadding;
    if (threadIdx.x < kNumSampleBins) smem.sample_bins[threadIdx.x] = 0;
    __syncthreads();
    if (is_occupied && group_depth < end) atomicAdd(&smem.sample_bins[group_depth >> shift], 1u);
    __syncthreads();
    // Every warp for itself, two bins a lane.
    const uint32_t top = uint32_t(2 * lane_idx) << shift, width = 1u << shift;
    const uint32_t counts[2] = {smem.sample_bins[2 * lane_idx], smem.sample_bins[2 * lane_idx + 1]};
    float weights[2] = {0.f, 0.f};
    if constexpr (Config::kTopP) {
      weights[0] = counts[0] * depth.weight(top + width / 2);
      weights[1] = counts[1] * depth.weight(top + width + width / 2);
    }
    uint32_t count = counts[0] + counts[1];
    float weight = weights[0] + weights[1];
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t count_below = __shfl_up_sync(0xffffffffu, count, offset);
      const float weight_below = __shfl_up_sync(0xffffffffu, weight, offset);
      if (lane_idx >= offset) count += count_below, weight += weight_below;
    }
    const uint32_t by_count = __ballot_sync(0xffffffffu, count >= top_k);
    int last_lane = by_count ? __ffs(by_count) - 1 : kWarpSize - 1;
    if constexpr (Config::kTopP) {
      // The sample sees but a part of the weight, so that a window that ends by weight reaches further, as far as the
      // list is sure to have room.
      const uint32_t by_weight = __ballot_sync(0xffffffffu, weight >= target);
      const uint32_t is_cheap = __ballot_sync(0xffffffffu, count <= kNumThreads / 4);
      const int enough_lane = by_weight ? __ffs(by_weight) - 1 : kWarpSize - 1;
      const int cheap_lane = is_cheap ? 31 - __clz(is_cheap) : 0;
      if (target < kInfinity) last_lane = min(last_lane, by_weight ? max(enough_lane, cheap_lane) : cheap_lane);
    }
    const uint32_t sampled_count = __shfl_sync(0xffffffffu, count, last_lane);
    const float sampled_weight = __shfl_sync(0xffffffffu, weight, last_lane);
    // At 0.55 of the groups, 0.8 elements a group are to be expected.
    if (sampled_count > kNumThreads * 11 / 20) return false;
    if (sampled_count < top_k && !(Config::kTopP && sampled_weight > 0.6f * target)) return false;
    const uint64_t border = uint64_t(2 * (last_lane + 1)) << shift;
    window = {0, border < end ? uint32_t(border) : end};
    return true;
  }

  // Step 2: `window`, and the bin it lies in. The leader adds the blocks' bins and tells all what it guesses.
  __device__ __forceinline__ void guess_by_bins(const Window& bracket, const Tally& above, uint32_t top_k, float target,
                                                Window& bin) {
    const uint32_t begin = bracket.begin, width = bracket.end - bracket.begin;
    const int shift = max(0, 32 - __clz(width - 1) - kLog2Bins);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBinWords / kNumThreads; ++i) smem.words[i * kNumThreads + threadIdx.x] = 0;
    if (threadIdx.x == 0) smem.first_cut = kNone;
    __syncthreads();
    if (depth(thread_max) < bracket.end) {
      const uint32_t words = static_cast<uint32_t>(__cvta_generic_to_shared(smem.words));
      slice.for_each([&](float score, int, int) {
        const uint32_t below = depth(score) - begin, place = below >> shift;
        if constexpr (kPacksBins) {
          add_shared_if(below < width, words + place / 2 * 4, place % 2 * 0xffffu + 1u);
        } else {
          add_shared_if(below < width, words + place * 4, 1u);
        }
      });
    }
    cluster_sync<kClusterSize>();
    if (cluster_rank<kClusterSize>() == 0) {
      Tally bins[kBinsPerThread];
      add_bins(bins);
#pragma unroll
      for (int i = 0; i < kBinsPerThread && Config::kTopP; ++i) {
        const uint32_t top = begin + (uint32_t(threadIdx.x * kBinsPerThread + i) << shift);
        bins[i].weight = bins[i].count * 0.5f * (depth.weight(top) + depth.weight(top + (1u << shift)));
      }
      find_cut(bins, above, top_k, target);
      Window guess{bracket.end, bracket.end}, guess_bin = bracket;  // no limit is reached: all of the bracket stays
      if (smem.first_cut != kNone) {
        const uint64_t border = begin + ((uint64_t(smem.first_cut) + 1) << shift);
        guess_bin = {begin + (smem.first_cut << shift), border < bracket.end ? uint32_t(border) : bracket.end};
        guess = interpolate(guess_bin, bracket, top_k, target);
      }
      if (threadIdx.x < kClusterSize) {
        *shared_at_rank<kClusterSize>(&smem.guess, threadIdx.x) = guess;
        *shared_at_rank<kClusterSize>(&smem.guess_bin, threadIdx.x) = guess_bin;
      }
    }
    cluster_sync<kClusterSize>();
    window = smem.guess;
    bin = smem.guess_bin;
  }

  // Guesses where in its bin the limit falls, from how far the bin's elements reach.
  __device__ __forceinline__ Window interpolate(const Window& bin, const Window& bracket, uint32_t top_k,
                                                float target) const {
    constexpr float kWeightError = 1.5e-4f;  // of binned weights, at least for smooth rows
    const Tally before = smem.before_cut, here = smem.at_cut;
    const float count = here.count;
    float part = 1.f, margin = (1.6f * sqrtf(count) + 6.f) / count;  // 3 deviations
    if (before.count + here.count >= top_k) part = (top_k - before.count) / count;
    if (Config::kTopP && before.weight + here.weight >= target) {
      part = fminf(part, fmaxf(target - before.weight, 0.f) / here.weight);
      margin += kWeightError * target / here.weight;
    }
    const float width = bin.end - bin.begin;
    const float first = (part - margin) * width, last = (part + margin) * width + 1.f;
    const uint32_t rise = min(bin.begin - bracket.begin, __float2uint_rz(-first));
    const uint32_t fall = min(bracket.end - bin.begin, __float2uint_rz(last));
    return {bin.begin - rise + min(bin.end - bin.begin, __float2uint_rz(first)), bin.begin + fall};
  }

  // Step 3.
  __device__ __forceinline__ void collect() {
    __syncthreads();
    if (threadIdx.x == 0) smem.list_size = 0;
    __syncthreads();
    const uint32_t begin = window.begin, width = window.end - window.begin;
    WindowTally mine{0.f, 0.f, 0, 0, kLowestOrder, kHighestOrder, 0};
    if (depth(thread_max) < window.end) {
      Candidate* const list = shared_at_rank<kClusterSize>(smem.list, 0) + cluster_rank<kClusterSize>() * kListPerBlock;
      slice.for_each_granule([&](const typename Slice::Granule& granule, int slot) {
        uint32_t inside = 0;
        if (begin == 0) {
          // Few elements reach the window: one look at the largest of the granule.
          float largest = to_float(granule[0]);
#pragma unroll
          for (int i = 1; i < Slice::kVecSize; ++i) largest = fmaxf(largest, to_float(granule[i]));
          if (depth(largest) >= width) return;
        }
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) {
          const float score = to_float(granule[i]);
          const uint32_t d = depth(score);
          inside |= uint32_t(d - begin < width) << i;
          mine.count_above += d < begin;
          if constexpr (kWeighs) mine.weight_above += d < begin ? weigh(score) : 0.f;
        }
        if (inside == 0) return;
        uint32_t place = atomicAdd(&smem.list_size, __popc(inside));
        mine.count_inside += __popc(inside);
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) {
          if (!(inside >> i & 1)) continue;
          const float score = to_float(granule[i]);
          mine.max = max(mine.max, ordered_bits(score));
          mine.min = min(mine.min, ordered_bits(score));
          if constexpr (kWeighs) mine.weight_inside += weigh(score);
          if (place < kListPerBlock) {
            list[place] = {score, slice.token_id(slot, threadIdx.x, i)};
          } else {
            ++mine.overflows;
          }
          ++place;
        }
      });
    }
    thread_weight_above = mine.weight_above;
    smem.tallies.push(warp_total(mine));
    cluster_sync<kClusterSize>();
    all = {0.f, 0.f, 0, 0, kLowestOrder, kHighestOrder, 0};
    smem.tallies.for_lane([&](const WindowTally& warp) {
      all.weight_above += warp.weight_above;
      all.weight_inside += warp.weight_inside;
      all.count_above += warp.count_above;
      all.count_inside += warp.count_inside;
      all.max = max(all.max, warp.max);
      all.min = min(all.min, warp.min);
      all.overflows += warp.overflows;
    });
    all = warp_total(all);
  }

  __device__ __forceinline__ static WindowTally warp_total(const WindowTally& lane) {
    constexpr uint32_t kAll = 0xffffffffu;
    return {kWeighs ? warp_reduce(lane.weight_above, Sum{}) : 0.f,
            kWeighs ? warp_reduce(lane.weight_inside, Sum{}) : 0.f,
            __reduce_add_sync(kAll, lane.count_above),
            __reduce_add_sync(kAll, lane.count_inside),
            __reduce_max_sync(kAll, lane.max),
            __reduce_min_sync(kAll, lane.min),
            __reduce_add_sync(kAll, lane.overflows)};
  }

  // Whether the elements tallied leave no room for smaller ones.
  __device__ __forceinline__ static bool reaches(const Tally& tally, uint32_t top_k, float target) {
    return tally.count >= top_k || (kWeighs && tally.weight >= target);
  }

  // The smallest score before the window's end. Collective over the cluster.
  __device__ __forceinline__ float find_lowest() {
    WindowTally mine{0.f, 0.f, 0, 0, kLowestOrder, kHighestOrder, 0};
    slice.for_each([&](float score, int, int) {
      if (depth(score) < window.end) mine.min = min(mine.min, ordered_bits(score));
    });
    mine = warp_total(mine);
    mine.weight_above = warp_reduce(thread_weight_above, Sum{});  // what the table holds is still needed
    cluster_sync<kClusterSize>();
    smem.tallies.push(mine);
    cluster_sync<kClusterSize>();
    int32_t lowest = kHighestOrder;
    smem.tallies.for_lane([&](const WindowTally& warp) { lowest = min(lowest, warp.min); });
    return from_ordered_bits(__reduce_min_sync(0xffffffffu, lowest));
  }

  // This thread's bins, added over the blocks.
  __device__ __forceinline__ void add_bins(Tally* bins) const {
    constexpr int kWordsPerThread = kBinWords / kNumThreads;
#pragma unroll 4
    for (int rank = 0; rank < kClusterSize; ++rank) {
#pragma unroll
      for (int i = 0; i < kWordsPerThread; ++i) {
        const uint32_t word = load_shared_at_rank<kClusterSize>(&smem.words[threadIdx.x * kWordsPerThread + i], rank);
        if constexpr (kPacksBins) {
          bins[2 * i].count += word & 0xffffu;
          bins[2 * i + 1].count += word >> 16;
        } else {
          bins[i].count += word;
        }
      }
    }
  }

  // Finds the first bin at which a limit is reached. Results in shared memory, visible to the block on return.
  __device__ __forceinline__ void find_cut(const Tally* bins, const Tally& above, uint32_t top_k, float target) {
    Tally sum;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum = sum + bins[i];
    Tally before = above + block_exclusive_scan<kNumThreads>(sum, smem.scan);
    uint32_t cut_bin = kNone;
    Tally before_cut, at_cut;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const Tally after = before + bins[i];
      if (cut_bin == kNone && reaches(after, top_k, target)) {
        cut_bin = threadIdx.x * kBinsPerThread + i;
        before_cut = before;
        at_cut = bins[i];
      }
      before = after;
    }
    if (cut_bin != kNone) atomicMin(&smem.first_cut, cut_bin);
    __syncthreads();
    if (cut_bin != kNone && smem.first_cut == cut_bin) {
      smem.before_cut = before_cut;
      smem.at_cut = at_cut;
    }
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
