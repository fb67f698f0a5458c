// SPDX-License-Identifier: Apache-2.0
// Chain speculative sampling (Leviathan, Kalman & Matias 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
//
// With the distributions p of the target and q of the draft at a step, and u uniform on [0, 1),
//
//   draft token x passes           if u · q(x) < p(x)
//   the first that fails becomes   a draw in proportion to max(p − q, 0)
//   if none fails, one more is     a draw in proportion to p of the last step
//
// The tokens before the first that fails are emitted, then the one drawn. So every emitted token follows p.
//
//   draft_probs  [num_rows, num_draft, vocab_size] T          draft_ids [num_rows, num_draft]
//   target_probs [num_rows, num_draft + 1, vocab_size] T      output_ids [num_rows, num_draft + 1], −1 behind the last
//
// One cluster a row. Every warp tests all drafts by itself, one a lane; then the two rows of the step that decides
// stream through registers once for their sums, and a token is drawn by levels (draw.cuh).
#pragma once

#include "device/pdl.cuh"
#include "sampling/draw.cuh"

namespace flashinfer {

// Sums over what a thread or a warp has seen.
struct alignas(8) SpeculativeWeights {
  float residual;  // of max(target - draft, 0)
  float target;    // of the target itself, for the row whose residual vanishes
};

template <class Config>
struct SpeculativeSmem {
  typename RowSlice<Config>::Smem target, draft;
  WarpTable<Config, SpeculativeWeights> warps;
  Mailbox<Config::kClusterSize> mailbox;
};

struct AcceptedDraft {
  int num_emitted;   // before the first that fails
  int num_accepted;  // of all
};

// Every warp does this for itself, one draft token a lane. Random words 0-7 belong to the draw.
template <class T>
__device__ __forceinline__ AcceptedDraft accept_draft(const SpeculativeParams& params, int row,
                                                      const RandomKey& random) {
  const int lane_idx = threadIdx.x % kWarpSize;
  AcceptedDraft accepted{-1, 0};
  for (int first = 0; first < params.num_draft; first += kWarpSize) {
    const int step = first + lane_idx;
    bool passes = false;
    if (step < params.num_draft) {
      const int64_t token_id =
          load_index(params.draft_ids, params.draft_ids_are_int64, int64_t(row) * params.num_draft + step);
      const T* draft =
          static_cast<const T*>(params.draft_probs) + row * params.draft_row_stride + step * params.draft_step_stride;
      const T* target = static_cast<const T*>(params.target_probs) + row * params.target_row_stride +
                        step * params.target_step_stride;
      if (token_id >= 0 && token_id < params.vocab_size) {
        const float uniform = random.words(2 + step / 4).uniform(step % 4);
        passes = uniform * to_float(draft[token_id]) < to_float(target[token_id]);
      }
    }
    const uint32_t fails = ~__ballot_sync(0xffffffffu, passes);
    if (accepted.num_emitted < 0 && fails) accepted.num_emitted = first + __ffs(fails) - 1;
    accepted.num_accepted += __popc(~fails);
  }
  if (accepted.num_emitted < 0 || accepted.num_emitted > params.num_draft) accepted.num_emitted = params.num_draft;
  return accepted;
}

template <class Config>
__device__ void chain_speculative(const SpeculativeParams& params) {
  using T = typename Config::T;
  using Slice = RowSlice<Config>;
  static_assert(!Slice::kResident && Config::kInput == kProbs, "both rows stream through registers");
  constexpr int kClusterSize = Config::kClusterSize;
  extern __shared__ __align__(16) unsigned char smem_raw[];
  static_assert(sizeof(SpeculativeSmem<Config>) <= Config::kSmemBytes);
  SpeculativeSmem<Config>& smem = *reinterpret_cast<SpeculativeSmem<Config>*>(smem_raw);

  Mailbox<kClusterSize>::open(&smem.mailbox, 1);
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize;
  const RandomKey random = RandomKey::of(params, row);
  const AcceptedDraft accepted = accept_draft<T>(params, row, random);
  const int step = accepted.num_emitted;
  const bool all_passed = step == params.num_draft;
  const T* target_gmem =
      static_cast<const T*>(params.target_probs) + row * params.target_row_stride + step * params.target_step_stride;
  const T* draft_gmem =
      static_cast<const T*>(params.draft_probs) + row * params.draft_row_stride + step * params.draft_step_stride;
  Slice target(target_gmem, params.vocab_size, smem.target);

  // Weights of the elements behind one granule of the target: of the residual and of the target itself.
  const auto residuals = [&](const typename Slice::Granule& granule, int slot, int thread_idx, float* weights) {
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) weights[i] = to_float(granule[i]);
    if (all_passed) return;
    const int first = target.token_id(slot, thread_idx, 0);
    typename Slice::Granule draft = Slice::padding();
    const bool is_aligned = (reinterpret_cast<uint64_t>(draft_gmem + first) & 15) == 0;
    if (is_aligned && first >= 0 && first + Slice::kVecSize <= params.vocab_size) {
      draft = Slice::Granule::load(draft_gmem + first);
    } else {
#pragma unroll
      for (int i = 0; i < Slice::kVecSize; ++i) {
        if (first + i >= 0 && first + i < params.vocab_size) draft[i] = draft_gmem[first + i];
      }
    }
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) weights[i] = fmaxf(weights[i] - to_float(draft[i]), 0.f);
  };

  SpeculativeWeights mine{0.f, 0.f};
#pragma unroll 4
  for (int slot = 0; slot < target.num_slots; ++slot) {
    const typename Slice::Granule granule = target.at(slot, threadIdx.x);
    float weights[Slice::kVecSize];
    residuals(granule, slot, threadIdx.x, weights);
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) {
      mine.residual += weights[i];
      mine.target += to_float(granule[i]);
    }
  }
  allow_next_kernel();

  cluster_await<kClusterSize>();
  smem.warps.exchange({warp_reduce(mine.residual, Sum{}), warp_reduce(mine.target, Sum{})}, smem.mailbox);
  SpeculativeWeights total{0.f, 0.f};
  smem.warps.for_lane([&](const SpeculativeWeights& warp) {
    total.residual += warp.residual;
    total.target += warp.target;
  });
  total = {warp_reduce(total.residual, Sum{}), warp_reduce(total.target, Sum{})};
  const bool uses_residual = total.residual > 0.f;
  const float weight = uses_residual ? total.residual : total.target;

  // The first block writes everything but the drawn token.
  int32_t* output_ids = params.output_ids + int64_t(row) * (params.num_draft + 1);
  const bool is_valid = weight > 0.f && weight < kInfinity;
  if (cluster_rank<kClusterSize>() == 0) {
    for (int i = threadIdx.x; i <= params.num_draft; i += Config::kNumThreads) {
      if (i < step) {
        output_ids[i] = load_index(params.draft_ids, params.draft_ids_are_int64, int64_t(row) * params.num_draft + i);
      }
      if (i > step) output_ids[i] = -1;
      if (i == step && !is_valid) output_ids[i] = 0;
    }
    if (threadIdx.x == 0) {
      params.num_accepted[row] = (params.adds_accepted ? params.num_accepted[row] : 0) + accepted.num_accepted;
      params.num_emitted[row] = (params.adds_emitted ? params.num_emitted[row] : 0) + accepted.num_emitted;
    }
  }
  if (!is_valid) return;

  draw_from_warps<Config>(
      target, random, smem.warps,
      [&](const SpeculativeWeights& warp) { return uses_residual ? warp.residual : warp.target; },
      uses_residual ? mine.residual : mine.target,
      [&](int slot, int thread_idx, float* weights) {
        const typename Slice::Granule granule = target.at(slot, thread_idx);
        if (uses_residual) return residuals(granule, slot, thread_idx, weights);
#pragma unroll
        for (int i = 0; i < Slice::kVecSize; ++i) weights[i] = to_float(granule[i]);
      },
      [&](int slot, int thread_idx, int lane) { output_ids[step] = target.token_id(slot, thread_idx, lane); });
}

}  // namespace flashinfer
