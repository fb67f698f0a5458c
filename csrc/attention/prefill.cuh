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
  using VRows = typename Shape::VRows;
  const int lane_idx = int(fresh_thread_idx() % 32);
  const uint32_t v_lane_smem = v_smem + VRows::offset(lane_idx % 16, lane_idx / 16);
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
    accumulate_output<Config>(out, p, v_lane_smem + step * 16 * VRows::kNumBytes);
  }
}

// Reduce the lanes' shares of the sums. They become the factors that normalize the output; the LSE go to shared memory,
// from where one lane a row stores them.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void finish_softmax(SoftmaxState<Config>& state, PrefillSmem<Config>& smem, float v_scale,
                                               float scale_log2) {
  const uint32_t thread_idx = fresh_thread_idx();
  const int lane_idx = int(thread_idx % 32);
  float* warp_lse_smem = smem.lse + thread_idx / 32 * Shape::kRowsPerWarp;
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

// visit(row, column, x, y) for every pair of neighbouring output columns of this lane, normalized. Row and column are
// constants, to be added to the lane's own: lane_idx / 4 in the warp, and OutputPair::lane_column.
template <class Config, class Visit, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void for_each_output_pair(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                                     const SoftmaxState<Config>& state, const Visit& visit) {
#pragma unroll
  for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = state.sum[m][half];
#pragma unroll
      for (int pair = 0; pair < Shape::kFragsD; ++pair) {
        const auto at = OutputPair<Shape>::of(pair / 2, pair % 2);
        visit(m * 16 + half * 8, at.column, out[m][at.frag_idx[0]][2 * half + at.element[0]] * factor,
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
  const int lane_row = lane_idx / 4, lane_column = OutputPair<Shape>::lane_column(lane_idx % 4);
  if (work.item.num_chunks > 1) {
    const int64_t first_row = work.partial_row(work.item.chunk_idx, Shape::kBlockM, params.num_kv_heads) + warp_row;
    float* lane_gmem = params.partial_out + (first_row + lane_row) * Shape::kHeadDimVo + lane_column;
    for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
      if (lane_row + row >= num_rows) return;
      *reinterpret_cast<float2*>(lane_gmem + row * Shape::kHeadDimVo + column) = float2{x, y};
    });
    if (lane_idx < num_rows) params.partial_lse[first_row + lane_idx] = warp_lse_smem[lane_idx];
    return;
  }
  const uint32_t lane_offset = OutRows::offset(lane_row, lane_column / 8) + lane_column % 8 * 2;
  for_each_output_pair<Config>(out, state, [&](int row, int column, float x, float y) {
    const uint32_t offset = OutRows::advance(lane_offset, column / 8) + row * OutRows::kNumBytes + column % 8 * 2;
    *reinterpret_cast<uint32_t*>(warp_rows_smem + offset) = pack_16bit<T>(x, y);
  });
  __syncwarp();
  using Copy = RowCopy<OutRows, Shape::kRowsPerWarp, 32>;
  const Copy copy = Copy::of_thread();
  const auto rows = WarpRows<Shape>::of(work, warp_row, params.out_token_stride, params.out_head_stride);
  constexpr int kChunksPerPass = OutRows::kNumChunks / Copy::kLanesPerRow;
  constexpr int kMaxBatch = 8 / kChunksPerPass;
  constexpr int kBatch = Copy::kNumPasses < kMaxBatch ? Copy::kNumPasses : kMaxBatch;  // passes
  static_assert(Copy::kNumPasses % kBatch == 0);
#pragma unroll
  for (int first = 0; first < Copy::kNumPasses; first += kBatch) {
    uint4 vecs[kBatch][kChunksPerPass];
    int64_t offsets[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = copy.row + (first + i) * Copy::kRowsPerPass;
      offsets[i] = rows.offset(row);
#pragma unroll
      for (int c = 0; c < kChunksPerPass; ++c) {
        const int chunk = copy.lane + c * Copy::kLanesPerRow;
        vecs[i][c] = load_shared_16(smem_address(warp_rows_smem) + OutRows::offset(row, chunk));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (copy.row + (first + i) * Copy::kRowsPerPass >= num_rows) continue;
      T* row_gmem = static_cast<T*>(params.out) + offsets[i] + copy.lane * 8;
#pragma unroll
      for (int c = 0; c < kChunksPerPass; ++c) {
        *reinterpret_cast<uint4*>(row_gmem + c * Copy::kLanesPerRow * 8) = vecs[i][c];
      }
    }
  }
  if (params.lse != nullptr && lane_idx < num_rows) {
    const QueryRow query = QueryRow::of<Shape>(work, warp_row + lane_idx);
    const int64_t token_idx = work.item.q_begin + query.token_idx;
    params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = warp_lse_smem[lane_idx];
  }
}

// Whether this CTA is the last of `count` to come to the counter. It then sees what all of them wrote before.
template <class Config>
__device__ __forceinline__ bool is_last_of(int32_t count, uint32_t* counter, PrefillSmem<Config>& smem) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    smem.is_last = atomicAdd(counter, 1u) == uint32_t(count - 1);
    if (smem.is_last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return smem.is_last;
}

// Merges slots [first_slot, first_slot + num_slots) of the query tile, in this order whoever does it, and calls
// store(row, column, state) for every four columns of a row.
template <class Config, class Store>
__device__ __forceinline__ void merge_slots(const AttentionParams& params, const PrefillWork& work, int32_t first_slot,
                                            int32_t num_slots, const Store& store) {
  using Shape = PrefillShape<Config>;
  constexpr int kVecsPerRow = Shape::kHeadDimVo / 4;
  constexpr int kNumVecs = 4, kBatch = 4;  // a thread has this many vectors of this many slots in flight
  const int num_vecs = work.num_rows(Shape::kBlockM) * kVecsPerRow;
  const int64_t first_row = work.partial_row(first_slot, Shape::kBlockM, params.num_kv_heads);
  const int64_t slot_stride = int64_t(work.num_rows(Shape::kBlockM)) * params.num_kv_heads;
#pragma unroll 1
  for (int i = int(fresh_thread_idx()); i < num_vecs; i += kNumVecs * Shape::kNumThreads) {
    RunningState<4> states[kNumVecs];
#pragma unroll 1
    for (int first = 0; first < num_slots; first += kBatch) {
      float4 x[kNumVecs][kBatch];
      float lse[kNumVecs][kBatch];
#pragma unroll
      for (int v = 0; v < kNumVecs; ++v) {
        const int vec_idx = min(i + v * Shape::kNumThreads, num_vecs - 1);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int64_t row = first_row + min(first + j, num_slots - 1) * slot_stride + vec_idx / kVecsPerRow;
          x[v][j] =
              __ldcg(reinterpret_cast<const float4*>(params.partial_out) + row * kVecsPerRow + vec_idx % kVecsPerRow);
          lse[v][j] = __ldcg(params.partial_lse + row);
        }
      }
#pragma unroll
      for (int v = 0; v < kNumVecs; ++v) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float partial[4] = {x[v][j].x, x[v][j].y, x[v][j].z, x[v][j].w};
          states[v].merge(partial, first + j < num_slots ? lse[v][j] : kMinusInfinity);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kNumVecs; ++v) {
      const int vec_idx = i + v * Shape::kNumThreads;
      if (vec_idx >= num_vecs) break;
      states[v].normalize();
      store(vec_idx / kVecsPerRow, vec_idx % kVecsPerRow * 4, states[v]);
    }
  }
}

// Merges the chunks of the query tile as far as this CTA is the one to do it (MergeTree).
template <class Config>
__device__ __forceinline__ void merge_chunks(const AttentionParams& params, const PrefillWork& work,
                                             PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  using T = typename Config::Q;
  const PrefillItem& item = work.item;
  if (item.num_chunks <= 1) return;
  const MergeTree tree = MergeTree::of(item.num_chunks);
  const auto counter = [&](int32_t idx) {
    return params.counters + (item.counter + int64_t(idx)) * params.num_kv_heads + work.kv_head_idx;
  };
  int32_t first_slot = 0, num_slots = tree.num_chunks;
  if (tree.num_groups > 0) {
    const int32_t group_idx = item.chunk_idx / tree.group_len, group_len = tree.len_of_group(group_idx);
    if (!is_last_of(group_len, counter(1 + group_idx), smem)) return;
    const int64_t group_row = work.partial_row(tree.num_chunks + group_idx, Shape::kBlockM, params.num_kv_heads);
    merge_slots<Config>(params, work, group_idx * tree.group_len, group_len,
                        [&](int row, int column, const RunningState<4>& state) {
                          const float4 x = {state.out[0], state.out[1], state.out[2], state.out[3]};
                          float* out_row_gmem = params.partial_out + (group_row + row) * Shape::kHeadDimVo;
                          *reinterpret_cast<float4*>(out_row_gmem + column) = x;
                          if (column == 0) params.partial_lse[group_row + row] = state.lse();
                        });
    first_slot = tree.num_chunks;
    num_slots = tree.num_groups;
  }
  if (!is_last_of(num_slots, counter(0), smem)) return;
  merge_slots<Config>(params, work, first_slot, num_slots, [&](int row, int column, const RunningState<4>& state) {
    const QueryRow query = QueryRow::of<Shape>(work, row);
    const int64_t token_idx = item.q_begin + query.token_idx;
    T* out_row_gmem =
        static_cast<T*>(params.out) + token_idx * params.out_token_stride + query.qo_head_idx * params.out_head_stride;
    cast_vec<T>(state.out).store(out_row_gmem + column);
    if (column == 0 && params.lse != nullptr) {
      params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = state.lse();
    }
  });
}

// The units of work, an item for a KV head each, that one CTA takes: the first by its place in the grid, then whatever
// is next on the planner's list. The next one is fetched while the KV of this one are on their way. Without a plan, a
// CTA has one (query tile, KV head) of a single sequence. One thread does all of it.
template <class Config>
struct WorkQueue {
  using Shape = PrefillShape<Config>;
  const AttentionParams& params;
  PrefillSmem<Config>& smem;

  __device__ __forceinline__ PrefillSchedule& schedule() const {
    PrefillSchedule* schedule_gmem;  // found where it is used, like fresh_thread_idx()
    asm volatile("mov.u64 %0, %1;" : "=l"(schedule_gmem) : "l"(params.requests));
    return *schedule_gmem;
  }
  __device__ __forceinline__ bool is_planned() const { return params.chunks != nullptr; }

  __device__ __forceinline__ void open() const {
    smem.num_units = is_planned() ? schedule().num_items * params.num_kv_heads : gridDim.x;
    smem.next_work.group_size = FastDivisor::of(params.num_qo_heads / params.num_kv_heads);
    if (!is_planned()) smem.next_work.item = item_of_single(blockIdx.x / params.num_kv_heads);
    fetch_async(blockIdx.x);
  }

  // Number of the next unit. It takes a trip to memory until it is known.
  __device__ __forceinline__ uint32_t claim() const {
    return is_planned() ? gridDim.x + atomicAdd(&schedule().next_unit, 1u) : smem.num_units;
  }

  __device__ __forceinline__ void fetch_async(uint32_t unit) const {
    using Kv = typename Config::Kv;
    smem.next_unit = unit;
    if (unit >= smem.num_units) return;
    const int32_t item_idx = unit / params.num_kv_heads, kv_head_idx = unit - item_idx * params.num_kv_heads;
    smem.next_work.kv_head_idx = kv_head_idx;
    smem.next_work.k_gmem = static_cast<const Kv*>(params.kv.k) + kv_head_idx * params.kv.k_head_stride;
    smem.next_work.v_gmem = static_cast<const Kv*>(params.kv.v) + kv_head_idx * params.kv.v_head_stride;
    if (!is_planned()) return;
    const PrefillItem* item_gmem = static_cast<const PrefillItem*>(params.chunks) + item_idx;
    static_assert(sizeof(PrefillItem) % 16 == 0);
#pragma unroll
    for (int i = 0; i < int(sizeof(PrefillItem)) / 16; ++i) {
      cp_async_16(smem_address(&smem.next_work.item) + 16 * i, reinterpret_cast<const uint4*>(item_gmem) + i, true);
    }
    cp_async_commit();
  }

  // Makes the unit that was fetched the current one.
  __device__ __forceinline__ void take_next() const {
    cp_async_wait<0>();
    smem.unit = smem.next_unit;
    smem.work = smem.next_work;
  }

  // The query tiles of a single sequence: the last, under a causal mask the longest, first.
  __device__ __forceinline__ PrefillItem item_of_single(int32_t item_idx) const {
    const int32_t q_tile = gridDim.x / params.num_kv_heads - 1 - item_idx;
    const TileRange tiles =
        TileRange::of(q_tile, params.num_qo_heads / params.num_kv_heads, params.qo_len, params.kv.len, Shape::kBlockM,
                      Shape::kBlockN, Config::kMask == kMaskCausal, Config::kHasWindow ? params.window_left : -1);
    PrefillItem item = {};
    item.q_tile = q_tile;
    item.qo_len = params.qo_len;
    item.kv_len = params.kv.len;
    item.tile_begin = tiles.begin;
    item.tile_end = tiles.end;
    item.num_chunks = 1;
    return item;
  }

  // The last CTA to leave resets the list for the next launch.
  __device__ __forceinline__ void close() const {
    if (is_planned() && atomicAdd(&schedule().num_done, 1u) == gridDim.x - 1) {
      schedule().next_unit = 0;
      schedule().num_done = 0;
    }
  }
};

// Sends for the query rows and the last KV tiles of the unit.
template <class Config>
__device__ __forceinline__ void load_first_tiles_async(const AttentionParams& params, PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  constexpr int kNumAhead = Config::kNumStages - 1;
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
#pragma unroll
  for (int i = 0; i < kNumAhead; ++i) {
    loader.publish(last_tile - i, pages[i]);
    if constexpr (KvTileLoader<Config>::kIsPaged) __syncthreads();
    if (last_tile - i >= work.item.tile_begin) loader.load_async(last_tile - i);
    cp_async_commit();
  }
  loader.publish(last_tile - kNumAhead, pages[kNumAhead]);
}

// One query tile of one KV head against its run of KV tiles: leaves the warp's rows of the output, yet to be
// normalized.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void attend(const AttentionParams& params, PrefillSmem<Config>& smem,
                                       float (&out)[Shape::kFragsM][Shape::kFragsD][4], SoftmaxState<Config>& state) {
  const PrefillWork& work = smem.work;
  constexpr int kNumAhead = Config::kNumStages - 1;  // tiles in flight while one is worked on
  const int warp_idx = threadIdx.x / 32, warp_row = warp_idx * Shape::kRowsPerWarp;
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const WarpTiles<Config>& tiles = smem.warp_tiles[warp_idx];
  const float scale_log2 = Variant<Config>::scale_log2(params);
  const KvTileLoader<Config> loader{params, work, smem};

  // From the last tile to the first. A group is committed for every tile, loaded or not, so that "all but the latest
  // kNumStages - 2" always means the tile at hand.
#pragma unroll 1
  for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin; --tile) {
    cp_async_wait<kNumAhead - 1>();
    __syncthreads();  // the tile is there for all, and all have left the one before, whose stage is filled next
    if (tile - kNumAhead >= work.item.tile_begin) {
      loader.load_async(tile - kNumAhead);
    }
    cp_async_commit();

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
    int32_t next_page;
    if (!tiles.sees(tile)) {
      next_page = loader.look_up(tile - kNumAhead - 1);
    } else {
      float scores[Shape::kFragsM][Shape::kFragsN][4];
      compute_scores<Config>(scores, smem_address(warp_rows_smem), smem_address(k_smem));
      next_page = loader.look_up(tile - kNumAhead - 1);  // not sooner: the products above need every register
      const bool needs_mask = !tiles.sees_whole(tile);
      if (needs_mask || !Variant<Config>::kIsPlain) {
        transform_and_mask<Config>(scores, params, work, warp_row, tile, needs_mask);
      }
      state.raise_max(scores, out, scale_log2);
      softmax_times_v<Config>(scores, state, out, smem_address(smem.v[stage_of<Config>(tile)]), scale_log2);
    }
    loader.publish(tile - kNumAhead - 1, next_page);
  }
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
    attend<Config>(params, smem, out, state);
    if (smem.work.item.tile_end <= smem.work.item.tile_begin) {  // the query rows, whose place the output takes
      cp_async_wait<0>();
      __syncthreads();
    }
    finish_softmax<Config>(state, smem, params.v_scale, Variant<Config>::scale_log2(params));
    store_output<Config>(out, state, params, smem.work, smem);
    merge_chunks<Config>(params, smem.work, smem);
    __syncthreads();  // all have left the work and the shared memory of this unit
  }
  if (fresh_thread_idx() == 0) queue.close();
}

}  // namespace flashinfer
