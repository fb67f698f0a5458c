// How latent attention on Hopper brings in a cache of fp8: by all warps of the producers' warpgroup, which widen it to
// what is multiplied.
#pragma once

#include "attention/sm90/mla/gather.cuh"
#include "device/kv_codec.cuh"

namespace flashinfer::sm90::mla {

// A half of the keys comes in as it is, at the end of its own place, and is widened from there. A thread widens what it
// has copied: 16 bytes of each of its rows, of the two parts of ckv and of kpe. What the first part becomes lies before
// all that comes in; the second overwrites ckv, and kpe both.
template <class Config>
struct KvWidener {
  using Shape = mla::Shape<Config>;
  using T = typename Shape::T;
  using Kv = typename Config::Kv;
  using Codec = KvCodec<T, Kv>;
  static_assert(Codec::kPerRegister == 4);
  static constexpr bool kHasKpe = Config::kHeadDimKpe > 0;
  using CkvLanes = RowLanes<Kv, Shape::kNumColumns>;
  using KpeLanes = RowLanes<Kv, kHasKpe ? Config::kHeadDimKpe : 64>;
  static_assert(CkvLanes::kGranulesPerRow == CkvLanes::kLanesPerRow);
  static constexpr int kVecsOfPart = 16 / CkvLanes::kNumRows, kVecsOfKpe = kHasKpe ? 16 / KpeLanes::kNumRows : 0,
                       kNumVecs = 2 * kVecsOfPart + kVecsOfKpe, kVecsBytes = kWarpgroupSize * 16,
                       kRawOffset = Shape::kPanels * Shape::kPanelSize - kNumVecs * kVecsBytes;
  static_assert(kRawOffset >= Shape::kPanelsOfHalf * Shape::kPanelSize);
  static_assert(kRawOffset + 2 * kVecsOfPart * kVecsBytes >= Shape::kCkvPanels * Shape::kPanelSize || !kHasKpe);

  const Sm90MlaParams& params;
  Smem<Config>& smem;
  int warp_idx;

  // The rows of a tile: in a lane one of them, as KvGatherer looks them up.
  struct Rows {
    int64_t ckv_offset, kpe_offset;
    int num_valid;  // from this warp's first on
  };
  __device__ __forceinline__ Rows rows_of(const KvRow& row, const PrefillItem& item, int tile) const {
    const LatentKvParams& kv = params.kv;
    return {row.page_idx * kv.ckv_page_stride + row.entry_idx * kv.ckv_entry_stride,
            row.page_idx * kv.kpe_page_stride + row.entry_idx * kv.kpe_entry_stride,
            item.kv_len - tile * Shape::kBlockN - 16 * warp_idx};
  }

  // The tiles of a unit, from the last to the first; kv_turn counts on.
  __device__ __forceinline__ void run(const PrefillItem& item, uint32_t& kv_turn) const {
    const KvGatherer<Config> gatherer{params, smem, warp_idx};
    KvRow found = gatherer.look_up(item, item.tile_end - 1);
    for (int tile = item.tile_end - 1; tile >= item.tile_begin; --tile, ++kv_turn) {
      const Rows rows = rows_of(found, item, tile);
      found = gatherer.look_up(item, tile - 1);
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys) {
        smem.kv_empty[keys][0].wait_empty(kv_turn);
        smem.kv_empty[keys][1].wait_empty(kv_turn);
        copy(rows, keys, kv_turn);
        cp_async_wait_all();
        widen(keys, kv_turn);
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t keys_smem(int keys, uint32_t turn) const {
    return smem_address(smem.kv[turn % Shape::kNumStages][keys]);
  }
  // Of this thread; the others are kVecsBytes apart.
  __device__ __forceinline__ uint32_t first_vec_smem(int keys, uint32_t turn) const {
    return keys_smem(keys, turn) + kRawOffset + fresh_thread_idx() % kWarpgroupSize * 16;
  }

  __device__ __forceinline__ void copy(const Rows& rows, int keys, uint32_t turn) const {
    const uint32_t vec_smem = first_vec_smem(keys, turn);
    const int num_valid = rows.num_valid - keys * Shape::kNumKeys;
    const Kv* ckv = static_cast<const Kv*>(params.kv.ckv);
    copy_part<CkvLanes>(vec_smem, ckv, rows.ckv_offset, keys, num_valid);
    copy_part<CkvLanes>(vec_smem + kVecsOfPart * kVecsBytes, ckv + Shape::kNumColumns, rows.ckv_offset, keys,
                        num_valid);
    if constexpr (kHasKpe) {
      copy_part<KpeLanes>(vec_smem + 2 * kVecsOfPart * kVecsBytes, static_cast<const Kv*>(params.kv.kpe),
                          rows.kpe_offset, keys, num_valid);
    }
  }
  template <class Lanes>
  __device__ __forceinline__ static void copy_part(uint32_t vec_smem, const Kv* part, int64_t offset, int keys,
                                                   int num_valid) {
    const Lanes lanes;
#pragma unroll
    for (int i = 0; i < 16 / Lanes::kNumRows; ++i) {
      const int row = lanes.row + i * Lanes::kNumRows;
      const Kv* row_gmem = part + __shfl_sync(0xffffffffu, offset, keys * 16 + row);
      cp_async_16(vec_smem + i * kVecsBytes, row_gmem + lanes.granule * 16, row < num_valid);
    }
  }

  __device__ __forceinline__ void widen(int keys, uint32_t turn) const {
    const uint32_t vec_smem = first_vec_smem(keys, turn), panels_smem = keys_smem(keys, turn);
    const auto await_all = [] {
      named_barrier_sync(kWidened, kWarpgroupSize);
    };  // before what they read is overwritten
    uint4 part[kVecsOfPart];
    load(vec_smem, part);
    store<CkvLanes>(panels_smem, part);
    smem.kv_full[keys][0].at(turn).arrive();
    load(vec_smem + kVecsOfPart * kVecsBytes, part);
    await_all();
    store<CkvLanes>(panels_smem + Shape::kPanelsOfHalf * Shape::kPanelSize, part);
    smem.kv_full[keys][1].at(turn).arrive();
    if constexpr (kHasKpe) {
      uint4 kpe[kVecsOfKpe];
      load(vec_smem + 2 * kVecsOfPart * kVecsBytes, kpe);
      await_all();
      store<KpeLanes>(panels_smem + Shape::kCkvPanels * Shape::kPanelSize, kpe);
      smem.kv_full[keys][kPositional].at(turn).arrive();
    }
  }
  template <int kNum>
  __device__ __forceinline__ static void load(uint32_t vec_smem, uint4 (&vecs)[kNum]) {
#pragma unroll
    for (int i = 0; i < kNum; ++i) vecs[i] = load_shared_16(vec_smem + i * kVecsBytes);
  }
  // Two granules of a row for each. Lanes begin with the first or the second, so that those of two panels are in other
  // banks.
  template <class Lanes, int kNum>
  __device__ __forceinline__ void store(uint32_t panels_smem, const uint4 (&vecs)[kNum]) const {
    const Lanes lanes;
    const bool is_second_first = lanes.granule / 4 % 2;
    const uint32_t lane_smem =
        panels_smem + granule_offset(16 * warp_idx + lanes.row, 2 * lanes.granule + is_second_first, 64);
    const auto put = [](uint32_t granule_smem, uint32_t x, uint32_t y) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(granule_smem), "r"(Codec::pair(x, kBytes01)),
                   "r"(Codec::pair(x, kBytes23)), "r"(Codec::pair(y, kBytes01)), "r"(Codec::pair(y, kBytes23))
                   : "memory");
    };
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const int row = i * Lanes::kNumRows;
      const uint32_t row_smem = (lane_smem ^ (row % 8 << 4)) + row * kPanelBytes;
      const uint4& vec = vecs[i];
      put(row_smem, is_second_first ? vec.z : vec.x, is_second_first ? vec.w : vec.y);
      put(row_smem ^ 16, is_second_first ? vec.x : vec.z, is_second_first ? vec.y : vec.w);
    }
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
