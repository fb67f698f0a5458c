// SPDX-License-Identifier: Apache-2.0
// The two halves of the decode pipeline: TileLoader copies a warp's rows of KV into shared memory, WarpState multiplies
// and accumulates them. See attention/decode/kernel.cuh for how they are put together.
#pragma once

#include "attention/decode/schedule.cuh"
#include "attention/score.cuh"
#include "attention/visibility.cuh"
#include "device/cp_async.cuh"
#include "device/fragment.cuh"
#include "device/kv_codec.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/rotary.cuh"
#include "device/swizzle.cuh"

namespace flashinfer {

constexpr int kMmaHeads = 8;  // columns of an mma: query heads
constexpr int kMmaRows = 16;  // rows of an mma: keys of S^T, elements of head_dim of O^T

template <class Config>
struct DecodeTile {
  using Q = typename Config::Q;
  using Kv = typename Config::Kv;
  static constexpr int kDimQk = Config::kHeadDimQk, kDimVo = Config::kHeadDimVo;
  static constexpr int kNumWarps = Config::kNumThreads / kWarpSize;
  static constexpr int kWarpRows = Config::kWarpRows;  // keys a warp takes of a tile
  static constexpr int kTileRows = kNumWarps * kWarpRows;
  static constexpr int kRowTiles = kWarpRows / kMmaRows;
  static constexpr int kHeadTiles = Config::kGroupTile / kMmaHeads;
  static constexpr int kQkSteps = kDimQk / 16;        // mma along head_dim of S^T
  static constexpr int kVoTiles = kDimVo / kMmaRows;  // mma tiles along head_dim of O^T
  using Mma = typename CheapestOperand<Q, Kv>::Type;  // what the tensor cores multiply
  using Codec = KvCodec<Mma, Kv>;
  using QCodec = KvCodec<Mma, Q>;
  static constexpr bool kIsPacked = Codec::kPerRegister == 4, kIsQueryPacked = QCodec::kPerRegister == 4;
  static_assert(kIsPacked || !kIsQueryPacked, "the order of a query's elements follows that of the keys");
  static_assert(kWarpRows % kMmaRows == 0 && kWarpRows <= kWarpSize && Config::kGroupTile % kMmaHeads == 0);
  static_assert(kDimQk % 32 == 0 && kDimVo % 32 == 0);
};

template <class Config>
struct DecodeSmem {
  using Tile = DecodeTile<Config>;
  struct Stage {  // of one warp; rows swizzled
    typename Tile::Kv k[Tile::kWarpRows * Tile::kDimQk];
    typename Tile::Kv v[Tile::kWarpRows * Tile::kDimVo];
    typename Tile::Q q[Config::kGroupTile * Tile::kDimQk];  // filled with a request's first tile
  };
  static constexpr int kOutStride = Tile::kDimVo + 4;  // keeps the accumulators' columns off each other's banks
  alignas(128) Stage stages[Tile::kNumWarps][Config::kNumStages];
  using WarpOut = float[kMmaHeads][kOutStride];
  alignas(16) WarpOut out[Tile::kNumWarps];
  float max[Tile::kNumWarps][Config::kGroupTile];
  float sum[Tile::kNumWarps][Config::kGroupTile];
  uint32_t is_last;
  volatile uint32_t previous_ended;  // 1: the kernel before this one has ended
};

// The block of query heads this thread block works for.
struct HeadBlock {
  int32_t kv_head, first_head, num_heads;

  template <int kGroupTile>
  __device__ static HeadBlock make(const DecodeParams& params, int32_t block_idx) {
    const int32_t group = params.num_qo_heads / params.num_kv_heads, num_blocks = ceil_div(group, kGroupTile);
    const int32_t kv_head = block_idx / num_blocks, first = block_idx % num_blocks * kGroupTile;
    return {kv_head, kv_head * group + first, min(group - first, kGroupTile)};
  }
};

// ------------------------------------------------------------------------------------------------------------ loading

// Tiles read ahead of the previous kernel's end, at most.
constexpr int kTouchTiles = 4;

// The copies of one warp tile, and the lookup of the rows of the tile after it: an index load is in flight while the
// copies that do not need it are issued.
template <class Config>
struct TileLoader {
  using Tile = DecodeTile<Config>;
  using Smem = DecodeSmem<Config>;
  using Kv = typename Tile::Kv;
  using View = KvView<Config::kKvStorage>;

  const DecodeParams& params;
  const HeadBlock& heads;
  TileWalk walk;
  KvRow row;          // of the upcoming tile, one row a lane
  bool row_valid;     // it is inside the request
  int32_t query_idx;  // >= 0 on a request's first tile here: whose q comes along
  const uint64_t l2_policy = evict_first_policy();
  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;

  __device__ __forceinline__ TileLoader(const DecodeParams& params, const HeadBlock& heads, const DecodeChunk& chunk)
      : params(params), heads(heads), walk(TileWalk::start(chunk, params.requests)) {
    look_up(/*first_of_request=*/true);
  }

  __device__ __forceinline__ void look_up(bool first_of_request) {
    row = {0, 0};
    row_valid = false;
    query_idx = -1;
    if (walk.done()) return;
    const int32_t kv_idx = walk.first_row(Tile::kTileRows) + warp_idx * Tile::kWarpRows + lane_idx % Tile::kWarpRows;
    row_valid = kv_idx < walk.request.kv_len;
    if (row_valid) row = View{params.kv.index, walk.request.page_begin, walk.request.kv_len}.locate(kv_idx);
    if (first_of_request) query_idx = token_of<Config>(walk.request);
    if constexpr (Config::kIsMixed) {
      if (query_idx >= params.num_tokens) query_idx = -1;  // whatever the offsets said
    }
  }

  __device__ __forceinline__ void issue(typename Smem::Stage& stage) {
    const int64_t k_offset = View::k_offset(params.kv, row, heads.kv_head);
    const int64_t v_offset = View::v_offset(params.kv, row, heads.kv_head);
    copy_rows<Tile::kDimQk>(stage.k, static_cast<const Kv*>(params.kv.k), k_offset);
    copy_rows<Tile::kDimVo>(stage.v, static_cast<const Kv*>(params.kv.v), v_offset);
    if (query_idx >= 0) copy_query(stage.q);
    cp_async_commit();
    if (walk.done()) return;
    const int32_t request_idx = walk.request.request_idx;
    walk.advance();
    look_up(walk.tile == 0 && walk.request.request_idx != request_idx);
  }

  // Have the KV of the first tiles come into L2 while the previous kernel still runs. The rows may yet be written by
  // it: that does no harm, as L2 is where its writes go and nothing read here is used.
  //
  // Copies of 16 bytes of every line do it. A prefetch instruction does not: it stops at the L2 partition that owns the
  // line. 128 KB an SM then take 8240 cycles to copy, against 4600 after a copy like this and 11130 from device memory
  // (H100).
  //
  // They must not stand in the way of what follows. A warp waits for its copies before it sends more, as many in flight
  // hold up the copies that count; and it sends no more once the previous kernel has ended. Warp 0 touches nothing, so
  // that it can tell the others by previous_ended. What they leave in flight has arrived when the first tile has.
  __device__ __forceinline__ void touch(typename Smem::WarpOut& scratch_smem,
                                        const volatile uint32_t& previous_ended) const {
    const auto ended = [&] { return __any_sync(0xffffffffu, previous_ended != 0) != 0; };
    const auto may_go_on = [&] {
      if (ended()) return false;
      cp_async_wait<0>();
      return !ended();
    };
    TileWalk ahead = walk;
    for (int i = 0; i < kTouchTiles && !ahead.done(); ++i, ahead.advance()) {
      const int32_t kv_idx = ahead.first_row(Tile::kTileRows) + warp_idx * Tile::kWarpRows + lane_idx % Tile::kWarpRows;
      const bool valid = kv_idx < ahead.request.kv_len;
      KvRow found{0, 0};
      if (valid) found = View{params.kv.index, ahead.request.page_begin, ahead.request.kv_len}.locate(kv_idx);
      const int64_t k_offset = View::k_offset(params.kv, found, heads.kv_head);
      const int64_t v_offset = View::v_offset(params.kv, found, heads.kv_head);
      if (i > 0 && !may_go_on()) return;
      touch_rows<Tile::kDimQk>(scratch_smem, static_cast<const Kv*>(params.kv.k), k_offset, valid);
      if (!may_go_on()) return;
      touch_rows<Tile::kDimVo>(scratch_smem, static_cast<const Kv*>(params.kv.v), v_offset, valid);
    }
  }

 private:
  template <int kDim>
  __device__ __forceinline__ void touch_rows(typename Smem::WarpOut& scratch_smem, const Kv* src_gmem, int64_t offset,
                                             bool row_valid) const {
    constexpr int kLineElements = 128 / sizeof(Kv), kNumLines = ceil_div(kDim, kLineElements);
    constexpr int kNumCopies = ceil_div(Tile::kWarpRows * kNumLines, kWarpSize);
    static_assert(sizeof(scratch_smem) >= kNumCopies * kWarpSize * 16);
    const uint32_t dst = smem_address(&scratch_smem) + lane_idx * 16;
#pragma unroll
    for (int i = 0; i < kNumCopies; ++i) {
      const int idx = i * kWarpSize + lane_idx, row_idx = idx / kNumLines, line = idx % kNumLines;
      const int64_t row_offset = __shfl_sync(0xffffffffu, offset, row_idx);
      const bool valid = __shfl_sync(0xffffffffu, int(row_valid), row_idx) && row_idx < Tile::kWarpRows;
      if (valid) cp_async_16(dst + i * kWarpSize * 16, src_gmem + row_offset + line * kLineElements, true);
    }
    cp_async_commit();
  }

  // Rows outside the request are zero-filled without being read: whatever lies there, NaN included, stays out.
  template <int kDim>
  __device__ __forceinline__ void copy_rows(Kv* dst_smem, const Kv* src_gmem, int64_t offset) {
    using Rows = SwizzledRows<kDim * sizeof(Kv)>;
    constexpr int kGranuleElements = 16 / sizeof(Kv);
    const uint32_t dst = smem_address(dst_smem);
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows * Rows::kNumGranules / kWarpSize; ++i) {
      const int idx = i * kWarpSize + lane_idx, row_idx = idx / Rows::kNumGranules, granule = idx % Rows::kNumGranules;
      const int64_t row_offset = __shfl_sync(0xffffffffu, offset, row_idx);
      const bool valid = __shfl_sync(0xffffffffu, int(row_valid), row_idx);
      cp_async_16(dst + Rows::offset(row_idx, granule), src_gmem + row_offset + granule * kGranuleElements, valid,
                  l2_policy);
    }
  }

  __device__ __forceinline__ void copy_query(typename Tile::Q* dst_smem) {
    using Rows = SwizzledRows<Tile::kDimQk * sizeof(typename Tile::Q)>;
    constexpr int kGranuleElements = 16 / sizeof(typename Tile::Q);
    const uint32_t dst = smem_address(dst_smem);
    const auto* src = static_cast<const typename Tile::Q*>(params.q) + query_idx * params.q_token_stride +
                      heads.first_head * params.q_head_stride;
#pragma unroll 4
    for (int idx = lane_idx; idx < heads.num_heads * Rows::kNumGranules; idx += kWarpSize) {
      const int head = idx / Rows::kNumGranules, granule = idx % Rows::kNumGranules;
      cp_async_16(dst + Rows::offset(head, granule), src + head * params.q_head_stride + granule * kGranuleElements,
                  true);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- computing

// A warp's share of one request: its queries, and the running softmax over the keys it has seen. Lane l = 4 g + c holds
// heads 2c and 2c + 1 of every 8 in all accumulators; rows g and g + 8 of every 16 are keys in S^T, head_dim in O^T.
template <class Config>
struct WarpState {
  using Tile = DecodeTile<Config>;
  using Smem = DecodeSmem<Config>;
  using Q = typename Tile::Q;
  using Kv = typename Tile::Kv;
  using Mma = typename Tile::Mma;
  using Codec = typename Tile::Codec;
  using S = Score<Config>;
  static constexpr int kRopePairs = S::kHasRope ? Tile::kQkSteps / 2 : 1;

  const DecodeParams& params;
  const HeadBlock& heads;
  const float scale = S::scale_log2(params);
  const int lane_idx = threadIdx.x % kWarpSize, group = lane_idx / 4, column = lane_idx % 4;
  uint32_t q_rmem[Tile::kHeadTiles][Tile::kQkSteps][2];
  float out_rmem[Tile::kHeadTiles][Tile::kVoTiles][4];
  float max_rmem[Tile::kHeadTiles][2], sum_rmem[Tile::kHeadTiles][2];
  float slope_rmem[Tile::kHeadTiles][2];

  __device__ __forceinline__ WarpState(const DecodeParams& params, const HeadBlock& heads)
      : params(params), heads(heads) {
#pragma unroll
    for (int t = 0; t < Tile::kHeadTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int head = min(t * kMmaHeads + 2 * column + j, heads.num_heads - 1);
        slope_rmem[t][j] = S::alibi_slope(params, heads.first_head + head);
      }
    }
  }

  // The element of head_dim at which register `half` of step `step` of a q or k fragment starts. The order of a sum is
  // free: with packed keys it follows the bytes as ldmatrix deals them out, four consecutive ones to a lane.
  __device__ __forceinline__ int element_of(int step, int half) const {
    return step * 16 + (Tile::kIsPacked ? column * 4 + half * 2 : column * 2 + half * 8);
  }

  // Before the first tile, not with it: so the compiler sees that these registers hold nothing while a request is
  // merged.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < Tile::kHeadTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        max_rmem[t][j] = kMinusInfinity;
        sum_rmem[t][j] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < 4 * Tile::kVoTiles; ++i) out_rmem[t][i / 4][i % 4] = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kQkSteps; ++i) q_rmem[t][i / 2][i % 2] = 0;  // overwritten by take_query
    }
  }

  // From the stage of a request's first tile.
  __device__ __forceinline__ void take_query(const typename Smem::Stage& stage, int32_t kv_len) {
    using Rows = SwizzledRows<Tile::kDimQk * sizeof(Q)>;
    const char* q_smem = reinterpret_cast<const char*>(stage.q);
#pragma unroll
    for (int t = 0; t < Tile::kHeadTiles; ++t) {
      const auto load = [&](int element) {
        const int byte = element * int(sizeof(Q));
        return *reinterpret_cast<const uint32_t*>(q_smem + Rows::offset(t * kMmaHeads + group, byte / 16) + byte % 16);
      };
#pragma unroll
      for (int step = 0; step < Tile::kQkSteps; ++step) {
        if constexpr (Tile::kIsQueryPacked) {
          const uint32_t x = load(element_of(step, 0));
          q_rmem[t][step][0] = Tile::QCodec::pair(x, kBytes01);
          q_rmem[t][step][1] = Tile::QCodec::pair(x, kBytes23);
        } else {
          q_rmem[t][step][0] = Tile::QCodec::pair(load(element_of(step, 0)));
          q_rmem[t][step][1] = Tile::QCodec::pair(load(element_of(step, 1)));
        }
      }
      if constexpr (S::kHasRope) rotate_query(q_rmem[t], kv_len - 1);
    }
  }

  // Keys [first_row, first_row + kWarpRows) of a request of kv_len keys.
  __device__ __forceinline__ void attend(const typename Smem::Stage& stage, int32_t request_idx, int32_t first_row,
                                         int32_t kv_len) {
    const TileRows rows = {{heads.first_head, heads.first_head + heads.num_heads - 1}, {kv_len - 1, kv_len - 1}};
    // The tile is here already; a look at entries would keep it waiting.
    const Seen seen =
        visibility_of<Config>(params, request_idx).template sees_tile<false>(rows, first_row, Tile::kWarpRows);
    if (seen == kSeesNone) return;
    float scores[Tile::kRowTiles][Tile::kHeadTiles][4];
    multiply_qk(stage.k, first_row, scores);
    mask(scores, request_idx, first_row, kv_len, seen);
    uint32_t weights[Tile::kRowTiles][Tile::kHeadTiles][2];
    softmax(scores, weights);
    multiply_pv(stage.v, weights);
  }

  // The sums are kept apart by lane until here.
  __device__ __forceinline__ void finish_request() {
#pragma unroll
    for (int i = 0; i < 2 * Tile::kHeadTiles; ++i) {
      float& sum = sum_rmem[i / 2][i % 2];
      sum = reduce_over_rows(sum, Sum{});
    }
  }

  // Element of head_dim in row `half` (0: g, 1: g + 8) of tile `tile` of O^T. Packed values come out of ldmatrix in
  // pairs.
  __device__ __forceinline__ int out_element(int tile, int half) const {
    return tile * kMmaRows + (Tile::kIsPacked ? 2 * group + half : group + 8 * half);
  }

 private:
  template <class Op>
  __device__ __forceinline__ static float reduce_over_rows(float x, Op op) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
  }

  __device__ __forceinline__ void multiply_qk(const Kv* k_smem, int32_t first_row,
                                              float (&scores)[Tile::kRowTiles][Tile::kHeadTiles][4]) {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
      uint32_t k_rmem[Tile::kQkSteps][4];
      load_keys(k_smem, r, k_rmem);
      if constexpr (S::kHasRope) {
        const int32_t position = first_row + r * kMmaRows + group;
        rotate_keys(k_rmem, position);
      }
#pragma unroll
      for (int t = 0; t < Tile::kHeadTiles; ++t) {
        float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};  // two chains: half the latency
#pragma unroll
        for (int step = 0; step < Tile::kQkSteps; step += 2) {
          mma_m16n8k16<Mma>(even, k_rmem[step], q_rmem[t][step][0], q_rmem[t][step][1]);
          mma_m16n8k16<Mma>(odd, k_rmem[step + 1], q_rmem[t][step + 1][0], q_rmem[t][step + 1][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][t][i] = even[i] + odd[i];
      }
    }
  }

  __device__ __forceinline__ void load_keys(const Kv* k_smem, int row_tile, uint32_t (&k_rmem)[Tile::kQkSteps][4]) {
    using Rows = SwizzledRows<Tile::kDimQk * sizeof(Kv)>;
    // Matrices of an ldmatrix.x4: rows 0-7 and 8-15 of one granule, then of the next.
    const int row = row_tile * kMmaRows + lane_idx % 16, granule = lane_idx / 16;
    const uint32_t base = smem_address(k_smem);
#pragma unroll
    for (int i = 0; i < Rows::kNumGranules / 2; ++i) {
      uint32_t regs[4];
      ldmatrix_x4(regs, base + Rows::offset(row, 2 * i + granule));
      if constexpr (Tile::kIsPacked) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // a granule is 16 elements: one step
          k_rmem[2 * i + j / 2][j % 2] = Codec::pair(regs[j], kBytes01);
          k_rmem[2 * i + j / 2][j % 2 + 2] = Codec::pair(regs[j], kBytes23);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) k_rmem[i][j] = Codec::pair(regs[j]);
      }
    }
  }

  __device__ __forceinline__ void mask(float (&scores)[Tile::kRowTiles][Tile::kHeadTiles][4], int32_t request_idx,
                                       int32_t first_row, int32_t kv_len, Seen seen) const {
    const int32_t position = kv_len - 1;
    const auto visibility = visibility_of<Config>(params, request_idx);
    const Range keys = visibility.keys_of(position, kv_len);
    const Range gap = visibility.gap_of(position, kv_len);
    if (S::kIsPlain && seen == kSeesAll && visibility.contains_all(keys, first_row, Tile::kWarpRows, gap)) return;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
      const int32_t kv_idx = first_row + i / 2 * kMmaRows + i % 2 * 8 + group;
      const bool is_inside = visibility.contains(keys, kv_idx) && !visibility.is_in_gap(gap, kv_idx);
#pragma unroll
      for (int j = 0; j < 2 * Tile::kHeadTiles; ++j) {
        const int32_t head = heads.first_head + min(j / 2 * kMmaHeads + 2 * column + j % 2, heads.num_heads - 1);
        const bool visible = is_inside && visibility.sees(head, position, kv_idx);
        float& score = at(scores[i / 2], i % 2, j);
        score = visible ? S::transform(params, score, slope_rmem[j / 2][j % 2], {request_idx, head, position, kv_idx})
                        : kMinusInfinity;
      }
    }
  }

  __device__ __forceinline__ void softmax(const float (&scores)[Tile::kRowTiles][Tile::kHeadTiles][4],
                                          uint32_t (&weights)[Tile::kRowTiles][Tile::kHeadTiles][2]) {
#pragma unroll
    for (int t = 0; t < Tile::kHeadTiles; ++t) {
      float shift[2], decay[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float tile_max = kMinusInfinity;
#pragma unroll
        for (int r = 0; r < Tile::kRowTiles; ++r)
          tile_max = fmaxf(tile_max, fmaxf(scores[r][t][j], scores[r][t][j + 2]));
        const float new_max = fmaxf(max_rmem[t][j], reduce_over_rows(tile_max, Max{}));
        shift[j] = new_max == kMinusInfinity ? 0.f : new_max * scale;  // nothing visible yet: exp2(-inf - 0) = 0
        decay[j] = fast_exp2(max_rmem[t][j] * scale - shift[j]);
        max_rmem[t][j] = new_max;
        sum_rmem[t][j] *= decay[j];
      }
#pragma unroll
      for (int r = 0; r < Tile::kRowTiles; ++r) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = fast_exp2(fmaf(scores[r][t][i], scale, -shift[i % 2]));
        sum_rmem[t][0] += p[0] + p[2];
        sum_rmem[t][1] += p[1] + p[3];
        weights[r][t][0] = transpose_8x8(pack_16bit<Mma>(p[0], p[1]));
        weights[r][t][1] = transpose_8x8(pack_16bit<Mma>(p[2], p[3]));
      }
#pragma unroll
      for (int i = 0; i < 4 * Tile::kVoTiles; ++i) out_rmem[t][i / 4][i % 4] *= decay[i % 2];
    }
  }

  __device__ __forceinline__ void multiply_pv(const Kv* v_smem,
                                              const uint32_t (&weights)[Tile::kRowTiles][Tile::kHeadTiles][2]) {
    using Rows = SwizzledRows<Tile::kDimVo * sizeof(Kv)>;
    constexpr int kTilesPerLoad = Tile::kIsPacked ? 2 : 1;
    const uint32_t base = smem_address(v_smem);
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
      for (int d = 0; d < Tile::kVoTiles; d += kTilesPerLoad) {
        uint32_t regs[4], v_rmem[kTilesPerLoad][4];
        if constexpr (Tile::kIsPacked) {
          // Matrices: keys 0-7 and 8-15 of one granule (16 elements: one tile), then of the next.
          const int row = r * kMmaRows + lane_idx % 16;
          ldmatrix_x4_trans(regs, base + Rows::offset(row, d + lane_idx / 16));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            v_rmem[j / 2][j % 2 * 2] = Codec::pair(regs[j], kBytes02);
            v_rmem[j / 2][j % 2 * 2 + 1] = Codec::pair(regs[j], kBytes13);
          }
        } else {
          // Matrices: both granules of a tile at keys 0-7, then at keys 8-15.
          const int row = r * kMmaRows + lane_idx % 8 + lane_idx / 16 * 8;
          ldmatrix_x4_trans(regs, base + Rows::offset(row, 2 * d + lane_idx / 8 % 2));
#pragma unroll
          for (int j = 0; j < 4; ++j) v_rmem[0][j] = Codec::pair(regs[j]);
        }
#pragma unroll
        for (int i = 0; i < kTilesPerLoad * Tile::kHeadTiles; ++i) {
          const int sub = i / Tile::kHeadTiles, t = i % Tile::kHeadTiles;
          mma_m16n8k16<Mma>(out_rmem[t][d + sub], v_rmem[sub], weights[r][t][0], weights[r][t][1]);
        }
      }
    }
  }

  // Rotation pairs elements head_dim / 2 apart: the same register of steps kQkSteps / 2 apart.
  __device__ __forceinline__ static void rotate_pair(uint32_t& low, uint32_t& high, const FrequencyPair& frequencies,
                                                     int32_t position) {
    const float2 x = unpack_16bit<Mma>(low), y = unpack_16bit<Mma>(high);
    const CosSin a = rotary_cos_sin(position, frequencies.first), b = rotary_cos_sin(position, frequencies.second);
    low = pack_16bit<Mma>(x.x * a.cos - y.x * a.sin, x.y * b.cos - y.y * b.sin);
    high = pack_16bit<Mma>(y.x * a.cos + x.x * a.sin, y.y * b.cos + x.y * b.sin);
  }

  __device__ __forceinline__ void rotate_query(uint32_t (&q)[Tile::kQkSteps][2], int32_t position) {
#pragma unroll
    for (int step = 0; step < kRopePairs; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const FrequencyPair frequencies = load_frequencies(params.rope_frequencies + element_of(step, half));
        rotate_pair(q[step][half], q[step + kRopePairs][half], frequencies, position);
      }
    }
  }

  __device__ __forceinline__ void rotate_keys(uint32_t (&k)[Tile::kQkSteps][4], int32_t position) {
#pragma unroll
    for (int step = 0; step < kRopePairs; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // registers 2 and 3
        const FrequencyPair frequencies = load_frequencies(params.rope_frequencies + element_of(step, half));
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // register 1, or 3, holds the row 8 further
          const int word = 2 * half + i;
          rotate_pair(k[step][word], k[step + kRopePairs][word], frequencies, position + i * 8);
        }
      }
    }
  }
};

}  // namespace flashinfer
