// SPDX-License-Identifier: Apache-2.0
// Which tiles of KV the function of a caller is proved to hide from all of a unit, or to leave alone, on Hopper.
// Whoever fetches units proves their tiles as well, ahead of all others, so that nobody waits for a proof, and there is
// one copy of the code. Tiles that are hidden are left out by all roles.
#pragma once

#include "attention/sm90/tile.cuh"

namespace flashinfer::sm90 {

// A tile of a unit, of which it is remembered what was found of entries by its keys: other units have the same keys.
template <class Config>
struct RememberingTileAt : TileAt {
  Smem<Config>& smem;
  int tile;  // those that lanes prove at once follow each other, and do not share a place

  template <int kLook, class Find>
  __device__ __forceinline__ auto of_keys(const Find& find) const {
    using Found = decltype(find());
    if constexpr (Config::kNumRemembered == 0) {
      return find();
    } else {
      auto& place = smem.proofs.remembered[kLook][uint32_t(request_idx * 61 + tile) % Config::kNumRemembered];
      Found found;
      auto& [a, b] = found;
      if (place.request_idx == request_idx && place.first_key == keys.first) {
        a = place.a, b = place.b;
      } else {
        found = find();
        place = {request_idx, keys.first, a, b};
      }
      return found;
    }
  }
};

// By a warp, ahead of all proofs.
template <class Config>
__device__ __forceinline__ void forget_entries(Smem<Config>& smem) {
  for (auto& places : smem.proofs.remembered) {
    for (int i = fresh_thread_idx() % 32; i < Config::kNumRemembered; i += 32) places[i].request_idx = -1;
  }
}

// Of the turn-th unit, by the warp that fetched it, whose lanes prove 32 tiles at once. Whether it exists.
template <class Config>
__device__ __forceinline__ bool prove_tiles(const Sm90PrefillParams& params, Smem<Config>& smem, uint32_t turn) {
  using Shape = sm90::Shape<Config>;
  const int slot = turn % kNumWorkSlots;
  Work& work = smem.work[slot];
  if (work.is_end) return false;
  PrefillItem& item = work.item;
  const auto gap = smem.gap_of(turn);
  const auto visibility = visibility_of<Config>(params, item.request_idx);
  const int32_t group_size = smem.group_size.divisor, first_head = work.kv_head_idx * group_size;
  const int32_t first_row = item.q_tile * Shape::kBlockM, num_rows = work.num_rows(group_size, Shape::kBlockM);
  const auto position_of_row = [&](int row) {
    return position_of(int32_t(smem.group_size.divide(row)), item.qo_len, item.kv_len);
  };
  const TileRows rows = {{first_head, first_head + group_size - 1},
                         {position_of_row(first_row), position_of_row(first_row + num_rows - 1)}};
  smem.proofs.range[slot] =
      visibility.tiles_seen_whole(rows.queries.first, rows.queries.last, item.kv_len, Shape::kBlockN);
  const int32_t tile_begin = item.tile_begin, num_all = item.tile_end - tile_begin;
  const int num_tiles = min(num_all, smem.proofs.kMaxTiles);
  int begin = num_tiles, end = 0;  // of those that are not hidden
#pragma unroll 1
  for (int first = 0; first < num_tiles; first += 32) {
    const int idx = first + int(fresh_thread_idx() % 32);
    const int key_tile = gap.key_tile(tile_begin + idx);
    Seen seen = kSeesNone;
    if (idx < num_tiles) {
      const TileAt at = visibility.tile_at(rows, key_tile * Shape::kBlockN, Shape::kBlockN);
      seen = Config::Function::sees_tile(params.extras, RememberingTileAt<Config>{at, smem, tile_begin + idx});
    }
    const uint32_t some = __ballot_sync(0xffffffffu, seen != kSeesNone);
    smem.proofs.some[slot][first / 32] = some;
    smem.proofs.all[slot][first / 32] = __ballot_sync(0xffffffffu, seen == kSeesAll);
    if (some == 0) continue;
    begin = min(begin, first + __ffs(some) - 1);
    end = first + 32 - __clz(some);
  }
  if (fresh_thread_idx() % 32 == 0) {
    smem.proofs.first_tile[slot] = tile_begin;
    item.tile_begin = tile_begin + begin;
    if (num_tiles == num_all) item.tile_end = tile_begin + end;
  }
  return true;
}

}  // namespace flashinfer::sm90
