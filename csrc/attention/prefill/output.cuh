// The end of a unit of prefill: normalized rows of the output and their LSE go where they belong; a query tile whose KV
// were split is merged by the blocks that finish its splits last.
#pragma once

#include "attention/prefill/load.cuh"
#include "attention/prefill/softmax.cuh"

namespace flashinfer {

// The two pairs of neighbouring output columns that a lane holds of 16. A pair is at lane_column(quad_lane) + column.
template <class Shape>
struct OutputPair {
  int frag_idx[2], element[2];  // fragment and element of the pair's first and second column
  int column;

  __device__ __forceinline__ static constexpr OutputPair of(int sixteen, int pair) {
    if (Shape::kPacksV) return {{2 * sixteen, 2 * sixteen + 1}, {pair, pair}, 16 * sixteen + 2 * pair};
    return {{2 * sixteen + pair, 2 * sixteen + pair}, {0, 1}, 16 * sixteen + 8 * pair};
  }
  __device__ __forceinline__ static constexpr int lane_column(int quad_lane) {
    return (Shape::kPacksV ? 4 : 2) * quad_lane;
  }
};

// Reduce the lanes' shares of the sums. They become the factors that normalize the output; the LSE go to shared memory,
// from where one lane a row stores them.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void finish_softmax(SoftmaxState<Config>& state, PrefillSmem<Config>& smem, float v_scale,
                                               float scale_log2) {
  const uint32_t thread_idx = thread_idx_after_loop();
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

// Write the warp's rows where they belong: out and lse, by way of shared memory, or this split's partial results.
template <class Config, class Shape = PrefillShape<Config>>
__device__ __forceinline__ void store_output(const float (&out)[Shape::kFragsM][Shape::kFragsD][4],
                                             const SoftmaxState<Config>& state, const PrefillParams& params,
                                             const PrefillWork& work, PrefillSmem<Config>& smem) {
  using T = typename Config::Q;
  using OutRows = typename Shape::OutRows;
  const uint32_t thread_idx = thread_idx_after_loop();
  const int lane_idx = int(thread_idx % 32), warp_row = int(thread_idx / 32) * Shape::kRowsPerWarp;
  const int num_rows = min(work.num_rows(Shape::kBlockM) - warp_row, Shape::kRowsPerWarp);  // of the warp
  uint8_t* warp_rows_smem = smem.q + warp_row * Shape::kHeadDimQk * 2;
  const float* warp_lse_smem = smem.lse + warp_row;
  const int lane_row = lane_idx / 4, lane_column = OutputPair<Shape>::lane_column(lane_idx % 4);
  if (work.item.num_splits > 1) {
    const int64_t first_row = work.partial_row(work.item.split_idx, Shape::kBlockM, params.num_kv_heads) + warp_row;
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
  const Copy copy = Copy::of(thread_idx);
  const auto rows = WarpRows<Shape>::of(work, thread_idx, params.out_token_stride, params.out_head_stride);
  constexpr int kGranulesPerPass = OutRows::kNumGranules / Copy::kLanesPerRow;
  constexpr int kMaxBatch = 8 / kGranulesPerPass;
  constexpr int kBatch = Copy::kNumPasses < kMaxBatch ? Copy::kNumPasses : kMaxBatch;  // passes
  static_assert(Copy::kNumPasses % kBatch == 0);
#pragma unroll
  for (int first = 0; first < Copy::kNumPasses; first += kBatch) {
    uint4 vecs[kBatch][kGranulesPerPass];
    int64_t offsets[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = copy.row + (first + i) * Copy::kRowsPerPass;
      offsets[i] = rows.offset(row);
#pragma unroll
      for (int c = 0; c < kGranulesPerPass; ++c) {
        const int granule = copy.lane + c * Copy::kLanesPerRow;
        vecs[i][c] = load_shared_16(smem_address(warp_rows_smem) + OutRows::offset(row, granule));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (copy.row + (first + i) * Copy::kRowsPerPass >= num_rows) continue;
      T* row_gmem = static_cast<T*>(params.out) + offsets[i] + copy.lane * 8;
#pragma unroll
      for (int c = 0; c < kGranulesPerPass; ++c) {
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

// Whether this block is the last of `count` to come to the counter. It then sees what all of them wrote before.
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
__device__ __forceinline__ void merge_slots(const PrefillParams& params, const PrefillWork& work, int32_t first_slot,
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

// Merges the splits of the query tile as far as this block is the one to do it (MergeTree).
template <class Config>
__device__ __forceinline__ void merge_splits(const PrefillParams& params, const PrefillWork& work,
                                             PrefillSmem<Config>& smem) {
  using Shape = PrefillShape<Config>;
  using T = typename Config::Q;
  const PrefillItem& item = work.item;
  if (item.num_splits <= 1) return;
  const MergeTree tree = MergeTree::of(item.num_splits);
  const auto counter = [&](int32_t idx) {
    return params.counters + (item.counter + int64_t(idx)) * params.num_kv_heads + work.kv_head_idx;
  };
  int32_t first_slot = 0, num_slots = tree.num_splits;
  if (tree.num_groups > 0) {
    const int32_t group_idx = item.split_idx / tree.group_len, group_len = tree.len_of_group(group_idx);
    if (!is_last_of(group_len, counter(1 + group_idx), smem)) return;
    const int64_t group_row = work.partial_row(tree.num_splits + group_idx, Shape::kBlockM, params.num_kv_heads);
    merge_slots<Config>(params, work, group_idx * tree.group_len, group_len,
                        [&](int row, int column, const RunningState<4>& state) {
                          const float4 x = {state.out[0], state.out[1], state.out[2], state.out[3]};
                          float* out_row_gmem = params.partial_out + (group_row + row) * Shape::kHeadDimVo;
                          *reinterpret_cast<float4*>(out_row_gmem + column) = x;
                          if (column == 0) params.partial_lse[group_row + row] = state.lse();
                        });
    first_slot = tree.num_splits;
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

}  // namespace flashinfer
