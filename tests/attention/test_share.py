# SPDX-License-Identifier: Apache-2.0
"""csrc/attention/prefill/share.h: how many blocks prefill of a mixed batch keeps, by estimates of time."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashinfer import env
from flashinfer.jit.source import include_root

PROGRAM = r"""
#include "attention/prefill/share.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <queue>
#include <vector>

using namespace flashinfer;

// Costs of units, the longest first: of a request that is causal, of one behind a long prefix, of both.
static std::vector<float> units_of(int num_requests, int num_tiles, int prefix) {
  std::vector<float> costs;
  for (int tile = num_tiles; tile > 0; --tile) costs.insert(costs.end(), num_requests, float(prefix + tile) + 1.5f);
  return costs;
}

// Blocks take one after the other, whoever is free first.
static float played(const std::vector<float>& costs, int num_blocks) {
  std::priority_queue<float, std::vector<float>, std::greater<float>> free_at;
  for (int i = 0; i < num_blocks; ++i) free_at.push(0.f);
  float end = 0.f;
  for (float cost : costs) {
    const float done = free_at.top() + cost;
    free_at.pop(), free_at.push(done);
    end = std::max(end, done);
  }
  return end;
}

static float estimated(const std::vector<float>& costs, int num_blocks) {
  ListEnd end = ListEnd::of(num_blocks);
  for (float cost : costs) end.take(1.f, cost);
  return end.time;
}

static int best_of(const DeviceShare& share, const std::vector<float>& costs) {
  int best = share.num_blocks;
  for (int n = 1; n < share.num_blocks; ++n) {
    if (share.time_with(n, estimated(costs, n)) < share.time_with(best, estimated(costs, best))) best = n;
  }
  return best;
}

static bool holds(bool what, const char* name, float one, float other) {
  if (!what) std::printf("%s: %g, %g\n", name, one, other);
  return what;
}

int main() {
  bool is_right = true;
  for (int num_requests : {1, 8, 64, 300}) {
    for (int num_tiles : {1, 8, 60}) {
      for (int prefix : {0, 4, 128}) {
        const auto costs = units_of(num_requests, num_tiles, prefix);
        for (int num_blocks : {132, 100, 60, 1}) {
          const float end = estimated(costs, num_blocks), true_end = played(costs, num_blocks);
          is_right &= holds(end > 0.93f * true_end && end < 1.12f * true_end, "the end of a list", end, true_end);
        }
        for (float read = 0.f; read < 1e5f; read = read * 3.f + 8.f) {
          const DeviceShare share = {132, read, read / 8.f};
          const int best = best_of(share, costs);
          const float both = share.time_with(best, estimated(costs, best));
          const float alone = estimated(costs, 132);
          is_right &= holds(read > 0.f || best == 132, "nothing to read", float(best), read);
          is_right &= holds(both >= std::max(read, alone) * DeviceShare::kWorthIt, "faster than its parts", both, read);
        }
      }
    }
  }
  // 32 query heads on 8, tiles of 128 rows: 8 prompts of 1024 tokens beside 64 requests of 4096 keys, and 2 of 16384
  // beside 8 of 4096.
  const float time_to_read = 2 * 140.f / (2 * 128 * 132);
  std::vector<float> even, few;
  for (int tile = 8; tile > 0; --tile) even.insert(even.end(), 8 * 8 * 4, tile + 1.5f);
  for (int tile = 128; tile > 0; --tile) few.insert(few.end(), 2 * 8 * 4, tile + 1.5f);
  const int of_even = best_of({132, 64 * 32 * 8 * time_to_read, 64 * 8 * time_to_read}, even);
  const int of_few = best_of({132, 8 * 32 * 8 * time_to_read, 8 * 8 * time_to_read}, few);
  is_right &= holds(of_even >= 70 && of_even <= 95, "as much of both", of_even, 132);
  is_right &= holds(of_few >= 128, "little to read", of_few, 132);
  // 256 requests of 128 keys take 1.5 times as long as what they read, and beside 2048 tokens on few SMs too long.
  std::vector<float> prompt;
  for (int tile = 16; tile > 0; --tile) prompt.insert(prompt.end(), 8 * 4, tile + 1.5f);
  const int of_short = best_of({132, 256 * 8 * time_to_read, 256 * 8 * time_to_read}, prompt);
  is_right &= holds(of_short == 132, "short KV", of_short, 132);
  // 16 units are split where there are more blocks.
  ListEnd end = ListEnd::of(132);
  end.take(16.f, 34.5f);
  is_right &= holds(end.time_in_splits(6.5f) < 11.f && end.time == 34.5f, "splits", end.time_in_splits(6.5f), end.time);
  return !is_right;
}
"""


def test_estimates(tmp_path: Path) -> None:
    source, program = tmp_path / "share.cpp", tmp_path / "share"
    source.write_text(PROGRAM)
    compiler = env.CXX.get() or "c++"
    command = [compiler, "-std=c++17", "-O1", f"-I{include_root()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
