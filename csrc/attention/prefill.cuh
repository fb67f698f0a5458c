// Attention of many query rows per request over single, ragged or paged KV: prefill, chunked prefill, append,
// speculative verification. FlashAttention-2 (Dao, 2023) on mma.sync and cp.async, for every GPU from sm_80 up.
//
// A persistent grid takes (item, KV head) pairs from the planner's list, the longest first. One pair: copy the query
// rows once, then walk the KV tiles from the end to the beginning with the next tiles in flight; per tile S = Q Kᵀ,
// online softmax, O += P V, all in registers. Items that the planner split along the KV leave their normalized output
// and LSE in the workspace, and the CTA that finishes last merges them.
//
// The running maximum that scales the probabilities may lag behind the true one by kMaxLag powers of two, so that most
// tiles need not rescale the output: probabilities then reach 2^kMaxLag, which 16 bits and the fp32 sums hold as well
// as 1.
#pragma once

#include "attention/prefill_tile.cuh"

namespace flashinfer {

constexpr float kMaxLag = 8.f;

template <class Config>
struct SoftmaxState {
  using Shape = PrefillShape<Config>;
  float max[Shape::kFragsM][2];  // of the transformed, unscaled scores; lags behind
  float sum[Shape::kFragsM][2];  // this lane's share until the end

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
      max[m][0] = max[m][1] = kMinusInfinity;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Raise the maximum to cover `scores`, rescaling the sums and the output where it moved by more than the lag allowed.
  __device__ __forceinline__ void raise_max(const float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                            float (&out)[Shape::kFragsM][Shape::kFragsD][4], float scale_log2) {
    float tile_max[Shape::kFragsM][2];
    bool lags = false;
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < Shape::kFragsN; ++n) {
          x = fmaxf(x, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        tile_max[m][half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
        lags = lags || (tile_max[m][half] - max[m][half]) * scale_log2 > kMaxLag;
      }
    }
    if (!__any_sync(0xffffffffu, lags)) return;
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float new_max = fmaxf(max[m][half], tile_max[m][half]);
        const float rescale = new_max == kMinusInfinity ? 1.f : fast_exp2((max[m][half] - new_max) * scale_log2);
        max[m][half] = new_max;
        sum[m][half] *= rescale;
#pragma unroll
        for (int d = 0; d < Shape::kFragsD; ++d) {
          out[m][d][2 * half] *= rescale;
          out[m][d][2 * half + 1] *= rescale;
        }
      }
    }
  }
};

// 32 bits of a custom mask from bit first_bit on; bytes from num_bits / 8 on are not read.
__device__ __forceinline__ uint32_t load_mask_bits(const uint8_t* mask_gmem, int64_t first_bit, int64_t num_bits) {
  const int64_t first_byte = first_bit >> 3, end_byte = (num_bits + 7) >> 3;
  uint64_t bits = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (first_byte + i < end_byte) bits |= uint64_t(mask_gmem[first_byte + i]) << (8 * i);
  }
  return uint32_t(bits >> (first_bit & 7));
}

// Soft cap and ALiBi on every score; then -inf where a query does not see a key.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void transform_and_mask(float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                                   const AttentionParams& params, const PrefillWork& work, int warp_row,
                                                   int tile, bool needs_mask) {
  const int lane_idx = int(fresh_thread_idx() % 32);
  const int first_kv = tile * Shape::kBlockN + lane_idx % 4 * 2;  // of this lane; fragment n, element e adds 8n + e
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = QueryRow::of<Shape>(work, warp_row + m * 16 + half * 8 + lane_idx / 4);
      const int32_t position = work.item.kv_len - work.item.qo_len + query.token_idx;
      if constexpr (!Variant<Config>::kIsPlain) {
        const float slope = Variant<Config>::alibi_slope(params, query.qo_head_idx);
#pragma unroll
        for (int i = 0; i < 2 * Shape::kFragsN; ++i) {
          float& score = scores[m][i / 2][2 * half + i % 2];
          score = Variant<Config>::transform(params, score, slope, first_kv + i / 2 * 8 + i % 2 - position);
        }
      }
      if (!needs_mask) continue;
      int32_t kv_begin = 0, kv_end = work.item.kv_len;
      if constexpr (Config::kMask == kMaskCausal) kv_end = min(kv_end, position + 1);
      if constexpr (Config::kHasWindow) kv_begin = max(position - params.window_left, 0);
      const bool row_exists = query.token_idx < work.item.qo_len;
#pragma unroll
      for (int word = 0; word < Shape::kBlockN / 32; ++word) {
        uint32_t bits = 0xffffffffu;
        if constexpr (Config::kMask == kMaskCustom) {
          const uint8_t* mask_gmem = Variant<Config>::mask_of(params, work.item.request_idx);
          const int64_t first_bit = int64_t(query.token_idx) * work.item.kv_len + tile * Shape::kBlockN + word * 32;
          bits = row_exists ? load_mask_bits(mask_gmem, first_bit, int64_t(work.item.qo_len) * work.item.kv_len) : 0u;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // 4 fragments of 8 keys to a word of 32
          const int offset = i / 2 * 8 + i % 2, kv_idx = first_kv + word * 32 + offset;
          bool visible = kv_idx < kv_end;
          if constexpr (Config::kHasWindow) visible = visible && kv_idx >= kv_begin;
          if constexpr (Config::kMask == kMaskCustom) visible = visible && (bits >> (offset + lane_idx % 4 * 2)) & 1;
          float& score = scores[m][word * 4 + i / 2][2 * half + i % 2];
          score = visible ? score : kMinusInfinity;
        }
      }
    }
  }
}

// P = exp2(scores - max), 16 keys at a time so that the exponentials of one step overlap with the products of the last.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void softmax_times_v(const float (&scores)[Shape::kFragsM][Shape::kFragsN][4],
                                                SoftmaxState<Config>& state,
                                                float (&out)[Shape::kFragsM][Shape::kFragsD][4], uint32_t v_smem,
                                                float scale_log2) {
  const int lane_idx = int(fresh_thread_idx() % 32);
  float scaled_max[Shape::kFragsM][2];
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a row that has seen no key yet: exp2(-inf - 0) is zero, not NaN
      scaled_max[m][half] = state.max[m][half] == kMinusInfinity ? 0.f : state.max[m][half] * scale_log2;
    }
  }
#pragma unroll
  for (int step = 0; step < Shape::kBlockN / 16; ++step) {
    uint32_t p[Shape::kFragsM][4];
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // register i of the A fragment: fragment i / 2 of the step, rows of half i % 2
        const float* pair = &scores[m][2 * step + i / 2][2 * (i % 2)];
        const float x = fast_exp2(fmaf(pair[0], scale_log2, -scaled_max[m][i % 2]));
        const float y = fast_exp2(fmaf(pair[1], scale_log2, -scaled_max[m][i % 2]));
        state.sum[m][i % 2] += x + y;
        p[m][i] = pack_16bit<typename Config::Q>(x, y);
      }
    }
    accumulate_output<Config>(out, p, v_smem, step, lane_idx);
  }
}

// Reduce the lanes' shares of the sums. They become the factors that normalize the output; the LSE go to shared memory,
// from where one lane a row stores them.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void finish_softmax(SoftmaxState<Config>& state, float* warp_lse_smem, float v_scale,
                                               float scale_log2) {
  const int lane_idx = int(fresh_thread_idx() % 32);
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float lse = state.max[m][half] * scale_log2 + fast_log2(sum);  // a row that saw no key: -inf - inf
      state.sum[m][half] = sum > 0.f ? __fdividef(v_scale, sum) : 0.f;
      if (lane_idx % 4 == 0) warp_lse_smem[m * 16 + half * 8 + lane_idx / 4] = lse;
    }
  }
  __syncwarp();
}

// visit(row in warp, column, x, y) for every pair of neighbouring output columns of this lane, normalized.
template <class Config, class Visit, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void for_each_output_pair(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                                     const SoftmaxState<Config>& state, const Visit& visit) {
  const int lane_idx = int(fresh_thread_idx() % 32);
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = state.sum[m][half];
#pragma unroll
      for (int pair = 0; pair < Shape::kFragsD; ++pair) {
        const auto at = OutputPair<Shape>::of(pair / 2, pair % 2, lane_idx % 4);
        visit(m * 16 + half * 8 + lane_idx / 4, at.column, out[m][at.frag_idx[0]][2 * half + at.element[0]] * factor,
              out[m][at.frag_idx[1]][2 * half + at.element[1]] * factor);
      }
    }
  }
}

// Write the warp's rows where they belong: out and lse, by way of shared memory, or this chunk's partial results.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void store_output(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                             const SoftmaxState<Config>& state, const AttentionParams& params,
                                             const PrefillWork& work, PrefillSmem<Config>& smem) {
  using T = typename Config::Q;
  using OutRows = typename Shape::OutRows;
  const uint32_t thread_idx = fresh_thread_idx();
  const int lane_idx = int(thread_idx % 32), warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
  const int num_rows = min(work.num_rows(Shape::kBlockM) - warp_row, Shape::kRowsPerWarp);  // of the warp
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const float* warp_lse_smem = smem.lse + warp_row;
  if (work.item.num_chunks > 1) {
    const int64_t first_row = work.partial_row(work.item.chunk_idx, Shape::kBlockM, params.num_kv_heads) + warp_row;
    for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
      if (row >= num_rows) return;
      *reinterpret_cast<float2*>(params.partial_out + (first_row + row) * Shape::kHeadDimVo + column) = float2{x, y};
    });
    if (lane_idx < num_rows) params.partial_lse[first_row + lane_idx] = warp_lse_smem[lane_idx];
    return;
  }
  for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
    *reinterpret_cast<uint32_t*>(warp_rows_smem + OutRows::offset(row, column / 8) + column % 8 * 2) =
        pack_16bit<T>(x, y);
  });
  __syncwarp();
  T* out_gmem = static_cast<T*>(params.out);
#pragma unroll 4
  for (int i = lane_idx; i < num_rows * OutRows::kNumChunks; i += 32) {
    const int row = i / OutRows::kNumChunks, chunk = i % OutRows::kNumChunks;
    const QueryRow query = QueryRow::of<Shape>(work, warp_row + row);
    T* dst_gmem = out_gmem + (work.item.q_begin + query.token_idx) * params.out_token_stride +
                  query.qo_head_idx * params.out_head_stride + chunk * 8;
    *reinterpret_cast<uint4*>(dst_gmem) = *reinterpret_cast<const uint4*>(warp_rows_smem + OutRows::offset(row, chunk));
  }
  if (params.lse != nullptr && lane_idx < num_rows) {
    const QueryRow query = QueryRow::of<Shape>(work, warp_row + lane_idx);
    const int64_t token_idx = work.item.q_begin + query.token_idx;
    params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = warp_lse_smem[lane_idx];
  }
}

// The chunk that arrives last merges all of the query tile, in the order of the chunks whoever that is.
template <class Config>
__device__ __forceinline__ void merge_chunks_if_last(const AttentionParams& params, const PrefillWork& work,
                                                     PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  using T = typename Config::Q;
  const PrefillItem& item = work.item;
  if (item.num_chunks <= 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = params.counters + int64_t(item.counter) * params.num_kv_heads + work.kv_head_idx;
    const bool is_last = atomicAdd(counter, 1u) == uint32_t(item.num_chunks - 1);
    if (is_last) *counter = 0;
    smem.is_last_chunk = is_last;
  }
  __syncthreads();
  if (!smem.is_last_chunk) return;
  __threadfence();

  constexpr int kVecsPerRow = Shape::kHeadDimVo / 4;
  const int num_rows = work.num_rows(Shape::kBlockM);
  const int64_t first_row = work.partial_row(0, Shape::kBlockM, params.num_kv_heads);
  const int64_t chunk_stride = int64_t(num_rows) * params.num_kv_heads;
  T* out_gmem = static_cast<T*>(params.out);
#pragma unroll 1
  for (int i = int(fresh_thread_idx()); i < num_rows * kVecsPerRow; i += Shape::kNumThreads) {
    const int row = i / kVecsPerRow, column = i % kVecsPerRow * 4;
    RunningState<4> state;
#pragma unroll 4
    for (int chunk = 0; chunk < item.num_chunks; ++chunk) {
      const int64_t partial_row = first_row + chunk * chunk_stride + row;
      const float4 x =
          __ldcg(reinterpret_cast<const float4*>(params.partial_out + partial_row * Shape::kHeadDimVo + column));
      const float partial[4] = {x.x, x.y, x.z, x.w};
      state.merge(partial, __ldcg(params.partial_lse + partial_row));
    }
    state.normalize();
    const QueryRow query = QueryRow::of<Shape>(work, row);
    const int64_t token_idx = item.q_begin + query.token_idx;
    cast_vec<T>(state.out).store(out_gmem + token_idx * params.out_token_stride +
                                 query.qo_head_idx * params.out_head_stride + column);
    if (column == 0 && params.lse != nullptr) {
      params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = state.lse();
    }
  }
}

// One query tile of one KV head against its run of KV tiles.
template <class Config>
__device__ __forceinline__ void attend(const AttentionParams& params, PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  const PrefillWork& work = smem.work;
  constexpr int kNumAhead = Config::kNumStages - 1;  // tiles in flight while one is worked on
  const int warp_idx = threadIdx.x / 32, warp_row = warp_idx * Shape::kRowsPerWarp;
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const WarpTiles<Config>& tiles = smem.warp_tiles[warp_idx];
  const float scale_log2 = Variant<Config>::scale_log2(params);
  const KvTileLoader<Config> loader{params, work, smem};

  float out[Shape::kFragsM][Shape::kFragsD][4] = {};
  SoftmaxState<Config> state;
  state.reset();

  // From the last tile to the first. A group is committed for every tile, loaded or not, so that "all but the latest
  // kNumStages - 2" always means the tile at hand.
  const int last_tile = work.item.tile_end - 1;
  if (last_tile >= work.item.tile_begin) {
    load_q_async<Config>(params, work, smem);
    if (threadIdx.x % 32 == 0) smem.warp_tiles[warp_idx] = WarpTiles<Config>::of(params, work, warp_row);
#pragma unroll
    for (int i = 0; i < kNumAhead; ++i) {
      if constexpr (KvTileLoader<Config>::kIsPaged) {
        loader.publish(last_tile - i, loader.look_up(last_tile - i));
        __syncthreads();
      }
      if (last_tile - i >= work.item.tile_begin) loader.load_async(last_tile - i);
      cp_async_commit();
    }
    loader.publish(last_tile - kNumAhead, loader.look_up(last_tile - kNumAhead));
  }
#pragma unroll 1
  for (int tile = last_tile; tile >= work.item.tile_begin; --tile) {
    cp_async_wait<kNumAhead - 1>();
    __syncthreads();  // the tile is there for all, and all have left the one before, whose stage is filled next
    if (tile - kNumAhead >= work.item.tile_begin) {
      loader.load_async(tile - kNumAhead);
    }
    cp_async_commit();
    const int32_t next_page = loader.look_up(tile - kNumAhead - 1);

    if (tile == work.item.tile_end - 1) prepare_q<Config>(params, work, smem.q, warp_row);
    const uint8_t* k_smem = smem.k[stage_of<Config>(tile)];
    if constexpr (Shape::kHasRope) {
      const int first_kv = tile * Shape::kBlockN;
      rotate_rows<Config, typename Config::Kv, typename Shape::KRows>(params, k_smem, smem.k_rotated, Shape::kBlockN,
                                                                      threadIdx.x, Shape::kNumThreads,
                                                                      [&](int row) { return first_kv + row; });
      k_smem = smem.k_rotated;
      __syncthreads();
    }
    if (tiles.sees(tile)) {
      float scores[Shape::kFragsM][Shape::kFragsN][4];
      compute_scores<Config>(scores, smem_address(warp_rows_smem), smem_address(k_smem));
      const bool needs_mask = !tiles.sees_whole(tile);
      if (needs_mask || !Variant<Config>::kIsPlain) {
        transform_and_mask<Config>(scores, params, work, warp_row, tile, needs_mask);
      }
      state.raise_max(scores, out, scale_log2);
      softmax_times_v<Config>(scores, state, out, smem_address(smem.v[stage_of<Config>(tile)]), scale_log2);
    }
    loader.publish(tile - kNumAhead - 1, next_page);
  }
  finish_softmax<Config>(state, smem.lse + warp_row, params.v_scale, scale_log2);
  store_output<Config>(out, state, params, work, smem);
  merge_chunks_if_last<Config>(params, work, smem);
}

// The unit-th piece of work, by one thread: from the planner's list, or for a single sequence from the shapes.
template <class Config>
__device__ __forceinline__ PrefillWork fetch_work(const AttentionParams& params, uint32_t unit) {
  using Shape = PrefillShape<Config>;
  const int32_t item_idx = unit / params.num_kv_heads, kv_head_idx = unit - item_idx * params.num_kv_heads;
  const int32_t group_size = params.num_qo_heads / params.num_kv_heads;
  using Kv = typename Config::Kv;
  const Kv* k_gmem = static_cast<const Kv*>(params.kv.k) + kv_head_idx * params.kv.k_head_stride;
  const Kv* v_gmem = static_cast<const Kv*>(params.kv.v) + kv_head_idx * params.kv.v_head_stride;
  if (params.chunks != nullptr) {
    return {static_cast<const PrefillItem*>(params.chunks)[item_idx], k_gmem, v_gmem, kv_head_idx, group_size};
  }
  const int32_t num_q_tiles = gridDim.x / params.num_kv_heads, q_tile = num_q_tiles - 1 - item_idx;
  const TileRange tiles =
      TileRange::of(q_tile, group_size, params.qo_len, params.kv.len, Shape::kBlockM, Shape::kBlockN,
                    Config::kMask == kMaskCausal, Config::kHasWindow ? params.window_left : -1);
  PrefillItem item = {};
  item.q_tile = q_tile;
  item.qo_len = params.qo_len;
  item.kv_len = params.kv.len;
  item.tile_begin = tiles.begin;
  item.tile_end = tiles.end;
  item.num_chunks = 1;
  return {item, k_gmem, v_gmem, kv_head_idx, group_size};
}

// Config: Q (of q and out), Kv, kHeadDimQk, kHeadDimVo, kKvStorage, kMask, kHasWindow, kHasSoftCap, kPosEncoding, and
// the tile: kBlockM, kBlockN, kNumStages, kNumThreads, kSmemBytes. Grid: as many CTAs as the planner was told; without
// a plan, one per (query tile, KV head).
template <class Config>
__device__ void prefill(const AttentionParams& params) {
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  static_assert(sizeof(PrefillSmem<Config>) <= Config::kSmemBytes);
  PrefillSmem<Config>& smem = *reinterpret_cast<PrefillSmem<Config>*>(smem_bytes);
  wait_for_previous_kernel();

  PrefillSchedule* schedule = static_cast<PrefillSchedule*>(const_cast<void*>(params.requests));
  const bool is_planned = params.chunks != nullptr;
  if (threadIdx.x == 0) {
    smem.num_units = is_planned ? schedule->num_items * params.num_kv_heads : gridDim.x;
    smem.unit = blockIdx.x;
  }
  while (true) {
    if (threadIdx.x == 0 && smem.unit < smem.num_units) smem.work = fetch_work<Config>(params, smem.unit);
    __syncthreads();
    if (smem.unit >= smem.num_units) break;
    attend<Config>(params, smem);
    __syncthreads();  // all have left the work and the shared memory of this unit
    if (threadIdx.x == 0) smem.unit = is_planned ? gridDim.x + atomicAdd(&schedule->next_unit, 1u) : smem.num_units;
  }
  if (is_planned && threadIdx.x == 0 && atomicAdd(&schedule->num_done, 1u) == gridDim.x - 1) {
    schedule->next_unit = 0;
    schedule->num_done = 0;
  }
}

}  // namespace flashinfer
