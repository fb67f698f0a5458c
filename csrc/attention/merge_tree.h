// SPDX-License-Identifier: Apache-2.0
// In which order the states of the parts of a KV are merged (merge.cuh), and by whom.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// How `num_parts` states become one: all at once, or by way of groups.
struct MergeTree {
  int32_t num_parts;
  int32_t log2_group_len;  // parts of a group; of the last one perhaps fewer
  int32_t num_groups;      // 0: no groups

  FLASHINFER_FN static MergeTree of(int32_t num_parts, int32_t max_ungrouped, int32_t log2_min_group) {
    int32_t log2 = log2_min_group;
    while (1 << 2 * log2 < num_parts) ++log2;
    return {num_parts, log2, num_parts > max_ungrouped ? (num_parts + (1 << log2) - 1) >> log2 : 0};
  }
  FLASHINFER_FN int32_t group_len() const { return 1 << log2_group_len; }
  FLASHINFER_FN int32_t first_of_group(int32_t group_idx) const { return group_idx << log2_group_len; }
  FLASHINFER_FN int32_t len_of_group(int32_t group_idx) const {
    const int32_t num_left = num_parts - first_of_group(group_idx);
    return num_left < group_len() ? num_left : group_len();
  }
};

// Merges as far as this block, which has left the state of part_idx, is the one to do it. merge_if_last(group_idx,
// count) returns false unless this block is the last of the `count` that left the states of a group, or for kAllGroups
// those of all groups (of all parts, if there are no groups); then it merges them and stores the outcome.
constexpr int32_t kAllGroups = -1;

template <class MergeIfLast>
FLASHINFER_FN void climb(const MergeTree& tree, int32_t part_idx, const MergeIfLast& merge_if_last) {
  bool is_group = tree.num_groups > 0;
  int32_t group_idx = is_group ? part_idx >> tree.log2_group_len : kAllGroups;
  int32_t count = is_group ? tree.len_of_group(group_idx) : tree.num_parts;
  while (merge_if_last(group_idx, count) && is_group) {
    is_group = false;
    group_idx = kAllGroups;
    count = tree.num_groups;
  }
}

}  // namespace flashinfer
