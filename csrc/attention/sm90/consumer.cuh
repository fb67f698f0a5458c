// SPDX-License-Identifier: Apache-2.0
// The warpgroups of prefill on Hopper that compute: the units of work, 64 rows of each query tile.
#pragma once

#include "attention/sm90/output.cuh"
#include "attention/sm90/scheduler.cuh"
#include "attention/sm90/walk.cuh"
#include "attention/sm90/widen.cuh"

namespace flashinfer::sm90 {

template <class Config, class Shape = sm90::Shape<Config>>
__device__ __forceinline__ void consume(const Sm90PrefillParams& params, Smem<Config>& smem) {
  uint32_t kv_turn = 0;  // KV tiles so far
  TurnsAtTensorCores<Shape>::open();
  for_each_unit(smem, [&](const Work& work, uint32_t turn) {
    float out[Shape::kNumOutputs] = {};
    Softmax<Config> softmax;
    softmax.reset();
    smem.await(smem.q_full[consumer_idx()], turn);
    const bool has_tiles = work.item.tile_begin < work.item.tile_end;
    if (has_tiles) {
      if constexpr (Shape::kWidens) narrow_queries<Config>(smem, turn);
      TileWalk<Config>::of(params, smem, work, turn, out, softmax).run(kv_turn);
    }
    finish_unit<Config>(params, smem, work, turn, out, softmax);
    __syncwarp();
    if (!(Shape::kReleasesQueriesEarly && has_tiles) && elect_lane()) smem.q_empty[consumer_idx()].at(turn).arrive();
  });
  TurnsAtTensorCores<Shape>::close();
}

}  // namespace flashinfer::sm90
