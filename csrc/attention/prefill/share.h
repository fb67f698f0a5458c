// SPDX-License-Identifier: Apache-2.0
// How the two launches of a mixed batch share the SMs. Shared by the planner and a test on the host.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// Requests of many rows compute, and are over when the blocks that take them have done their share of all KV tiles.
// Requests of few rows read: all blocks together at the speed of memory, some at theirs, and while others compute at
// half of it at most. Times are those of a KV tile that a block computes. The numbers are of an H200, bf16 and head_dim
// 128 (docs/notes/2026-11-mixed-batches.md); they err to the side of all blocks, where the two are one behind the
// other.
struct DeviceShare {
  static constexpr float kTimeToRead = 1.1f;  // of a KV tile, divided by the rows of a tile that is computed
  static constexpr float kReaders = 0.76f;    // of all blocks, that would read at the speed of memory
  static constexpr float kMostOfMemory = 0.5f;
  static constexpr float kSlowdown = 1.2f;  // of what is computed meanwhile

  float load, longest, num_units;  // of all that is computed; the longest query tile; query tiles. Of all KV heads
  float num_read;                  // KV tiles that are read
  int32_t num_blocks, block_m;

  // Until both are over, where the first launch has so many blocks, and the second the others and later all.
  FLASHINFER_FN float time_with(int32_t num_first) const {
    const float blocks = float(num_first), read = num_read * kTimeToRead / float(block_m);
    const float num_rounds = float(int32_t((num_units + blocks - 1.f) / blocks));
    const float in_turn = load / blocks + longest, in_rounds = num_rounds * longest;
    const float alone = in_turn < in_rounds ? in_turn : in_rounds;
    if (num_first == num_blocks) return alone + read;
    const float speed = float(num_blocks - num_first) / (kReaders * float(num_blocks)), first = alone * kSlowdown;
    const float done = first * (speed < kMostOfMemory ? speed : kMostOfMemory);
    return done < read ? first + read - done : first;
  }
};

}  // namespace flashinfer
