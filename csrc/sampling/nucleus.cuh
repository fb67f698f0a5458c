// SPDX-License-Identifier: Apache-2.0
// Top-p by rejection: draw first, check after. No order, no search.
//
// A token drawn from the whole distribution, and thrown away unless it lies in the nucleus, is distributed as the
// nucleus demands. It lies there if the strictly larger weights sum to less than the target, which one look at the row
// tells, and the same look tells it of several candidates: of those, drawn independently, the first that passes is
// taken. If none passes, everything up to the largest of them lies outside as well, and the next candidates are drawn
// from what is above that floor. A round fails with probability (1 - top_p)^kNumCandidates; from round to round the
// weight above the floor falls geometrically towards the nucleus, and the largest weight always passes.
#pragma once

#include "sampling/draw.cuh"
#include "sampling/pivots.cuh"

namespace flashinfer {

template <class Config>
struct Nucleus {
  using Slice = RowSlice<Config>;
  static constexpr int kNumThreads = Config::kNumThreads, kClusterSize = Config::kClusterSize;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kNumCandidates = Config::kNumCandidates;
  static_assert(kNumCandidates <= kNumWarps, "a warp draws one candidate");

  using Candidates = Pivots<Config, kNumCandidates>;
  using Masses = typename Candidates::Masses;

  struct alignas(8) Candidate {
    float score;
    int32_t token_id;
  };
  struct Smem {
    float thread_weights[kNumThreads];    // above the floor, of this block's threads
    typename Candidates::Table warps[2];  // of the rounds, in turn
    Candidate candidates[kNumCandidates];
  };

  Slice& slice;
  Smem& smem;
  RowMail<kClusterSize>& mail;
  const Weigh<Config> weigh;

  // Draws from `part`; the weights above a token must sum to less than target. Collective over the cluster. emit(token
  // id) runs in one thread.
  template <class Emit>
  __device__ __forceinline__ void draw(const RandomKey& random, const RowTotals<Config>& part, float target,
                                       Emit emit) {
    __syncthreads();  // a search may have used the same memory
    for (int i = threadIdx.x; i < RowTotals<Config>::Table::kNumEntries; i += kNumThreads) {
      smem.warps[1].entries[i].above[0] = rebase<Config>(part.warps->entries[i], weigh.max, weigh.scale);
    }
    float floor = part.floor, thread_weight = rebase<Config>(part.thread, weigh.max, weigh.scale);
    int floor_idx = 0;  // the candidate of the round before that is the floor
#pragma unroll 1
    for (int round = 0;; ++round) {
      smem.thread_weights[threadIdx.x] = thread_weight;
      __syncthreads();
      draw_candidates(random, round, floor, floor_idx);
      mail.candidates.receive(kNumCandidates * sizeof(Candidate), round);

      Candidates candidates;
      int32_t token_ids[kNumCandidates];
#pragma unroll
      for (int c = 0; c < kNumCandidates; ++c) {
        candidates.score[c] = smem.candidates[c].score;
        token_ids[c] = smem.candidates[c].token_id;
      }
      const Masses thread = candidates.in_thread(slice, part.thread_max, weigh);
      const Masses row = Candidates::in_row(thread, smem.warps[round % 2], mail.candidate_masses[round % 2], round / 2);

      int token_id = -1;
      floor = -kInfinity;
#pragma unroll
      for (int c = kNumCandidates - 1; c >= 0; --c) {
        if (row.above[c] < target || row.above[c] == 0.f) token_id = token_ids[c];
        if (candidates.score[c] > floor) {
          floor = candidates.score[c];
          floor_idx = c;
          thread_weight = thread.above[c];
        }
      }
      if (token_id >= 0) {
        if (cluster_rank<kClusterSize>() == 0 && threadIdx.x == 0) emit(token_id);
        return;
      }
      __syncthreads();  // all have read the weights of this round
    }
  }

 private:
  // Warp c of the block that holds it finds candidate c and tells all blocks.
  __device__ __forceinline__ void draw_candidates(const RandomKey& random, int round, float floor, int floor_idx) {
    const int lane_idx = threadIdx.x % kWarpSize, candidate_idx = threadIdx.x / kWarpSize;
    if (candidate_idx >= kNumCandidates) return;
    const RandomKey own = random.attempt(round * kNumCandidates + candidate_idx);
    const RandomWords words = own.words(0);
    const int picked = pick_warp(smem.warps[(round + 1) % 2], words.uniform(0), words.uniform(1),
                                 [&](const Masses& warp) { return warp.above[floor_idx]; });
    if (picked / kNumWarps != cluster_rank<kClusterSize>()) return;
    const int warp_idx = picked % kNumWarps;
    draw_from_warp(
        slice, words, own.words(1).uniform(0), warp_idx, smem.thread_weights[warp_idx * kWarpSize + lane_idx],
        [&](int slot, int thread_idx, float* weights) {
          const typename Slice::Granule granule = slice.at(slot, thread_idx);
#pragma unroll
          for (int i = 0; i < Slice::kVecSize; ++i) {
            const float score = to_float(granule[i]);
            weights[i] = score > floor ? weigh(score) : 0.f;
          }
        },
        [&](int slot, int thread_idx, int lane) {
          const Candidate candidate{slice.score(slot, thread_idx, lane), slice.token_id(slot, thread_idx, lane)};
#pragma unroll
          for (int rank = 0; rank < kClusterSize; ++rank) {
            mail.candidates.send(&smem.candidates[candidate_idx], candidate, rank);
          }
        });
  }
};

template <class Config, bool kTopP>
struct NucleusSmem : Nucleus<Config>::Smem {};
template <class Config>
struct NucleusSmem<Config, false> {};

}  // namespace flashinfer
