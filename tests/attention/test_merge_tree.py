# SPDX-License-Identifier: Apache-2.0
"""csrc/attention/merge_tree.h: whatever the order in which blocks arrive, each part is merged once."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashinfer import env
from flashinfer.jit.source import include_root

# Blocks leave the states of their parts in a random order, twice, with counters as on the GPU: they return to zero by
# themselves. A state is the number of times that it holds each part.
PROGRAM = r"""
#include "attention/merge_tree.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

using namespace flashinfer;
using State = std::vector<int>;

static bool merges_all(int num_parts, int max_ungrouped, int log2_min_group, std::mt19937& draw) {
  const MergeTree tree = MergeTree::of(num_parts, max_ungrouped, log2_min_group);
  if ((num_parts > max_ungrouped) != (tree.num_groups > 0)) return false;
  std::vector<int> order(num_parts), counters(1 + tree.num_groups, 0);
  std::iota(order.begin(), order.end(), 0);
  for (int launch = 0; launch < 2; ++launch) {
    std::shuffle(order.begin(), order.end(), draw);
    std::vector<State> groups(tree.num_groups), parts(num_parts);
    State result;
    int num_results = 0;
    for (int part : order) {
      parts[part].assign(num_parts, 0);
      parts[part][part] = 1;
      climb(tree, part, [&](int32_t group_idx, int32_t count) {
        int& counter = counters.at(1 + group_idx);
        counter = counter == count - 1 ? 0 : counter + 1;
        if (counter != 0) return false;
        const bool is_group = group_idx != kAllGroups;
        const auto& from = !is_group && tree.num_groups > 0 ? groups : parts;
        const int first = is_group ? tree.first_of_group(group_idx) : 0;
        State merged(num_parts, 0);
        for (int i = first; i < first + count; ++i) {
          for (int j = 0; j < num_parts; ++j) merged[j] += from.at(i).at(j);  // throws where nothing was left yet
        }
        (is_group ? groups.at(group_idx) : result) = merged;
        num_results += !is_group;
        return true;
      });
    }
    if (num_results != 1 || result != State(num_parts, 1)) return false;
  }
  return true;
}

int main() {
  std::mt19937 draw(0);
  for (int num_parts = 1; num_parts <= 300; ++num_parts) {
    for (auto [max_ungrouped, log2_min_group] : {std::pair(48, 4), std::pair(8, 2)}) {  // decode's and prefill's
      if (merges_all(num_parts, max_ungrouped, log2_min_group, draw)) continue;
      std::printf("%d parts, groups beyond %d", num_parts, max_ungrouped);
      return 1;
    }
  }
}
"""


def test_each_part_is_merged_once_whatever_the_order(tmp_path: Path) -> None:
    source, program = tmp_path / "tree.cpp", tmp_path / "tree"
    source.write_text(PROGRAM)
    command = [env.CXX.get() or "g++", "-std=c++17", "-O1", f"-I{include_root()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
