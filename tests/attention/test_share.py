# SPDX-License-Identifier: Apache-2.0
"""csrc/attention/prefill/share.h: how many blocks the first launch of a mixed batch keeps, by estimates of time."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashinfer import env
from flashinfer.jit.source import include_root

PROGRAM = r"""
#include "attention/prefill/share.h"

#include <cstdio>
#include <initializer_list>

using namespace flashinfer;

static int best_of(const DeviceShare& share) {
  int best = share.num_blocks;
  for (int n = 1; n < share.num_blocks; ++n) {
    if (share.time_with(n) < share.time_with(best)) best = n;
  }
  return best;
}

static bool holds(bool what, const char* name, const DeviceShare& share) {
  if (!what) std::printf("%s: load %g, longest %g, units %g, read %g\n", name, share.load, share.longest,
                         share.num_units, share.num_read);
  return what;
}

int main() {
  bool is_right = true;
  for (int block_m : {128, 192}) {
    for (float units = 1; units < 1e5f; units *= 3) {
      for (float longest : {1.5f, 9.5f, 65.5f}) {
        for (float read = 0; read < 1e6f; read = read * 3 + 8) {
          const DeviceShare share = {units * longest * 0.6f + longest * 0.4f, longest, units, read, 132, block_m};
          const float alone = DeviceShare{share.load, longest, units, 0, 132, block_m}.time_with(132);
          const float reading = share.time_with(132) - alone;
          const int best = best_of(share);
          const float slack = 1e-4f * share.time_with(132);
          // Nothing is faster than its parts.
          for (int n = 1; n <= 132; ++n) {
            const float time = share.time_with(n);
            is_right &= holds(time + slack >= share.load / 132 && time + slack >= reading, "too fast", share);
          }
          is_right &= holds(read > 0 || best == 132, "nothing to read", share);
        }
      }
    }
  }
  // 8 prompts of 1024 tokens, 32 query heads on 8, beside 64 requests of 4096 keys; 2 of 16384 beside 8 of 4096.
  const DeviceShare even = {12288, 9.5f, 2048, 16384, 132, 128}, few = {1081344, 129.5f, 16384, 2048, 132, 128};
  is_right &= holds(best_of(even) >= 70 && best_of(even) <= 95, "as much of both", even);
  is_right &= holds(best_of(few) == 132, "little to read", few);
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
