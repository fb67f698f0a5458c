// SPDX-License-Identifier: Apache-2.0
// The loop of latent attention over the KV tiles of a unit.
#pragma once

#include "attention/mla/load.cuh"
#include "device/fragment.cuh"

namespace flashinfer {

template <class Config>
struct MlaWalk {
  using Shape = MlaShape<Config>;
  using Split = MlaSplit<Config>;
  using Scores = float[Split::kNumFrags][4];
  using Owned = float[Split::kNumOwned][4];
  using Output = float[Shape::kFragsM][Shape::kFragsD][4];

  const MlaParams& params;
  MlaSmem<Config>& smem;
  float scale_log2;
  Output& out;                                      // the warp's columns, yet to be normalized
  float max[2] = {kMinusInfinity, kMinusInfinity};  // of the unscaled scores of this lane's two rows; lags behind
  float sum[2] = {0.f, 0.f};                        // of the keys it owns; this lane's share until the end
  float unit = Shape::kHasScales ? kMinUnit : 1.f;  // of the output: see raise_unit()

  __device__ __forceinline__ static int lane_idx() { return int(Shape::thread_idx() % 32); }
  __device__ __forceinline__ static Split split() { return Split::of(Shape::thread_idx() / 32); }
  // One of the two rows of which this lane owns scores.
  __device__ __forceinline__ static int row(int half) {
    return split().owned_row() + lane_row(lane_idx()) + row_of(half);
  }
  __device__ __forceinline__ static bool leads_row() { return lane_idx() % 4 == 0; }

  // From the last tile to the first. row_gmem: what load_first_tiles_async() has left.
  __device__ __forceinline__ void run(const uint8_t* row_gmem) {
    const auto loader = LatentKvLoader<Config>::of(params, smem);
    const int last_tile = smem.work.item.tile_end - 1, num_whole = num_keys_seen_by_all();
    MlaQueries<Config> queries;
    if constexpr (Shape::kKeepsQ || Shape::kPacksV) {
      uint8_t* q_smem = smem.queries(last_tile);
      cp_async_wait<Shape::kNumAhead - 1>();
      __syncthreads();
      if constexpr (Shape::kPacksV) {
        reorder_queries<Config>(q_smem);
        __syncthreads();
      }
      if constexpr (Shape::kKeepsQ) queries.keep(smem_address(q_smem), split());
    }
#pragma unroll 1
    for (int tile = last_tile; tile >= loader.tile_begin; --tile) {
      cp_async_wait<Shape::kNumAhead - 1>();
      __syncthreads();  // the tile is there for all, and all have left the one before, whose stage is filled next
      loader.load_async(tile - Shape::kNumAhead, row_gmem);
      const int32_t page_idx = loader.look_up(tile - Shape::kNumAhead - 1);
      const uint32_t stage_smem = smem_address(smem.stage(tile));
      Scores scores;
      const Split split = this->split();
      LatentScores<Config>{queries, smem_address(smem.q), stage_smem, split}.compute(scores);
      Owned owned;
      add_up(scores, owned);
      row_gmem = loader.find(tile - Shape::kNumAhead - 1, page_idx);
      if ((tile + 1) * Shape::kBlockN > num_whole) mask(owned, tile);
      publish_probabilities(owned);
      if constexpr (Shape::kHasScales) raise_unit(stage_smem + Shape::kScalesOffset);
      accumulate_latent_output<Config>(out, smem_address(smem.exchange), stage_smem, [&](auto& p, int step) {
        if constexpr (Shape::kHasScales) weigh(p, step, stage_smem + Shape::kScalesOffset);
      });
    }
  }

  // Values with scales stay as they are; probabilities are multiplied by the scales instead. For 16 bits to hold that,
  // scales, and so the output, are in units of a power of two: that of the largest scale of the warp's columns so far,
  // or less by up to kMaxRatio.
  static constexpr float kMinUnit = __builtin_bit_cast(float, 0x00800000u), kMaxRatio = 32.f;
  __device__ __forceinline__ static float inverse_of(float unit) {
    return __uint_as_float(0x7f000000u - __float_as_uint(unit));
  }
  __device__ __forceinline__ static int scale_block() { return Shape::thread_idx() / 32 * Shape::kNumColumns / 128; }

  __device__ __forceinline__ void raise_unit(uint32_t scales_smem) {
    float largest = 0.f;
#pragma unroll
    for (int key = 0; key < Shape::kBlockN; key += 32) {
      largest = fmaxf(largest, fabsf(load_scale(scales_smem, key + lane_idx(), scale_block())));
    }
    const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
    if (__uint_as_float(bits) < unit * kMaxRatio) return;
    const float new_unit = __uint_as_float(min(bits & 0x7f800000u, 0x7e800000u));
    const float factor = unit * inverse_of(new_unit);
    unit = new_unit;
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * Shape::kFragsD; ++i) out[m][i / 4][i % 4] *= factor;
    }
  }
  template <int kNum>
  __device__ __forceinline__ void weigh(uint32_t (&p)[kNum][4], int step, uint32_t scales_smem) const {
    const float factor = inverse_of(unit);
    uint32_t weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = step * 16 + i * 8 + lane_column(lane_idx());
      weights[i] = pack_16bit<fp16>(load_scale(scales_smem, key, scale_block()) * factor,
                                    load_scale(scales_smem, key + 1, scale_block()) * factor);
    }
#pragma unroll
    for (int m = 0; m < kNum; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(p[m][i]) : "r"(weights[i / 2]));
    }
  }

  // The group's parts of the scores become the whole of those that a warp owns.
  __device__ __forceinline__ void add_up(const Scores& scores, Owned& owned) const {
    constexpr int kNumOwned = Split::kNumOwned, kNumPassed = Split::kNumPassed, kOthers = Split::kWarpsK - 1;
    static_assert((Split::kWarpsK & kOthers) == 0);
    const Split split = this->split();
    const uint32_t lane_smem = smem_address(smem.exchange) + split.group() * Split::kGroupBytes + lane_idx() * 16;
    const auto slot = [](int owner, int i, int sender) {
      return ((owner * kNumPassed + i % kNumPassed) * kOthers + sender) * Split::kFragBytes;
    };
    const auto sync = [&] { named_barrier_sync(1 + split.group(), 32 * Split::kWarpsK); };
#pragma unroll
    for (int i = 0; i < kNumOwned; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = scores[i][j];
#pragma unroll
        for (int k = 1; k < Split::kNumOwners; ++k) {
          const float y = scores[k * kNumOwned + i][j];  // read anyway: else the choice becomes an index into memory
          x = split.k == k ? y : x;
        }
        owned[i][j] = x;
      }
    }
#pragma unroll
    for (int round = 0; round < Split::kNumRounds; ++round) {
#pragma unroll
      for (int owner = 0; owner < Split::kNumOwners; ++owner) {
        if (owner == split.k) continue;
        const int sender = (split.k - owner - 1) & kOthers;  // among those that are not the owner
#pragma unroll
        for (int i = round * kNumPassed; i < (round + 1) * kNumPassed; ++i) {
          store_shared_16(lane_smem + slot(owner, i, 0) + sender * Split::kFragBytes, scores[owner * kNumOwned + i]);
        }
      }
      sync();
      if (split.is_owner()) {
#pragma unroll
        for (int i = round * kNumPassed; i < (round + 1) * kNumPassed; ++i) {
#pragma unroll
          for (int sender = 0; sender < kOthers; ++sender) {
            const uint4 bits = load_shared_16(lane_smem + slot(split.k, i, sender));
            owned[i][0] += __uint_as_float(bits.x);
            owned[i][1] += __uint_as_float(bits.y);
            owned[i][2] += __uint_as_float(bits.z);
            owned[i][3] += __uint_as_float(bits.w);
          }
        }
      }
      // Then the place may be written again, at the end with probabilities.
      if (!Split::kPIsApart || round + 1 < Split::kNumRounds) sync();
    }
  }

  __device__ __forceinline__ static void store_shared_16(uint32_t address_smem, const float (&x)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address_smem), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
  }

  static constexpr Visibility kVisibility = {Config::kMask, false, 0};

  // Keys that all rows see: those of the first.
  __device__ __forceinline__ int num_keys_seen_by_all() const {
    const PrefillItem& item = smem.work.item;
    const int first_token = smem.group_size.divide(item.q_tile * Shape::kBlockM);
    return kVisibility.keys_of(position_of(first_token, item.qo_len, item.kv_len), item.kv_len).end;
  }

  // -inf where a query does not see a key.
  __device__ __forceinline__ void mask(Owned& owned, int tile) const {
    const PrefillUnit& work = smem.work;
    const PrefillItem& item = work.item;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = work.query_row(smem.group_size, item.q_tile * Shape::kBlockM + row(half));
      const Range keys = kVisibility.keys_of(work.position(query), item.kv_len);
      const int num_visible = keys.end - tile * Shape::kBlockN - split().owned_key() - lane_column(lane_idx());
#pragma unroll
      for (int i = 0; i < 2 * Split::kNumOwned; ++i) {
        if (column_of(i) >= num_visible) at(owned, half, i) = kMinusInfinity;
      }
    }
  }

  // Probabilities to where all warps find them: by the maximum known so far, or, where a row lags too far behind it, a
  // second time by the new one.
  __device__ __forceinline__ void publish_probabilities(const Owned& owned) {
    float tile_max[2], tile_sum[2];
    bool lags = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = at(owned, half, 0);
#pragma unroll
      for (int i = 1; i < 2 * Split::kNumOwned; ++i) x = fmaxf(x, at(owned, half, i));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      tile_max[half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      lags = lags || (split().is_owner() && (tile_max[half] - max[half]) * scale_log2 > kMaxLag);
    }
    exponentiate(owned, tile_sum);
    if (__syncthreads_or(lags)) {
      raise_max(tile_max);
      exponentiate(owned, tile_sum);
      __syncthreads();
    }
    sum[0] += tile_sum[0], sum[1] += tile_sum[1];
  }

  __device__ __forceinline__ void exponentiate(const Owned& owned, float (&tile_sum)[2]) const {
    using PRows = typename Split::PRows;
    tile_sum[0] = tile_sum[1] = 0.f;
    const Split split = this->split();
    if (!split.is_owner()) return;
    const int lane_idx = this->lane_idx(), first_row = split.owned_m() * 16 + lane_row(lane_idx);
    const uint32_t group_smem =
        smem_address(smem.exchange) + split.group() * Split::kGroupBytes + Split::kPOffset + lane_idx % 4 * 4;
    const uint32_t lane_smem = group_smem + PRows::offset(first_row, split.owned_n());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row that has seen no key yet: exp2(-inf - 0) is zero, not NaN.
      const float scaled_max = max[half] == kMinusInfinity ? 0.f : max[half] * scale_log2;
#pragma unroll
      for (int i = 0; i < Split::kNumOwned; ++i) {
        const float x = fast_exp2(fmaf(owned[i][2 * half], scale_log2, -scaled_max));
        const float y = fast_exp2(fmaf(owned[i][2 * half + 1], scale_log2, -scaled_max));
        tile_sum[half] += x + y;
        const uint32_t address_smem = PRows::advance(lane_smem, i) + row_of(half) * PRows::kNumBytes;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(address_smem), "r"(pack_16bit<typename Shape::T>(x, y))
                     : "memory");
      }
    }
  }

  // Raises the maximum of all rows to cover the tile, and rescales what was added up before.
  __device__ __forceinline__ void raise_max(const float (&tile_max)[2]) {
    share(tile_max);
    const int thread_idx = fresh_thread_idx();
    if (thread_idx < Shape::kBlockM) {
      const float old_max = smem.max_of_row[thread_idx];
      float new_max = old_max;
#pragma unroll
      for (int i = 0; i < Split::kNumParts; ++i) new_max = fmaxf(new_max, smem.stats[i * Shape::kBlockM + thread_idx]);
      smem.max_of_row[thread_idx] = new_max;
      smem.factor_of_row[thread_idx] = new_max == kMinusInfinity ? 1.f : fast_exp2((old_max - new_max) * scale_log2);
    }
    __syncthreads();
    if (split().is_owner()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max[half] = smem.max_of_row[row(half)];
        sum[half] *= smem.factor_of_row[row(half)];
      }
    }
    scale_output();
  }
  // What each warp knows of its keys, of a lane's two rows, to where it can be reduced over all keys.
  __device__ __forceinline__ void share(const float (&x)[2]) const {
    if (leads_row() && split().is_owner()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) smem.stats[split().part() * Shape::kBlockM + row(half)] = x[half];
    }
    __syncthreads();
  }
  // The largest magnitude of each row of the output, among those that other warps have found.
  __device__ __forceinline__ void find_largest() const {
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * Shape::kFragsD; ++i) largest = fmaxf(largest, fabsf(at(out[m], half, i)));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        if (leads_row()) {
          atomicMax(&smem.largest_of_row[m * 16 + row_of(half) + lane_row(lane_idx())],
                    __float_as_uint(largest * unit));
        }
      }
    }
  }
  __device__ __forceinline__ void scale_output() const {
#pragma unroll
    for (int m = 0; m < Shape::kFragsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = smem.factor_of_row[m * 16 + row_of(half) + lane_row(lane_idx())];
#pragma unroll
        for (int i = 0; i < 2 * Shape::kFragsD; ++i) at(out[m], half, i) *= factor;
      }
    }
  }
};

}  // namespace flashinfer
