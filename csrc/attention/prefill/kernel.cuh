// SPDX-License-Identifier: Apache-2.0
// Attention of many query rows per request over single, ragged or paged KV: prefill, chunked prefill, append,
// speculative verification. For a query token i of a request and a query head h, with g = h / group_size:
//
//   s_j = log2(e) * logit(q[i, h], k[j, g])       logit: score.cuh; j: the request's keys that i sees (visibility.cuh)
//   lse[i, h] = log2(sum_j 2^s_j)
//   out[i, h] = v_scale * sum_j 2^(s_j - lse[i, h]) v[j, g]       no key: out = 0, lse = -inf
//
//   q [num_tokens, num_qo_heads, head_dim_qk], k [keys, num_kv_heads, head_dim_qk], v [keys, num_kv_heads, head_dim_vo]
//   -> out [num_tokens, num_qo_heads, head_dim_vo], lse [num_tokens, num_qo_heads] in fp32, if wanted
//
// FlashAttention-2 (Dao, 2023) on mma.sync and cp.async, for every GPU from sm_80 up.
//
// A persistent grid takes (item, KV head) pairs from the planner's list, the longest first. One pair: copy the query
// rows once, then walk the KV tiles from the end to the beginning with the next tiles in flight; per tile S = Q Kᵀ,
// online softmax, O += P V, all in registers. Items that the planner split along the KV leave their normalized output
// and LSE in the workspace, and the blocks that finish last merge them.
//
//   prefill/queue.cuh    which unit of work a block does next
//   prefill/tile.cuh     geometry, shared memory, Q Kᵀ and P V
//   prefill/load.cuh     how rows come in
//   prefill/softmax.cuh  what happens to the scores in between
//   prefill/output.cuh   the end of a unit: normalize, store, merge
//
// Registers decide. The loop over tiles uses all 255 that a thread can have, and what it holds beyond scores and output
// costs loads in flight. Hence the units of work in shared memory, and addresses that start from fresh_thread_idx().
#pragma once

#include "attention/prefill/load.cuh"
#include "attention/prefill/output.cuh"
#include "attention/prefill/queue.cuh"
#include "attention/prefill/softmax.cuh"
#include "attention/prefill/tile.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// Sends for the query rows and the last KV tiles of the unit.
template <class Config>
__device__ __forceinline__ void load_first_tiles_async(const PrefillParams& params, PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  constexpr int kNumAhead = Shape::kNumAhead;
  const PrefillWork& work = smem.work;
  const KvTileLoader<Config> loader{params, work, smem};
  const int last_tile = work.item.tile_end - 1;
  int32_t pages[kNumAhead + 1];
#pragma unroll
  for (int i = 0; i <= kNumAhead; ++i) pages[i] = loader.look_up(last_tile - i);
  load_q_async<Config>(params, work, smem);
  const int warp_idx = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    smem.warp_tiles[warp_idx] = WarpTiles<Config>::of(params, work, warp_idx * Shape::kRowsPerWarp);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kNumAhead; ++i) {
    loader.publish(last_tile - i, pages[i]);
    if constexpr (KvTileLoader<Config>::kIsPaged) __syncthreads();
    if (last_tile - i >= work.item.tile_begin) {
      loader.template load_async<true, !Shape::kTakesTurns>(last_tile - i, loader.num_valid(last_tile - i));
    }
    cp_async_commit();
  }
  loader.publish(last_tile - kNumAhead, pages[kNumAhead]);
}

// One query tile of one KV head against its run of KV tiles: leaves the warp's rows of the output, yet to be
// normalized. A warp without rows only helps to bring in the tiles: from a loop of its own, which meets the others at
// the same barriers, since these count warps wherever they come from.
template <class Config, bool kHasRows, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void attend(const PrefillParams& params, PrefillSmem<Config>& smem,
                                       float (&out)[Shape::kFragsM][Shape::kFragsD][4], SoftmaxState<Config>& state) {
  const PrefillWork& work = smem.work;
  constexpr int kNumAhead = Shape::kNumAhead;
  const int warp_idx = int(fresh_thread_idx()) / 32, warp_row = warp_idx * Shape::kRowsPerWarp;
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const WarpTiles<Config>& tiles = smem.warp_tiles[warp_idx];
  const auto visibility = visibility_of<Config>(params, work.item.request_idx);
  const float scale_log2 = Score<Config>::scale_log2(params);
  const KvTileLoader<Config> loader{params, work, smem};

  const auto turn_to_values = [&](int tile) {
    if constexpr (Shape::kTakesTurns) {
      cp_async_wait<0>();
      __syncthreads();  // the values are there for all, and all have left the keys
      if (tile > work.item.tile_begin) loader.template load_async<true, false>(tile - 1, Shape::kBlockN);
      cp_async_commit();
    }
  };

  // From the last tile to the first. A group is committed for every load, made or not, so that "all but the latest
  // kNumAhead - 1" always means the tile at hand, or, where they take turns, its keys.
#pragma unroll 1
  for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile) {
    cp_async_wait<kNumAhead - 1>();
    __syncthreads();  // the tile is there for all, and all have left the one before, whose stage is filled next
    if constexpr (Shape::kTakesTurns) {
      loader.template load_async<false, true>(tile, loader.num_valid(tile));
    } else if (tile - kNumAhead >= work.item.tile_begin) {
      loader.template load_async<true, true>(tile - kNumAhead, Shape::kBlockN);
    }
    cp_async_commit();

    if (kHasRows && tile == work.item.tile_end - 1) prepare_q<Config>(params, work, smem.q, warp_row);
    const uint8_t* k_smem = prepare_k<Config>(params, smem, tile);
    int32_t next_page;
    Seen seen = kSeesNone;
    if (kHasRows)
      seen = visibility.template sees_tile<false>(tiles, smem.gap.key_tile(tile) * Shape::kBlockN, Shape::kBlockN);
    const bool is_seen = visibility.contains(tiles.seen, smem.gap.key_tile(tile)) && seen != kSeesNone;
    // Where they take turns, a tile that the warp does not see is masked: a way around it costs all tiles more.
    if (kHasRows && (Shape::kTakesTurns || is_seen)) {
      float scores[Shape::kFragsM][Shape::kFragsN][4];
      compute_scores<Config>(scores, smem_address(warp_rows_smem), smem_address(k_smem));
      turn_to_values(tile);
      next_page = loader.look_up(tile - kNumAhead - 1);  // not sooner: the products above need every register
      const bool needs_mask = seen != kSeesAll || !visibility.contains(tiles.whole, smem.gap.key_tile(tile));
      if (needs_mask || !Score<Config>::kIsPlain) {
        transform_and_mask<Config>(scores, params, work, warp_row, smem.gap.key_tile(tile), needs_mask);
      }
      state.raise_max(scores, out, scale_log2);
      softmax_times_v<Config>(scores, state, out, smem_address(smem.v[stage_of<Config>(tile)]), scale_log2);
    } else {
      turn_to_values(tile);
      next_page = loader.look_up(tile - kNumAhead - 1);
    }
    loader.publish(tile - kNumAhead - 1, next_page);
  }
}

// Config: Q, Kv, Out, kHeadDimQk, kHeadDimVo, kKvStorage, kMask, kHasWindow, kHasSoftCap, kHasSinks, kPosEncoding,
// kHasDeviceScales, and the tile: kBlockM, kBlockN, kNumStages, kNumThreads, kSmemBytes. Grid: as many blocks as the
// planner was told; without a plan, one per (query tile, KV head).
template <class Config>
__device__ void prefill(const PrefillParams& params) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  static_assert(sizeof(PrefillSmem<Config>) <= Config::kSmemBytes);
  PrefillSmem<Config>& smem = *reinterpret_cast<PrefillSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();

  using Shape = PrefillShape<Config>;
  const WorkQueue<Config> queue{params, smem};
  if (fresh_thread_idx() == 0) queue.open();
  while (true) {
    if (fresh_thread_idx() == 0) queue.take_next();
    __syncthreads();
    if (smem.unit >= smem.num_units) break;
    const uint32_t next_unit = fresh_thread_idx() == 0 ? queue.claim() : 0;
    load_first_tiles_async<Config>(params, smem);
    if (fresh_thread_idx() == 0) queue.fetch_async(next_unit);

    float out[Shape::kFragsM][Shape::kFragsD][4] = {};
    SoftmaxState<Config> state;
    state.reset();
    if (!Shape::kTakesTurns || smem.warp_tiles[fresh_thread_idx() / 32].seen.end > 0) {
      attend<Config, true>(params, smem, out, state);
    } else {
      attend<Config, false>(params, smem, out, state);
    }
    if (smem.work.item.tile_end <= smem.work.item.tile_begin) {  // the query rows, whose place the output takes
      cp_async_wait<0>();
      __syncthreads();
    }
    finish_softmax<Config>(state, smem, params);
    store_output<Config>(out, state, params, smem.work, smem);
    if (smem.work.item.num_splits > 1) {
      merge_splits<Config, Shape::kNumThreads, 2, 4>(
          params, smem.work, smem.work.group_size, [&](uint32_t* counter, int32_t count) {
            return arrives_last(counter, count, smem.is_last, fresh_thread_idx(), [] { __syncthreads(); });
          });
    }
    __syncthreads();  // all have left the work and the shared memory of this unit
  }
  if (fresh_thread_idx() == 0) queue.close();
}

}  // namespace flashinfer
