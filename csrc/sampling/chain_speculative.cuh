// Chain speculative sampling (Leviathan, Kalman & Matias 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
//
// Draft token x at step i passes if u < target(x) / draft(x). The tokens before the first that fails are emitted, then
// one more: from max(target - draft, 0), renormalized, at the step that failed, or from the target's last step if none
// did. So every emitted token follows the target's distribution.
#pragma once

#include "device/pdl.cuh"
#include "sampling/draw.cuh"

namespace flashinfer {

template <class Config>
struct SpeculativeSmem {
  typename RowSlice<Config>::Smem target, draft;
  Stats blocks[Config::kClusterSize];
  float scratch[2][Config::kNumThreads / kWarpSize];
  typename Draw<Config>::Smem draw;
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
      const int token_id = params.draft_ids[int64_t(row) * params.num_draft + step];
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

  cluster_announce<kClusterSize>();
  wait_for_previous_kernel();
  const int row = blockIdx.x / kClusterSize, lane_idx = threadIdx.x % kWarpSize;
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

  Stats mine{0.f, 0.f};  // max: the weight of the target itself, for the row whose residual vanishes
#pragma unroll 4
  for (int slot = 0; slot < target.num_slots; ++slot) {
    const typename Slice::Granule granule = target.at(slot, threadIdx.x);
    float weights[Slice::kVecSize];
    residuals(granule, slot, threadIdx.x, weights);
#pragma unroll
    for (int i = 0; i < Slice::kVecSize; ++i) {
      mine.sum += weights[i];
      mine.max += to_float(granule[i]);
    }
  }
  allow_next_kernel();

  const Stats block{block_reduce<Config::kNumThreads>(mine.max, Sum{}, smem.scratch[0]),
                    block_reduce<Config::kNumThreads>(mine.sum, Sum{}, smem.scratch[1])};
  cluster_await<kClusterSize>();
  if (threadIdx.x < kClusterSize) {
    *shared_at_rank<kClusterSize>(&smem.blocks[cluster_rank<kClusterSize>()], threadIdx.x) = block;
  }
  cluster_sync<kClusterSize>();
  const Stats others = lane_idx < kClusterSize ? smem.blocks[lane_idx] : Stats{0.f, 0.f};
  const bool uses_residual = warp_reduce(others.sum, Sum{}) > 0.f;
  const float total = warp_reduce(uses_residual ? others.sum : others.max, Sum{});

  // The first block writes everything but the drawn token.
  int32_t* output_ids = params.output_ids + int64_t(row) * (params.num_draft + 1);
  const bool is_valid = total > 0.f && total < kInfinity;
  if (cluster_rank<kClusterSize>() == 0) {
    for (int i = threadIdx.x; i <= params.num_draft; i += Config::kNumThreads) {
      if (i < step) output_ids[i] = params.draft_ids[int64_t(row) * params.num_draft + i];
      if (i > step) output_ids[i] = -1;
      if (i == step && !is_valid) output_ids[i] = 0;
    }
    if (threadIdx.x == 0) {
      params.num_accepted[row] += accepted.num_accepted;
      params.num_emitted[row] += accepted.num_emitted;
    }
  }
  if (!is_valid) return;

  const RandomWords words = random.words(0);
  if constexpr (kClusterSize > 1) {
    const float block_weight = uses_residual ? others.sum : others.max;
    if (pick_lane(block_weight, words.uniform(0)) != cluster_rank<kClusterSize>()) return;
  }
  const float thread_weight = uses_residual ? mine.sum : mine.max;
  Draw<Config>::block_weight(thread_weight, smem.draw);
  Draw<Config>::pick_in_block(
      target, thread_weight, random, words, smem.draw,
      [&](int slot, int thread_idx, float* weights) {
        const typename Slice::Granule granule = target.at(slot, thread_idx);
        if (uses_residual) {
          residuals(granule, slot, thread_idx, weights);
        } else {
#pragma unroll
          for (int i = 0; i < Slice::kVecSize; ++i) weights[i] = to_float(granule[i]);
        }
      },
      [&](int token_id) { output_ids[step] = token_id; });
}

}  // namespace flashinfer
