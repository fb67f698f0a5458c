// SPDX-License-Identifier: Apache-2.0
// How latent attention on Hopper brings in a cache of fp8: by all warps of the producers' warpgroup, which widen it to
// what is multiplied.
#pragma once

#include "attention/sm90/mla/gather.cuh"
#include "device/kv_codec.cuh"

namespace flashinfer::sm90::mla {

// A half of the keys comes in as it is, at the end of its own place, and is widened from there. A thread widens what it
// has copied: 16 bytes of every 128 of its rows. What the first part of ckv becomes lies before all that comes in; the
// second overwrites ckv, and kpe both, unless it comes in as it is multiplied.
//
// The halves are sent for together, so that the second comes in while the first is widened.
template <class Config>
struct KvWidener {
  using Shape = mla::Shape<Config>;
  using Gatherer = KvGatherer<Config>;
  using Rows = typename Gatherer::Rows;
  using T = typename Shape::T;
  using Kv = typename Config::Kv;
  using Codec = KvCodec<fp16, Kv>;
  static_assert(Codec::kPerRegister == 4 && (Shape::kHasScales || kSameType<T, fp16>));
  static constexpr bool kWidensKpe = Config::kHeadDimKpe > 0 && !Shape::kHasScales;
  using KpeLanes = RowLanes<Kv, kWidensKpe ? Config::kHeadDimKpe : 64>;
  static constexpr int kRowsOfLane = LaneOfRows::kNumRows;
  static constexpr int kBlocksOfPart = Shape::kNumColumns / 128;  // of columns, of the scales if there are any
  static constexpr int kVecsOfPart = kRowsOfLane * kBlocksOfPart, kVecsOfKpe = kWidensKpe ? 16 / KpeLanes::kNumRows : 0,
                       kNumVecs = 2 * kVecsOfPart + kVecsOfKpe, kVecsBytes = kWarpgroupSize * 16,
                       kCkvSize = Shape::kCkvPanels * Shape::kPanelSize,
                       kRawOffset = kCkvSize + (kWidensKpe ? Shape::kPanelSize : 0) - kNumVecs * kVecsBytes;
  static_assert(kRawOffset >= Shape::kPanelsOfHalf * Shape::kPanelSize);
  static_assert(kRawOffset + 2 * kVecsOfPart * kVecsBytes >= kCkvSize || !kWidensKpe);

  const Sm90MlaParams& params;
  Smem<Config>& smem;
  int warp_idx;

  // The tiles of a unit, from the last to the first; kv_turn counts on.
  __device__ __forceinline__ void run(const PrefillItem& item, uint32_t& kv_turn) const {
    const Gatherer gatherer = this->gatherer();
    KvRow found = gatherer.look_up(item, item.tile_end - 1);
    for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile, ++kv_turn) {
      const Rows rows = gatherer.rows_of(found, item, tile);
      found = gatherer.look_up(item, tile - 1);
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys) {
        smem.kv_empty[keys][0].wait_empty(kv_turn);
        smem.kv_empty[keys][1].wait_empty(kv_turn);
        copy(rows, keys, kv_turn);
        cp_async_commit();
      }
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys) {
        if (keys == 0) {
          cp_async_wait<1>();
        } else {
          cp_async_wait<0>();
        }
        __syncwarp();  // scales are other lanes' copies
        widen(keys, kv_turn);
      }
    }
  }

 private:
  __device__ __forceinline__ Gatherer gatherer() const { return {params, smem, warp_idx}; }
  __device__ __forceinline__ uint32_t keys_smem(int keys, uint32_t turn) const {
    return smem_address(smem.kv[turn % Shape::kNumStages][keys]);
  }
  // Of this thread; the others are kVecsBytes apart.
  __device__ __forceinline__ uint32_t first_vec_smem(int keys, uint32_t turn) const {
    return keys_smem(keys, turn) + kRawOffset + fresh_thread_idx() % kWarpgroupSize * 16;
  }
  __device__ __forceinline__ uint32_t scales_smem(int keys, int row) const {
    return smem_address(smem.scales[keys][16 * warp_idx + row]);
  }

  __device__ __forceinline__ void copy(const Rows& rows, int keys, uint32_t turn) const {
    const LaneOfRows lane;
    const uint32_t vec_smem = first_vec_smem(keys, turn);
    const int num_valid = rows.num_valid - keys * Shape::kNumKeys;
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const uint8_t* row_gmem = lane.find(params.kv.ckv, rows.ckv_offset, keys, i);
      const bool exists = lane.row + i * LaneOfRows::kStep < num_valid;
#pragma unroll
      for (int block = 0; block < 2 * kBlocksOfPart; ++block) {
        const int vec = block / kBlocksOfPart * kVecsOfPart + i * kBlocksOfPart + block % kBlocksOfPart;
        cp_async_16(vec_smem + vec * kVecsBytes, row_gmem + block * 128, exists);
      }
      if constexpr (Shape::kHasScales) {
        if (lane.granule == 0) {
          cp_async_16(scales_smem(keys, lane.row + i * LaneOfRows::kStep), row_gmem + Config::kHeadDimCkv, exists);
        }
      }
    }
    if constexpr (kWidensKpe) {
      const KpeLanes lanes;
#pragma unroll
      for (int i = 0; i < kVecsOfKpe; ++i) {
        const int row = lanes.row + i * KpeLanes::kNumRows;
        const uint8_t* row_gmem = static_cast<const uint8_t*>(params.kv.kpe) +
                                  __shfl_sync(0xffffffffu, rows.kpe_offset, keys * 16 + row) + lanes.granule * 16;
        cp_async_16(vec_smem + (2 * kVecsOfPart + i) * kVecsBytes, row_gmem, row < num_valid);
      }
    } else if constexpr (Shape::kPePanels > 0) {
      gatherer().copy_kpe(keys, turn, rows);
    }
  }

  __device__ __forceinline__ void widen(int keys, uint32_t turn) const {
    const uint32_t vec_smem = first_vec_smem(keys, turn), panels_smem = keys_smem(keys, turn);
    const auto await_all = [] {
      named_barrier_sync(kWidened, kWarpgroupSize);
    };  // before what they read is overwritten
    uint4 part[kVecsOfPart];
    load(vec_smem, part);
    store_part<0>(panels_smem, part, keys);
    smem.kv_full[keys][0].at(turn).arrive();
    load(vec_smem + kVecsOfPart * kVecsBytes, part);
    await_all();
    store_part<1>(panels_smem, part, keys);
    smem.kv_full[keys][1].at(turn).arrive();
    if constexpr (kWidensKpe) {
      uint4 kpe[kVecsOfKpe];
      load(vec_smem + 2 * kVecsOfPart * kVecsBytes, kpe);
      await_all();
      store_kpe(panels_smem + kCkvSize, kpe);
    }
    if constexpr (Shape::kPePanels > 0) smem.kv_full[keys][kPositional].at(turn).arrive();
  }
  template <int kNum>
  __device__ __forceinline__ static void load(uint32_t vec_smem, uint4 (&vecs)[kNum]) {
#pragma unroll
    for (int i = 0; i < kNum; ++i) vecs[i] = load_shared_16(vec_smem + i * kVecsBytes);
  }

  // Two granules of a row for each vector. Lanes begin with the first or the second, so that those of two panels are in
  // other banks.
  template <int kPart>
  __device__ __forceinline__ void store_part(uint32_t panels_smem, const uint4 (&vecs)[kVecsOfPart], int keys) const {
    const LaneOfRows lane;
    const bool is_second_first = lane.granule / 4 % 2;
    const uint32_t lane_smem =
        panels_smem + kPart * Shape::kPanelsOfHalf * Shape::kPanelSize +
        granule_offset(16 * warp_idx + lane.row, 2 * lane.granule + is_second_first, Shape::kNumKeys);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const uint32_t row_smem = LaneOfRows::panel_row(lane_smem, i);
#pragma unroll
      for (int block = 0; block < kBlocksOfPart; ++block) {
        float scale = 1.f;
        if constexpr (Shape::kHasScales) {
          asm volatile(
              "ld.shared.f32 %0, [%1];"
              : "=f"(scale)
              : "r"(scales_smem(keys, lane.row + i * LaneOfRows::kStep) + (kPart * kBlocksOfPart + block) * 4));
        }
        put_vec(row_smem + block * 2 * Shape::kPanelSize, vecs[i * kBlocksOfPart + block], is_second_first, scale);
      }
    }
  }
  template <int kNum>
  __device__ __forceinline__ void store_kpe(uint32_t panel_smem, const uint4 (&vecs)[kNum]) const {
    const KpeLanes lanes;
    const uint32_t lane_smem = panel_smem + granule_offset(16 * warp_idx + lanes.row, 2 * lanes.granule, 64);
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const int row = i * KpeLanes::kNumRows;
      put_vec((lane_smem ^ (row % 8 << 4)) + row * kPanelBytes, vecs[i], false, 1.f);
    }
  }
  __device__ __forceinline__ static void put_vec(uint32_t granule_smem, const uint4& vec, bool is_second_first,
                                                 float scale) {
    const auto put = [scale](uint32_t granule_smem, uint32_t x, uint32_t y) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(granule_smem), "r"(pair(x, kBytes01, scale)),
                   "r"(pair(x, kBytes23, scale)), "r"(pair(y, kBytes01, scale)), "r"(pair(y, kBytes23, scale))
                   : "memory");
    };
    put(granule_smem, is_second_first ? vec.z : vec.x, is_second_first ? vec.w : vec.y);
    put(granule_smem ^ 16, is_second_first ? vec.x : vec.z, is_second_first ? vec.y : vec.w);
  }
  // Scaled in fp32, since a scale may be of any magnitude.
  __device__ __forceinline__ static uint32_t pair(uint32_t x, BytePair bytes, float scale) {
    const uint32_t wide = Codec::pair(x, bytes);
    if constexpr (!Shape::kHasScales) return wide;
    const float2 values = unpack_16bit<fp16>(wide);
    return pack_16bit<T>(values.x * scale, values.y * scale);
  }
};

// Queries in the type that is multiplied, in place. By both consumers.
template <class Config>
__device__ __forceinline__ void cast_queries(Smem<Config>& smem) {
  using Shape = mla::Shape<Config>;
  using T = typename Shape::T;
  using Q = typename Config::Q;
  if constexpr (!kSameType<T, Q>) {
    uint4* vecs = reinterpret_cast<uint4*>(smem.q);
#pragma unroll 2
    for (int i = fresh_thread_idx(); i < int(sizeof(smem.q) / 16); i += Shape::kNumConsumerThreads) {
      const uint4 x = vecs[i];
      vecs[i] = uint4{cast_16bit<T, Q>(x.x), cast_16bit<T, Q>(x.y), cast_16bit<T, Q>(x.z), cast_16bit<T, Q>(x.w)};
    }
    fence_async_proxy();
    named_barrier_sync(kBothConsumers, Shape::kNumConsumerThreads);
  }
}

}  // namespace flashinfer::sm90::mla
