// SPDX-License-Identifier: Apache-2.0
// Transposition of 8-bit values on Hopper. The tensor cores take 8-bit operands along the depth of the product only,
// and the depth of P V are the keys, which in memory are the rows.
//
// ldmatrix transposes pairs of bytes. Of 16 keys and 16 dimensions, two of its matrices give lane l dimensions
// 2 (l / 4) and the next of keys 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1, where t = l % 4: regrouped by dimension, two
// registers of four keys each, which stmatrix makes rows of 16 bytes of. Both orders that come of it cost nothing:
//
//   keys        these four are those whose probabilities the lane's registers hold (pack_probabilities), so positions
//               4 t to 4 t + 3 of a row are theirs
//   dimensions  of 16, the even ones come first and the odd ones after them, which is what keeps stmatrix free of bank
//               conflicts; the output's columns follow, and a thread has four neighbouring dimensions of it
//               (output.cuh)
#pragma once

#include "attention/sm90/scheduler.cuh"
#include "device/ldmatrix.cuh"

namespace flashinfer::sm90 {

// A warp's share of every tile of values: of `step` times 32 dimensions the idx-th 32.
template <class Config>
struct Transposer {
  using Shape = sm90::Shape<Config>;
  static constexpr int kBatch = 2;  // 16 keys each, of 32 dimensions, in flight
  static_assert(Shape::kHeadDimVo % (32 * Shape::kNumTransposers) == 0);
  Smem<Config>& smem;
  int idx, step;

  __device__ __forceinline__ void run() const {
    uint32_t turn = 0;
    for_each_unit(smem, [&](const Work& work, uint32_t unit_turn) {
#pragma unroll 1
      for (int tile = work.item.tile_end - 1; tile >= work.item.tile_begin;
           tile = smem.tile_below(unit_turn, tile), ++turn) {
        smem.rows_full.wait_full(turn);
        smem.v_empty.wait_empty(turn);
        transpose(turn, 0, Shape::kBlockN);
        fence_async_proxy();
        __syncwarp();
        if (elect_lane()) {
          smem.rows_empty.at(turn).arrive();
          smem.v_full.at(turn).arrive();
        }
      }
    });
  }

  // Keys [first_key, first_key + num_keys).
  __device__ __forceinline__ void transpose(uint32_t turn, int first_key, int num_keys) const {
    const uint32_t rows_smem = smem_address(smem.value_rows.stages[turn % Shape::kNumStages]);
    const uint32_t columns_smem = smem_address(smem.v[turn % Shape::kNumStages]);
    const int lane_idx = fresh_thread_idx() % 32;
    // Of ldmatrix: 16 keys, two granules of 16 dimensions; of stmatrix: 32 dimensions.
    const int key = lane_idx % 16, granule = lane_idx / 16;
#pragma unroll 1
    for (int dims = idx; dims < Shape::kHeadDimVo / 32; dims += step) {
      const uint32_t from = rows_smem + granule_offset(key, 2 * dims + granule, Shape::kBlockN);
#pragma unroll 1
      for (int first = first_key / 16; first < (first_key + num_keys) / 16; first += kBatch) {
        uint32_t pairs[kBatch][4];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) ldmatrix_x4_trans(pairs[i], from + (first + i) * 16 * kPanelBytes);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const uint32_t (&x)[4] = pairs[i];
          const uint32_t columns[4] = {__byte_perm(x[0], x[1], 0x6420), __byte_perm(x[0], x[1], 0x7531),
                                       __byte_perm(x[2], x[3], 0x6420), __byte_perm(x[2], x[3], 0x7531)};
          stmatrix_x4(columns_smem + granule_offset(dims * 32 + lane_idx, first + i, Shape::kHeadDimVo), columns);
        }
      }
    }
  }
};

}  // namespace flashinfer::sm90
