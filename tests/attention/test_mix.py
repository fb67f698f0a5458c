# SPDX-License-Identifier: Apache-2.0
"""csrc/attention/prefill/mix.h: two lists become one, each in its order and as evenly as it goes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashinfer import env
from flashinfer.jit.source import include_root

PROGRAM = r"""
#include "attention/prefill/mix.h"

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

using namespace flashinfer;

static bool is_one_list(int n, int m) {
  const Mix mix = {n, m};
  std::vector<int> taken(n + m, 0);
  int last[2] = {-1, -1};
  for (int i = 0; i < n + m; ++i) {
    const bool is_first = i < n;
    const int place = is_first ? mix.place_of_first(i) : mix.place_of_second(i - n);
    if (place <= last[is_first] || place >= n + m || taken[place]++ != 0) return false;
    last[is_first] = place;
  }
  return true;
}

static bool is_even(int n, int m) {  // of any run of places, each list has its share to within two
  const Mix mix = {n, m};
  for (int i = 0; i < n; ++i) {
    const double share = double(i) * (n + m) / n;
    if (std::abs(mix.place_of_first(i) - share) > 2.0 + double(m) / n) return false;
  }
  return true;
}

int main() {
  for (int n = 0; n < 60; ++n) {
    for (int m = 0; m < 60; ++m) {
      if (!is_one_list(n, m) || !is_even(n, m)) return std::printf("%d and %d\n", n, m), 1;
    }
  }
  const int most = 1 << 20;
  for (auto [n, m] : {std::pair{most, most}, {most - 1, most}, {1, most}, {most, 7}, {12345, 999983}}) {
    if (!is_one_list(n, m)) return std::printf("%d and %d\n", n, m), 1;
  }
}
"""


def test_every_place_is_taken_once(tmp_path: Path) -> None:
    source, program = tmp_path / "mix.cpp", tmp_path / "mix"
    source.write_text(PROGRAM)
    compiler = env.CXX.get() or "c++"
    command = [compiler, "-std=c++17", "-O1", f"-I{include_root()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
