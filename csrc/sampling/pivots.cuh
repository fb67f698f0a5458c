// SPDX-License-Identifier: Apache-2.0
// The weight of what is larger than each of a few scores, the pivots: one look at the row, a sum for each.
#pragma once

#include "sampling/totals.cuh"

namespace flashinfer {

template <class Config, int kNum>
struct Pivots {
  // The weight above each pivot: in a thread, a warp or the row.
  struct alignas(kNum > 2 ? 16 : 8) Masses {
    float above[kNum];
  };
  using Table = WarpTable<Config, Masses>;

  float score[kNum];

  // In this thread, whose largest score is thread_max.
  template <class WeightOf>
  __device__ __forceinline__ Masses in_thread(RowSlice<Config>& slice, float thread_max, WeightOf weight_of) const {
    float lowest = score[0];
#pragma unroll
    for (int i = 1; i < kNum; ++i) lowest = fminf(lowest, score[i]);
    Masses mine{};
    if (!(thread_max > lowest)) return mine;
    slice.for_each([&](float x, int, int) {
      const float weight = weight_of(x);
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        if (x > score[i]) mine.above[i] += weight;
      }
    });
    return mine;
  }

  // In the row, from what its threads have. Collective over the cluster.
  __device__ __forceinline__ static Masses in_row(const Masses& thread, Table& table,
                                                  Mailbox<Config::kClusterSize>& mailbox, int num_before) {
    Masses warp, row{};
#pragma unroll
    for (int i = 0; i < kNum; ++i) warp.above[i] = warp_reduce(thread.above[i], Sum{});
    table.exchange(warp, mailbox, num_before);
    table.for_lane([&](const Masses& entry) {
#pragma unroll
      for (int i = 0; i < kNum; ++i) row.above[i] += entry.above[i];
    });
#pragma unroll
    for (int i = 0; i < kNum; ++i) row.above[i] = warp_reduce(row.above[i], Sum{});
    return row;
  }
};

}  // namespace flashinfer
