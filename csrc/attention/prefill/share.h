// SPDX-License-Identifier: Apache-2.0
// How prefill and decode of a mixed batch share the SMs. Shared by the planner and a test on the host.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// When blocks that take units as they come, the longest first, have done all: near the average load of all units up to
// some, the shorter those the nearer, but not before as many rounds of them, since all before them are longer.
struct ListEnd {
  static constexpr float kShareOfLast = 0.35f;

  float num_blocks;
  float num_units, load, longest, time;

  FLASHINFER_FN static ListEnd of(int32_t num_blocks) { return {float(num_blocks), 0.f, 0.f, 0.f, 0.f}; }

  // `count` units that are no longer than those before.
  FLASHINFER_FN void take(float count, float cost) {
    if (num_units == 0.f) longest = cost;
    num_units += count;
    load += count * cost;
    const float num_rounds = float(int32_t((num_units + num_blocks - 1.f) / num_blocks));
    const float in_turn = load / num_blocks + kShareOfLast * cost, in_rounds = num_rounds * longest;
    const float lowest = num_rounds * cost, end = in_turn < in_rounds ? in_turn : in_rounds;
    if (end > time) time = end;
    if (lowest > time) time = lowest;
  }

  // Of fewer units than blocks, which are split as far as it pays.
  FLASHINFER_FN float time_in_splits(float cost_of_split) const {
    const float split = load / num_blocks + cost_of_split;
    return num_units < num_blocks && split < time ? split : time;
  }
};

// Prefill computes on the blocks that it keeps. Decode reads on the SMs that are left to it, and on all when prefill is
// over. Times are in KV tiles that a block of prefill computes.
//
// Of the SMs a block can read on so many (128 KB in flight on each), 20 of 132 read at 0.28 of the speed of memory, 48
// at half of it, 60 at 0.58, prefill beside them; and a request takes what half a tile does, to begin and to end (H200,
// docs/notes/2026-12-mixed-launches.md).
struct DeviceShare {
  static constexpr float kOfSms = 0.41f, kOfMemory = 0.83f;  // of the time to read: shared by SMs, and however many
  static constexpr float kRequestOfSms = 0.6f, kRequestAlone = 0.5f;
  static constexpr float kSlowdown = 1.05f;  // of prefill meanwhile, at most
  static constexpr float kWorthIt = 0.96f;   // of the time with all blocks: what gains less may be an error

  int32_t num_blocks;
  float read;      // KV tiles that decode reads, as long as they take at the speed of memory
  float requests;  // likewise, a tile for each request and KV head

  // Until both are over, where prefill keeps so many blocks and takes so long on them alone.
  FLASHINFER_FN float time_with(int32_t num_kept, float alone) const {
    const float decode = read + kRequestAlone * requests;
    if (num_kept == num_blocks) return kWorthIt * (alone + decode);
    const float sms = float(num_blocks - num_kept) / float(num_blocks), prefill = alone * kSlowdown;
    const float beside = (kOfSms * read + kRequestOfSms * requests) / sms + kOfMemory * read;
    return prefill < beside ? prefill + decode * (1.f - prefill / beside) : prefill;
  }
};

}  // namespace flashinfer
