// SPDX-License-Identifier: Apache-2.0
// Attention of one query token per request over its KV: single sequence or paged cache. For a request b and a query
// head h, with g = h / group_size the KV head it shares:
//
//   s_j = log2(e) * logit(q[b, h], k[j, g])       logit: score.cuh; j: what its last position sees (visibility.cuh)
//   lse[b, h] = log2(sum_j 2^s_j)
//   out[b, h] = v_scale * sum_j 2^(s_j - lse[b, h]) v[j, g]       no key: out = 0, lse = -inf
//
// kHasSinks: with one more term, of the head (sink.cuh).
//
//   q [batch_size, num_qo_heads, head_dim_qk], k [keys, num_kv_heads, head_dim_qk], v [keys, num_kv_heads, head_dim_vo]
//   -> out [batch_size, num_qo_heads, head_dim_vo], lse [batch_size, num_qo_heads] in fp32, if wanted
//
// The launch is a fixed grid (query head blocks, chunks); a chunk is an equal share of all KV tiles
// (decode/schedule.cuh), so every block streams the same number of bytes whatever the lengths are.
//
// Each warp is a pipeline of its own: it copies its rows of a tile (cp.async, kNumStages deep, running on into the next
// request of the chunk), multiplies and accumulates them, and meets the other warps only at the end of a request. The
// products run on the tensor cores transposed: S^T = K Q^T and O^T = V^T P^T, so that the 16 rows of an mma hold keys,
// respectively head_dim, and its 8 columns the query heads that share a KV head. Small groups waste columns, but the
// kernel waits for memory either way; what matters is that K and V pass through shared memory once.
//
// A request that spans several chunks leaves partial outputs; the blocks that finish last merge them.
//
// Of a mixed batch (kIsMixed) it computes requests of one query and some KV, whichever tokens theirs are, beside
// prefill of the others (attention/sm90/prefill.cuh): what was there before that launch has finished when its blocks
// let this one in, and nothing it writes is read here. So blocks begin at once, wherever an SM is left to them, and the
// last ones wait, so that both launches are over when this one is. Where chunks are short the next may start beside
// both.
#pragma once

#include "attention/decode/tile.cuh"
#include "attention/merge.cuh"
#include "attention/sink.cuh"
#include "device/cast.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// ------------------------------------------------------------------------------------------------------------ storing

// Where the result of (request, head) goes: the output, or this chunk's partial slot.
template <class Config>
struct ResultWriter {
  using O = typename Config::O;
  const DecodeParams& params;

  template <int N>
  __device__ __forceinline__ void write_result(int32_t token_idx, int32_t head, int32_t element, const float (&x)[N],
                                               float lse) const {
    if constexpr (Config::kIsMixed) {  // whatever the offsets said
      if (token_idx >= params.num_tokens) return;
    }
    float y[N], factor = Score<Config>::v_scale(params);
    if constexpr (Config::kHasSinks) factor *= add_sink(params.sinks[head], lse);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = x[i] * factor;
    O* dst = static_cast<O*>(params.out) + token_idx * params.out_token_stride + head * params.out_head_stride;
    cast_vec<O>(y).store(dst + element);
    if (element == 0 && params.lse != nullptr) params.lse[int64_t(token_idx) * params.num_qo_heads + head] = lse;
  }
  __device__ __forceinline__ float* partial_out(int32_t slot, int32_t head, int32_t element) const {
    return params.partial_out + head * Config::kHeadDimVo + element +
           int64_t(slot) * (params.num_qo_heads * Config::kHeadDimVo);
  }
  __device__ __forceinline__ float& partial_lse(int32_t slot, int32_t head) const {
    return params.partial_lse[int64_t(slot) * params.num_qo_heads + head];
  }
  template <int N>
  __device__ __forceinline__ void write_partial(int32_t slot, int32_t head, int32_t element, const float (&x)[N],
                                                float lse) const {
    cast_vec<float>(x).store(partial_out(slot, head, element));
    if (element == 0) partial_lse(slot, head) = lse;
  }
};

// The part of an output row that a warp takes, kVec elements a lane. A request is finished by all of a block's warps at
// once: what they do here is what the next kernel waits for.
template <class Config, int kMaxVec>
struct RowPiece {
  static constexpr int kVec = Config::kHeadDimVo % (kMaxVec * kWarpSize) == 0 ? kMaxVec
                              : Config::kHeadDimVo % (2 * kWarpSize) == 0     ? 2
                                                                              : 1;
  static constexpr int kNumPerRow = Config::kHeadDimVo / (kVec * kWarpSize);
  int row, element;  // the lane's first

  __device__ __forceinline__ static RowPiece of(int piece_idx) {
    return {piece_idx / kNumPerRow, (piece_idx % kNumPerRow * kWarpSize + int(threadIdx.x) % kWarpSize) * kVec};
  }
};

// Join the warps' results of one request through shared memory, 8 heads at a time, and write them out.
template <class Config>
__device__ __forceinline__ void store_request(const DecodeParams& params, const HeadBlock& heads,
                                              const WarpState<Config>& state, DecodeSmem<Config>& smem,
                                              const DecodeRequest& request, int32_t slot) {
  using Tile = DecodeTile<Config>;
  using Piece = RowPiece<Config, 2>;
  const ResultWriter<Config> writer{params};
  const int warp_idx = threadIdx.x / kWarpSize;
  if (state.group == 0) {
#pragma unroll
    for (int i = 0; i < 2 * Tile::kHeadTiles; ++i) {
      const int head = i / 2 * kMmaHeads + 2 * state.column + i % 2;
      smem.max[warp_idx][head] = state.max_rmem[i / 2][i % 2];
      smem.sum[warp_idx][head] = state.sum_rmem[i / 2][i % 2];
    }
  }
#pragma unroll
  for (int t = 0; t < Tile::kHeadTiles; ++t) {
    if (t > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < 4 * Tile::kVoTiles; ++i) {
      smem.out[warp_idx][2 * state.column + i % 2][state.out_element(i / 4, i % 4 / 2)] =
          state.out_rmem[t][i / 4][i % 4];
    }
    __syncthreads();
    const int num_heads = min(heads.num_heads - t * kMmaHeads, kMmaHeads);
    for (int idx = warp_idx; idx < num_heads * Piece::kNumPerRow; idx += Tile::kNumWarps) {
      const auto [row, element] = Piece::of(idx);
      const int head = t * kMmaHeads + row;
      float max = kMinusInfinity, sum = 0.f, out[Piece::kVec] = {};
#pragma unroll
      for (int w = 0; w < Tile::kNumWarps; ++w) max = fmaxf(max, smem.max[w][head]);
      const float shift = max == kMinusInfinity ? 0.f : max * state.scale;
#pragma unroll
      for (int w = 0; w < Tile::kNumWarps; ++w) {
        const float weight = fast_exp2(smem.max[w][head] * state.scale - shift);
        sum += smem.sum[w][head] * weight;
        const auto x = Vec<float, Piece::kVec>::load(&smem.out[w][row][element]);
#pragma unroll
        for (int i = 0; i < Piece::kVec; ++i) out[i] += x[i] * weight;
      }
      const float rcp_sum = sum > 0.f ? fast_rcp(sum) : 0.f;
#pragma unroll
      for (int i = 0; i < Piece::kVec; ++i) out[i] *= rcp_sum;
      const float lse = sum > 0.f ? shift + fast_log2(sum) : kMinusInfinity;
      const int32_t qo_head = heads.first_head + head;
      if (request.num_chunks == 1) {
        writer.write_result(token_of<Config>(request), qo_head, element, out, lse);
      } else {
        writer.write_partial(slot, qo_head, element, out, lse);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ merging

// Partial results of one request: those of every chunk_stride-th chunk.
struct PartialRun {
  int32_t first_chunk, chunk_stride, count;
  bool starts_request;  // its first chunk is the request's first

  __device__ __forceinline__ int32_t first_slot() const { return partial_slot(first_chunk, starts_request); }
  __device__ __forceinline__ int32_t slot_stride() const { return 2 * chunk_stride; }
};

// Merge partial results and call store(head, element, out, lse) for every few elements of a row. A lane holds the LSE
// of one of them, so that each weight is computed once.
template <class Config, class Store>
__device__ __forceinline__ void merge_run(const DecodeParams& params, const HeadBlock& heads, const PartialRun& run,
                                          const Store& store) {
  constexpr bool kFewRegisters = Config::kMinBlocksPerSm > 1;
  using Piece = RowPiece<Config, kFewRegisters ? 1 : 4>;
  using Vector = Vec<float, Piece::kVec>;
  constexpr int kNumWarps = Config::kNumThreads / kWarpSize;
  constexpr int kBatch = kFewRegisters ? 8 : 16;  // loads in flight, as the registers allow
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  const ResultWriter<Config> writer{params};
  const uint32_t lse_stride = run.slot_stride() * params.num_qo_heads, out_stride = lse_stride * Config::kHeadDimVo;
  for (int idx = warp_idx; idx < heads.num_heads * Piece::kNumPerRow; idx += kNumWarps) {
    const auto [row, element] = Piece::of(idx);
    const int32_t head = heads.first_head + row;
    float max = kMinusInfinity, sum = 0.f, out[Piece::kVec] = {};
    // Where partial 0 would lie if it did not start the request, one slot further.
    const int32_t origin = run.first_slot() - run.starts_request;
    const float* out_gmem = writer.partial_out(origin, head, element);
    const float* lse_gmem = &writer.partial_lse(origin, head);
    for (int32_t first = 0; first < run.count; first += kBatch) {
      const int32_t num_left = run.count - first;
      const uint32_t shift_0 = first == 0 && run.starts_request ? params.num_qo_heads : 0;
      float lse = kMinusInfinity;
      if (lane_idx < min(num_left, kBatch))
        lse = __ldcg(lse_gmem + lane_idx * lse_stride + (lane_idx == 0 ? shift_0 : 0));
      Vector x[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        x[i] = {};
        if (i < num_left)
          x[i] = Vector::load_from_l2(out_gmem + i * out_stride + (i == 0 ? shift_0 * Config::kHeadDimVo : 0));
      }
      lse_gmem += kBatch * lse_stride;
      out_gmem += kBatch * out_stride;
      const float new_max = fmaxf(max, warp_reduce(lse, Max{}));
      const float shift = new_max == kMinusInfinity ? 0.f : new_max;
      const float weight = fast_exp2(lse - shift), decay = fast_exp2(max - shift);
      max = new_max;
      sum = sum * decay + weight;  // of this lane's
#pragma unroll
      for (int j = 0; j < Piece::kVec; ++j) out[j] *= decay;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float weight_i = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
        for (int j = 0; j < Piece::kVec; ++j) out[j] += x[i][j] * weight_i;
      }
    }
    sum = warp_reduce(sum, Sum{});
    const float rcp_sum = sum > 0.f ? fast_rcp(sum) : 0.f;
#pragma unroll
    for (int j = 0; j < Piece::kVec; ++j) out[j] *= rcp_sum;
    store(head, element, out, sum > 0.f ? max + fast_log2(sum) : kMinusInfinity);
  }
}

// Merge the partial results of a request as far as this block is the one to do it. Those of few rows: up to
// kMaxUngrouped are merged by one block. A group's result and counter are named after its first chunk.
template <class Config>
__device__ __forceinline__ void merge_request(const DecodeParams& params, const HeadBlock& heads,
                                              DecodeSmem<Config>& smem, const DecodeRequest& request) {
  constexpr int32_t kMaxUngrouped = 48, kLog2MinGroup = 4;
  const ResultWriter<Config> writer{params};
  const int32_t num_chunks = gridDim.y;
  const MergeTree tree = MergeTree::of(request.num_chunks, kMaxUngrouped, kLog2MinGroup);
  climb(tree, int32_t(blockIdx.y) - request.first_chunk, [&](int32_t group_idx, int32_t count) {
    const bool is_group = group_idx != kAllGroups;
    PartialRun run{request.first_chunk, 1, count, true};
    if (is_group) {
      const int32_t first = tree.first_of_group(group_idx);
      run = {request.first_chunk + first, 1, count, first == 0};
    } else if (tree.num_groups > 0) {
      run = {request.first_chunk + num_chunks, tree.group_len(), count, true};
    }
    const int32_t counter_idx = is_group ? params.batch_size + run.first_slot() : request.request_idx;
    uint32_t* counter = params.counters + int64_t(counter_idx) * gridDim.x + blockIdx.x;
    if (!arrives_last(counter, count, smem.is_last, threadIdx.x, [] { __syncthreads(); })) return false;
    merge_run<Config>(params, heads, run, [&](int32_t head, int32_t element, const auto& out, float lse) {
      if (is_group) {
        writer.write_partial(run.first_slot() + 2 * num_chunks, head, element, out, lse);
      } else {
        writer.write_result(token_of<Config>(request), head, element, out, lse);
      }
    });
    return true;
  });
}

// A request without KV attends to nothing: zeros, LSE -inf.
template <class Config>
__device__ __forceinline__ void store_empty_requests(const DecodeParams& params, const HeadBlock& heads,
                                                     int32_t num_empty) {
  constexpr int kVecsPerHead = Config::kHeadDimVo / 4;
  const ResultWriter<Config> writer{params};
  for (int32_t i = blockIdx.y; i < num_empty; i += gridDim.y) {
    const int32_t request_idx = params.empty == nullptr ? 0 : params.empty[i];
    for (int idx = threadIdx.x; idx < heads.num_heads * kVecsPerHead; idx += Config::kNumThreads) {
      const int32_t head = heads.first_head + idx / kVecsPerHead, element = idx % kVecsPerHead * 4;
      writer.write_result(request_idx, head, element, {0.f, 0.f, 0.f, 0.f}, kMinusInfinity);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- kernel

template <class Config>
__device__ __forceinline__ DecodeChunk load_chunk(const DecodeParams& params) {
  if constexpr (Config::kKvStorage == kKvSingle) {
    const int32_t kv_len = params.kv.index.len,
                  begin = visibility_of<Config>(params, 0).keys_of(kv_len - 1, kv_len).begin,
                  first_key = min(begin, max(kv_len - 1, 0));
    return single_chunk(kv_len, first_key, DecodeTile<Config>::kTileRows, gridDim.y, blockIdx.y);
  } else {
    return params.chunks[blockIdx.y];
  }
}

// Overlapping launches pay up to here. In long chunks, streaming with the next launch already on the device was 2%
// slower (head_dim 64 and fp8, H100); in chunks of 4 tiles the overlap saves 3 of 18 us.
constexpr int kShortChunk = 16;

// Grid: (blocks of query heads, chunks). Blocks that read the same pages are neighbours and run side by side.
template <class Config>
__device__ void decode(const DecodeParams& params) {
  using Tile = DecodeTile<Config>;
  using Smem = DecodeSmem<Config>;
  static_assert(sizeof(Smem) <= Config::kSmemBytes);
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int warp_idx = threadIdx.x / kWarpSize;

  if constexpr (!Config::kIsMixed) {
    if (threadIdx.x == 0) smem.previous_ended = 0;
    __syncthreads();
    if (!params.plan_is_settled) wait_for_previous_kernel();
  }
  const DecodeChunk chunk = load_chunk<Config>(params);
  const HeadBlock heads = HeadBlock::make<Config::kGroupTile>(params, blockIdx.x);
  TileLoader<Config> loader(params, heads, chunk);
  const bool is_short = chunk.num_tiles <= kShortChunk;
  if constexpr (Config::kIsMixed) {
    if (is_short) allow_next_kernel();
  } else {
    if (params.plan_is_settled && is_short && warp_idx > 0) loader.touch(smem.out[warp_idx], smem.previous_ended);
    wait_for_previous_kernel();
    if (threadIdx.x == 0) smem.previous_ended = 1;
    if (is_short)
      allow_next_kernel();  // after the wait: early reads count on every kernel before the previous being done
  }
  if (chunk.num_tiles > 0) {
    WarpState<Config> state(params, heads);
    TileWalk walk = TileWalk::start(chunk, params.requests);
    for (int stage = 0; stage < Config::kNumStages - 1; ++stage) loader.issue(smem.stages[warp_idx][stage]);

    int stage = 0, free_stage = Config::kNumStages - 1;
    while (!walk.done()) {
      const DecodeRequest request = walk.request;
      const int32_t first_tile = walk.tile, end_tile = first_tile + walk.num_in_request();
      state.clear();
      for (int32_t tile = first_tile; tile < end_tile; ++tile) {
        loader.issue(smem.stages[warp_idx][free_stage]);
        cp_async_wait<Config::kNumStages - 1>();
        __syncwarp();
        const auto& arrived = smem.stages[warp_idx][stage];
        if (tile == first_tile) state.take_query(arrived, request.kv_len);
        state.attend(arrived, request.request_idx,
                     request.first_key + tile * Tile::kTileRows + warp_idx * Tile::kWarpRows, request.kv_len);
        __syncwarp();
        free_stage = stage;
        stage = stage + 1 == Config::kNumStages ? 0 : stage + 1;
      }
      state.finish_request();
      store_request(params, heads, state, smem, request, partial_slot(blockIdx.y, first_tile == 0));
      if (request.num_chunks > 1) merge_request(params, heads, smem, request);
      __syncthreads();
      walk.advance(end_tile - first_tile);
    }
  }
  if constexpr (Config::kIsMixed) {
    if (blockIdx.y + 1 == gridDim.y) wait_for_previous_kernel();  // all others have been let in by then
  } else {
    store_empty_requests<Config>(params, heads, chunk.num_empty);
  }
}

}  // namespace flashinfer
