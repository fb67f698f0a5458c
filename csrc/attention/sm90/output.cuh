// The end of a unit of prefill on Hopper: normalized rows and their LSE go where they belong; a query tile whose KV
// were split is merged by the blocks that finish its splits last.
#pragma once

#include "attention/merge_states.cuh"
#include "attention/sm90/softmax.cuh"
#include "device/ldmatrix.cuh"

namespace flashinfer::sm90 {

// First row of a slot of partial results. Slots follow each other, within one the KV heads, within those the rows.
__device__ __forceinline__ int64_t partial_row(const Work& work, int32_t slot_idx, int64_t num_rows,
                                               int32_t num_kv_heads) {
  return (work.item.partial_row + slot_idx * num_rows) * num_kv_heads + work.kv_head_idx * num_rows;
}

// The consumer's rows of the output, staged in shared memory where its queries were, so that a row is written as a
// whole.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void store_rows(const Sm90PrefillParams& params, const Work& work,
                                           const FastDivisor& group_size, int first_row, int num_rows,
                                           uint32_t rows_smem, int warp_row, const float (&out)[Shape::kNumOutputs]) {
  using T = typename Shape::T;
  const int lane_idx = fresh_thread_idx() % 32;
  const int row = warp_row + lane_idx % 16;  // whose address this lane passes to stmatrix
#pragma unroll
  for (int j = 0; j < Shape::kNumOutputs / 4; j += 2) {  // 16 columns
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack_16bit<T>(out[4 * j + 2 * i], out[4 * j + 2 * i + 1]);
    stmatrix_x4(rows_smem + granule_offset(row, j + lane_idx / 16, Shape::kRowsPerConsumer), packed);
  }
  const QueryRow query = QueryRow::of(work, group_size, first_row + row);
  const int64_t offset = row_offset(work, query, params.out_token_stride, params.out_head_stride);
  __syncwarp();
  constexpr int kGranulesPerRow = Shape::kHeadDimVo / 8;
  constexpr int kLanesPerRow = kGranulesPerRow % 16 == 0 ? 16 : 8, kRowsPerPass = 32 / kLanesPerRow;
#pragma unroll
  for (int pass = 0; pass < Shape::kRowsPerWarp / kRowsPerPass; ++pass) {
    const int pass_row = pass * kRowsPerPass + lane_idx / kLanesPerRow;
    T* row_gmem = static_cast<T*>(params.out) + __shfl_sync(0xffffffffu, offset, pass_row);
    if (warp_row + pass_row >= num_rows) continue;
#pragma unroll
    for (int granule = lane_idx % kLanesPerRow; granule < kGranulesPerRow; granule += kLanesPerRow) {
      uint4 vec;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w)
                   : "r"(rows_smem + granule_offset(warp_row + pass_row, granule, Shape::kRowsPerConsumer)));
      *reinterpret_cast<uint4*>(row_gmem + granule * 8) = vec;
    }
  }
}

// Whether this block is the last of `count` to come to the counter. It then sees what all of them wrote before. By all
// consumers.
template <class Config>
__device__ __forceinline__ bool is_last_of(int32_t count, uint32_t* counter, Smem<Config>& smem) {
  constexpr int kNumThreads = Shape<Config>::kNumConsumerThreads;
  __threadfence();
  named_barrier_sync(kAllConsumers, kNumThreads);
  if (fresh_thread_idx() == 0) {
    smem.is_last = atomicAdd(counter, 1u) == uint32_t(count - 1);
    if (smem.is_last) *counter = 0;
  }
  named_barrier_sync(kAllConsumers, kNumThreads);
  __threadfence();
  const bool is_last = smem.is_last;
  named_barrier_sync(kAllConsumers, kNumThreads);  // read by all before it is written again
  return is_last;
}

// Merges slots [first_slot, first_slot + num_slots) of the query tile, in this order whoever does it, and calls
// store(row, column, state) for every four columns of a row.
template <class Config, class Store>
__device__ __forceinline__ void merge_slots(const PrefillParams& params, const Work& work, int32_t num_rows,
                                            int32_t first_slot, int32_t num_slots, const Store& store) {
  using Shape = sm90::Shape<Config>;
  constexpr int kVecsPerRow = Shape::kHeadDimVo / 4, kBatch = 8;  // slots in flight
  const int64_t first_row = partial_row(work, first_slot, num_rows, params.num_kv_heads);
  const int64_t slot_stride = int64_t(num_rows) * params.num_kv_heads;
#pragma unroll 1
  for (int i = fresh_thread_idx(); i < num_rows * kVecsPerRow; i += Shape::kNumConsumerThreads) {
    RunningState<4> state;
#pragma unroll 1
    for (int first = 0; first < num_slots; first += kBatch) {
      float4 x[kBatch];
      float lse[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t row = first_row + min(first + j, num_slots - 1) * slot_stride + i / kVecsPerRow;
        x[j] = __ldcg(reinterpret_cast<const float4*>(params.partial_out) + row * kVecsPerRow + i % kVecsPerRow);
        lse[j] = __ldcg(params.partial_lse + row);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float partial[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
        state.merge(partial, first + j < num_slots ? lse[j] : kMinusInfinity);
      }
    }
    state.normalize();
    store(i / kVecsPerRow, i % kVecsPerRow * 4, state);
  }
}

// Merges the splits of the query tile as far as this block is the one to do it (MergeTree). By all consumers.
template <class Config>
__device__ __forceinline__ void merge_splits(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work,
                                             int32_t num_rows) {
  using Shape = sm90::Shape<Config>;
  using T = typename Shape::T;
  const PrefillItem& item = work.item;
  const MergeTree tree = MergeTree::of(item.num_splits);
  const auto counter = [&](int32_t idx) {
    return params.counters + (item.counter + int64_t(idx)) * params.num_kv_heads + work.kv_head_idx;
  };
  int32_t first_slot = 0, num_slots = tree.num_splits;
  if (tree.num_groups > 0) {
    const int32_t group_idx = item.split_idx / tree.group_len, group_len = tree.len_of_group(group_idx);
    if (!is_last_of(group_len, counter(1 + group_idx), smem)) return;
    const int64_t group_row = partial_row(work, tree.num_splits + group_idx, num_rows, params.num_kv_heads);
    merge_slots<Config>(params, work, num_rows, group_idx * tree.group_len, group_len,
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
  const FastDivisor group_size = smem.group_size;
  merge_slots<Config>(params, work, num_rows, first_slot, num_slots,
                      [&](int row, int column, const RunningState<4>& state) {
                        const QueryRow query = QueryRow::of(work, group_size, item.q_tile * Shape::kBlockM + row);
                        const int64_t token_idx = item.q_begin + query.token_idx;
                        T* out_row_gmem = static_cast<T*>(params.out) + token_idx * params.out_token_stride +
                                          query.qo_head_idx * params.out_head_stride;
                        cast_vec<T>(state.out).store(out_row_gmem + column);
                        if (column == 0 && params.lse != nullptr) {
                          params.lse[token_idx * params.num_qo_heads + query.qo_head_idx] = state.lse();
                        }
                      });
}

// Normalizes the consumer's rows and writes them, and their LSE, where they belong.
template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void finish_unit(const Sm90PrefillParams& params, Smem<Config>& smem, const Work& work,
                                            uint32_t turn, float (&out)[Shape::kNumOutputs],
                                            const Softmax<Config>& softmax) {
  const PrefillItem& item = work.item;
  const FastDivisor& group_size = smem.group_size;
  const int thread_idx = fresh_thread_idx(), consumer_idx = thread_idx / kWarpgroupSize;
  const int lane_idx = thread_idx % 32, warp_row = thread_idx % kWarpgroupSize / 32 * Shape::kRowsPerWarp;
  const int tile_rows = work.num_rows(group_size.divisor, Shape::kBlockM);
  const int num_rows = tile_rows - consumer_idx * Shape::kRowsPerConsumer;  // of the consumer; may be negative
  const int first_row = item.q_tile * Shape::kBlockM + consumer_idx * Shape::kRowsPerConsumer;
  const float scale_log2 = Score<Config>::scale_log2(params);
  float lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    lse[half] = softmax.max[half] * scale_log2 + fast_log2(sum);  // a row that saw no key: -inf - inf
    const float factor = sum > 0.f ? __fdividef(params.v_scale, sum) : 0.f;
#pragma unroll
    for (int i = 0; i < Shape::kNumOutputs / 2; ++i) out[i / 2 * 4 + half * 2 + i % 2] *= factor;
  }

  const int lane_row = warp_row + lane_idx / 4;
  if (item.num_splits > 1) {
    const int64_t row = partial_row(work, item.split_idx, tile_rows, params.num_kv_heads) +
                        consumer_idx * Shape::kRowsPerConsumer + lane_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (lane_row + half * 8 >= num_rows) continue;
      float* lane_gmem = params.partial_out + (row + half * 8) * Shape::kHeadDimVo + lane_idx % 4 * 2;
#pragma unroll
      for (int j = 0; j < Shape::kNumOutputs / 4; ++j) {
        *reinterpret_cast<float2*>(lane_gmem + j * 8) = float2{out[4 * j + 2 * half], out[4 * j + 2 * half + 1]};
      }
      if (lane_idx % 4 == 0) params.partial_lse[row + half * 8] = lse[half];
    }
    merge_splits<Config>(params, smem, work, tile_rows);
    return;
  }
  named_barrier_sync(kConsumer + consumer_idx, kWarpgroupSize);  // all warps have left the queries
  store_rows<Config>(params, work, group_size, first_row, num_rows, smem_address(smem.q_of(turn, consumer_idx)),
                     warp_row, out);
  if (params.lse == nullptr || lane_idx % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane_row + half * 8 >= num_rows) continue;
    const QueryRow query = QueryRow::of(work, group_size, first_row + lane_row + half * 8);
    params.lse[int64_t(item.q_begin + query.token_idx) * params.num_qo_heads + query.qo_head_idx] = lse[half];
  }
}

}  // namespace flashinfer::sm90
