// SPDX-License-Identifier: Apache-2.0
// Which tiles of KV the function of a caller is proved to hide from all of a unit, or to leave alone, on Hopper.
// Whoever fetches units proves their tiles as well, ahead of all others, so that nobody waits for a proof, and there is
// one copy of the code. Tiles that are hidden are left out by all roles; but the last and the first of a unit are
// always there.
#pragma once

#include "attention/sm90/tile.cuh"

namespace flashinfer::sm90 {

// Of the turn-th unit, by the warp that fetched it, whose lanes prove 32 tiles at once. Whether it exists.
template <class Config>
__device__ __forceinline__ bool prove_tiles(const Sm90PrefillParams& params, Smem<Config>& smem, uint32_t turn) {
  using Shape = sm90::Shape<Config>;
  const int slot = turn % kNumWorkSlots;
  const Work& work = smem.work[slot];
  if (work.is_end) return false;
  const PrefillItem& item = work.item;
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
  const int num_tiles = min(item.tile_end - item.tile_begin, smem.proofs.kMaxTiles);
#pragma unroll 1
  for (int first = 0; first < num_tiles; first += 32) {
    const int idx = first + int(fresh_thread_idx() % 32);
    const int key_tile = gap.key_tile(item.tile_begin + min(idx, num_tiles - 1));
    const Seen seen = visibility.sees_tile(rows, key_tile * Shape::kBlockN, Shape::kBlockN);
    smem.proofs.some[slot][first / 32] = __ballot_sync(0xffffffffu, seen != kSeesNone || idx == 0);
    smem.proofs.all[slot][first / 32] = __ballot_sync(0xffffffffu, seen == kSeesAll);
  }
  return true;
}

}  // namespace flashinfer::sm90
