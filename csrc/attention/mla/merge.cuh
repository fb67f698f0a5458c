// How the splits of a query tile are merged in latent attention, whose partial results are large: 128 KB of 64 rows.
// The last block to arrive (attention/merge.cuh) would read megabytes. Instead the tile is cut into as many shares as
// it has splits, and each is merged by a block of its own once all splits have been left.
//
// That block waits. All units are claimed by then, by blocks that are running, and none of them waits before it has
// done its own: so the wait ends, whatever else the GPU is at, and however many blocks of the grid have yet to start.
#pragma once

#include "attention/mla/params.h"
#include "attention/prefill/work.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"

namespace flashinfer {

// Where the splits of a tile count: those that have left their partial results, then the shares that know.
struct SplitCounter {
  uint32_t* counter_gmem;
  uint32_t num_splits;

  // By one thread, after a barrier with those that wrote the partial results.
  __device__ __forceinline__ void arrive() const { atomic_add_release(counter_gmem, 1); }
  // By one thread, before a barrier with those that read them. Leaves zero for the next launch.
  __device__ __forceinline__ void await_all() const {
    while (load_acquire(counter_gmem) < num_splits) {
    }
    if (atomicAdd(counter_gmem, 1u) == 2 * num_splits - 1) *counter_gmem = 0;
  }
};

// Merges the split_idx-th of num_splits shares of a query tile. A lane has kBatch splits of kNumVecs vectors in flight;
// where there are more splits, several lanes of a warp read different ones of the same columns. A vector is what a lane
// had of 16 columns: two pairs, kPairDistance apart.
template <class Config, int kNumThreads, int kPairDistance, int kNumVecs, int kBatch>
__device__ __forceinline__ void merge_share(const MlaParams& params, const PrefillUnit& unit,
                                            const FastDivisor& group_size) {
  using T = typename Config::Out;
  constexpr int kHeadDim = Config::kHeadDimVo, kVecsPerRow = kHeadDim / 4, kMaxParts = 8;
  const PrefillItem& item = unit.item;
  const int32_t num_splits = item.num_splits;
  const int32_t num_rows = unit.num_rows(group_size.divisor, Config::kBlockM), num_vecs = num_rows * kVecsPerRow;
  const int32_t end = num_vecs * (item.split_idx + 1) / num_splits;  // num_splits is at most that of threads that plan
  int32_t num_parts = 1;
  while (num_parts < kMaxParts && num_parts * kBatch < num_splits) num_parts *= 2;
  const int32_t lanes_of_part = kWarpSize / num_parts, lane_idx = fresh_thread_idx() % kWarpSize;
  const int32_t part = lane_idx / lanes_of_part, stride = kNumThreads / kWarpSize * lanes_of_part;
  int32_t first = num_vecs * item.split_idx / num_splits + fresh_thread_idx() / kWarpSize * lanes_of_part;
#pragma unroll 1
  for (; first < end; first += kNumVecs * stride) {
    RunningState<4> states[kNumVecs];
#pragma unroll 1
    for (int32_t split = part; split < num_splits; split += kBatch * num_parts) {
      float x[kNumVecs][kBatch][4], lse[kNumVecs][kBatch];
#pragma unroll
      for (int v = 0; v < kNumVecs; ++v) {
        const int32_t vec_idx = min(first + lane_idx % lanes_of_part + v * stride, end - 1);
        const int32_t row = item.partial_row + vec_idx / kVecsPerRow, place = vec_idx % kVecsPerRow * 4;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int32_t idx = split + j * num_parts;
          lse[v][j] = kMinusInfinity;
          if (idx < num_splits) {
            const int64_t split_row = row + int64_t(idx) * num_rows;
            const float4 vec =
                __ldcg(reinterpret_cast<const float4*>(params.partial_out + split_row * kHeadDim + place));
            x[v][j][0] = vec.x, x[v][j][1] = vec.y, x[v][j][2] = vec.z, x[v][j][3] = vec.w;
            lse[v][j] = __ldcg(params.partial_lse + split_row);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kNumVecs; ++v) states[v].merge(x[v], lse[v]);
    }
#pragma unroll
    for (int v = 0; v < kNumVecs; ++v) {
      RunningState<4>& state = states[v];
      state.normalize();
      for (int32_t step = lanes_of_part; step < kWarpSize; step *= 2) {
        float out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = __shfl_xor_sync(0xffffffffu, state.out[i], step);
        const float lse = __shfl_xor_sync(0xffffffffu, state.lse(), step);
        RunningState<4> both;
        both.merge(state.out, state.lse());
        both.merge(out, lse);
        both.normalize();
        state = both;
      }
      const int32_t vec_idx = first + lane_idx % lanes_of_part + v * stride;
      if (part > 0 || vec_idx >= end) continue;
      const int32_t column = vec_idx % kVecsPerRow / 4 * 16 + vec_idx % 4 * (kPairDistance == 2 ? 4 : 2);
      const QueryRow query = unit.query_row(group_size, item.q_tile * Config::kBlockM + vec_idx / kVecsPerRow);
      T* row_gmem = static_cast<T*>(params.out) + unit.offset(query, params.out_token_stride, params.out_head_stride);
      *reinterpret_cast<uint32_t*>(row_gmem + column) = pack_16bit<T>(state.out[0], state.out[1]);
      *reinterpret_cast<uint32_t*>(row_gmem + column + kPairDistance) = pack_16bit<T>(state.out[2], state.out[3]);
      if (column == 0 && params.lse != nullptr) {
        params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = state.lse();
      }
    }
  }
}

// The shares of this block, after all of its units. By kNumThreads threads; sync(): their barrier.
template <class Config, int kNumThreads, int kPairDistance, class Sync>
__device__ __forceinline__ void merge_shares(const MlaParams& params, const FastDivisor& group_size, const Sync& sync) {
  if (!params.schedule->has_splits) return;
  for (int32_t i = blockIdx.x; i < params.schedule->num_items; i += gridDim.x) {
    PrefillUnit unit = {params.items[i], 0};
    if (unit.item.num_splits == 1) continue;
    unit.item.confine_to(params.num_tokens);
    const SplitCounter counter = {params.counters + unit.item.counter, uint32_t(unit.item.num_splits)};
    if (fresh_thread_idx() == 0) counter.await_all();
    sync();
    if (unit.item.num_splits <= 4) {
      merge_share<Config, kNumThreads, kPairDistance, 4, 4>(params, unit, group_size);
    } else {
      merge_share<Config, kNumThreads, kPairDistance, 1, 16>(params, unit, group_size);
    }
  }
}

}  // namespace flashinfer
