// SPDX-License-Identifier: Apache-2.0
// The warpgroups of the Hopper kernel of products that multiply.
#pragma once

#include "device/swizzle.cuh"
#include "device/thread_idx.cuh"
#include "device/vec.cuh"
#include "gemm/sm90/tile.cuh"

namespace flashinfer::sm90 {

template <class Config>
struct GemmConsumer {
  using Shape = GemmShape<Config>;
  using T = typename Shape::T;
  using Products = Wgmma<T, Shape::kBlockN>;
  using Sums = float[Shape::kNumSums];
  static constexpr int kWaveBytes = 64 * kPanelBytes;  // of a

  const Sm90GroupGemmParams& params;
  GemmSmem<Config>& smem;
  const int consumer_idx;  // the same in all lanes, as the compiler knows: descriptors are made of it
  const GemmPart<Config> part{params};

  // What every step starts from is made once, and such that the compiler does not make it anew ahead of each: products
  // would wait for it.
  const int lane_idx = int(fresh_thread_idx() % 32);
  const Operand first_a =  // of the first stage, as the others
      kept(depth_major_operand(smem_address(smem.a[0]) + consumer_idx * Shape::kWaves * kWaveBytes));
  const Operand first_b = kept(Shape::kDepthMajor ? depth_major_operand(smem_address(smem.b[0]))
                                                  : column_major_operand(smem_address(smem.b[0]), Shape::kDepth));
  const uint32_t first_scales = address_of_scales();

  __device__ __forceinline__ static Operand kept(Operand x) { return {__shfl_sync(0xffffffffu, x.low, 0)}; }
  // Of the lane's first row.
  __device__ __forceinline__ uint32_t address_of_scales() const {
    uint32_t address = 0;
    if constexpr (Shape::kIsScaled) {
      address = smem_address(&smem.scales.a[0][row_of_wave(0, threadIdx.x / 32) + lane_row(threadIdx.x % 32)]);
      asm volatile("" : "+r"(address));
    }
    return address;
  }

  // The first of a warp's rows in the tile.
  __device__ __forceinline__ int row_of_wave(int wave, int warp_idx) const {
    return (consumer_idx * Shape::kWaves + wave) * 64 + warp_idx % 4 * 16;
  }

  // Starts the products of a step and 64 rows.
  __device__ __forceinline__ void multiply(Sums& sums, uint32_t turn, int wave, bool accumulates) const {
    const int stage = turn % Shape::kNumStages;
    const Operand a = first_a.advanced(stage * Shape::kABytes + wave * kWaveBytes);
    const Operand b = first_b.advanced(stage * Shape::kBBytes);
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
      constexpr int kAdvance = Shape::kDepthMajor ? 32 : 16 * kPanelBytes;
      Products::template multiply<!Shape::kDepthMajor>(sums, a.advanced(32 * i), b.advanced(kAdvance * i),
                                                       accumulates || i > 0);
    }
    wgmma_commit();
  }

  // The operands of a step have been read, by this warp, in every block that has its rows.
  __device__ __forceinline__ void release(uint32_t turn) const {
    if constexpr (Shape::kShares == 1) {
      smem.empty.at(turn).arrive_if(lane_idx == 0);
    } else if (lane_idx < Shape::kShares) {
      smem.empty.at(turn).arrive_at(part.split * Shape::kShares + lane_idx);
    }
  }

  // What products of a step are multiplied by: of the lane's two rows, and of the columns. They are waited for and read
  // when the products have been started, which do not wait for them then.
  struct Scales {
    float a[2], b[Shape::kScaleRuns];
  };
  __device__ __forceinline__ Scales scales_of(uint32_t turn, int wave) const {
    const int stage = turn % Shape::kNumStages;
    if (wave == 0) smem.scales.full.wait_full(turn);
    const uint32_t a_smem = first_scales + (stage * Shape::kBlockM + wave * 64) * sizeof(float);
    Scales scales{{load_shared_float(a_smem), load_shared_float(a_smem + row_of(1) * sizeof(float))}, {}};
#pragma unroll
    for (int run = 0; run < Shape::kScaleRuns; ++run) {
      scales.b[run] = load_shared_float(smem_address(&smem.scales.b[stage][run]));
    }
    return scales;
  }

  __device__ __forceinline__ static void add_scaled(Sums& totals, const Sums& products, const Scales& scales) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int run = 0; run < Shape::kScaleRuns; ++run) {
        constexpr int kNum = Shape::kBlockN / 4 / Shape::kScaleRuns;
        const float scale = scales.a[half] * scales.b[run];
#pragma unroll
        for (int i = run * kNum; i < (run + 1) * kNum; ++i) at(totals, half, i) += at(products, half, i) * scale;
      }
    }
  }

  __device__ __forceinline__ static void clear(Sums& totals) {
#pragma unroll
    for (int i = 0; i < Shape::kNumSums; ++i) totals[i] = 0.f;
  }

  // The sums of a tile, from `turn` on. Scaled products are added to sums that are cleared: let_go(wave) is called
  // where those of a wave are complete and products of another are under way, of the last wave in the tile after.
  template <class LetGo>
  __device__ __forceinline__ void sum(Sums (&totals)[Shape::kWaves], uint32_t turn, const LetGo& let_go) const {
    const int num_steps = part.step_end - part.step_begin;
    if constexpr (!Shape::kIsScaled) {
#pragma unroll
      for (int wave = 0; wave < Shape::kWaves; ++wave) clear(totals[wave]);
#pragma unroll
      for (int wave = 0; wave < Shape::kWaves; ++wave) pin(totals[wave]);
#pragma unroll 1
      for (int step = 0; step < num_steps; ++step, ++turn) {
        smem.full.wait_full(turn);
        wgmma_fence();
#pragma unroll
        for (int wave = 0; wave < Shape::kWaves; ++wave) multiply(totals[wave], turn, wave, true);
        wgmma_wait<Shape::kWaves>();
        if (step > 0) release(turn - 1);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int wave = 0; wave < Shape::kWaves; ++wave) pin(totals[wave]);
      if (num_steps > 0) release(turn - 1);
    } else if constexpr (Shape::kOverlaps) {
      if (num_steps == 0) return;
      Sums even, odd;  // steps
      Scales even_scales, odd_scales;
      const uint32_t last = turn + num_steps - 1;
      const auto start = [&](Sums& products, Scales& scales, uint32_t turn) {
        smem.full.wait_full(turn);
        pin(products);
        wgmma_fence();
        multiply(products, turn, 0, false);
        scales = scales_of(turn, 0);
      };
      // After the wait for these products.
      const auto finish = [&](Sums& products, const Scales& scales, uint32_t turn) {
        pin(products);
        release(turn);
        add_scaled(totals[0], products, scales);
      };
      start(even, even_scales, turn);
      let_go(0);
#pragma unroll 1
      for (; int32_t(last - turn) >= 2; turn += 2) {
        start(odd, odd_scales, turn + 1);
        wgmma_wait<1>();
        finish(even, even_scales, turn);
        start(even, even_scales, turn + 2);
        wgmma_wait<1>();
        finish(odd, odd_scales, turn + 1);
      }
      if (turn != last) {
        start(odd, odd_scales, last);
        wgmma_wait<1>();
        finish(even, even_scales, turn);
        wgmma_wait<0>();
        finish(odd, odd_scales, last);
      } else {
        wgmma_wait<0>();
        finish(even, even_scales, last);
      }
    } else {
      Sums products;
      bool is_full = false;  // asked ahead of the scaling, so that nothing is waited for between it and products
#pragma unroll 1
      for (int step = 0; step < num_steps; ++step, ++turn) {
        if (!is_full) smem.full.wait_full(turn);
#pragma unroll
        for (int wave = 0; wave < Shape::kWaves; ++wave) {
          pin(products);
          wgmma_fence();
          multiply(products, turn, wave, false);
          if (wave == 0 ? step == 0 : step == num_steps - 1) let_go(wave == 0 ? Shape::kWaves - 1 : wave - 1);
          const Scales scales = scales_of(turn, wave);
          wgmma_wait<0>();
          pin(products);
          if (wave == Shape::kWaves - 1) {
            release(turn);
            is_full = smem.full.is_full(turn + 1);
          }
          add_scaled(totals[wave], products, scales);
        }
      }
    }
  }

  // A warp lays its 16 rows out, a panel of columns after the other, and has TMA store them: where all blocks store at
  // the same time that takes long, and nobody waits for it. Where some rows are another group's, it stores its own
  // itself, as it does in small tiles.
  __device__ __forceinline__ void store(const Sums& totals, int wave, const GemmTile& tile) const {
    using Out = typename Config::Out;
    using Rows = SwizzledRows<kPanelBytes>;
    constexpr int kColumns = kPanelBytes / sizeof(Out), kGranule = 16 / sizeof(Out);
    static_assert(Shape::kBlockN % kColumns == 0);
    const int thread_idx = fresh_thread_idx(), warp_idx = thread_idx / 32, lane_idx = thread_idx % 32;
    const int32_t first_row = tile.row + row_of_wave(wave, warp_idx);
    const bool is_whole = Shape::kTmaStores && (first_row + 16 <= tile.row_end || tile.row_end == params.num_rows);
    if constexpr (Shape::kTmaStores) bulk_wait_read<Shape::kWaves - 1>();  // of the tile before
    __syncwarp();
#pragma unroll
    for (int panel = 0; panel < Shape::kStoredPanels; ++panel) {
      const uint32_t rows_smem = smem_address(smem.exchange.rows[wave][panel][warp_idx]);
      const int32_t panel_column = tile.column + panel * kColumns;
#pragma unroll
      for (int column = 0; column < kColumns; column += 16) {
        uint32_t x[4];  // 8 x 8 of the upper rows, of the lower rows, and the same 8 columns further
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int begin = (panel * kColumns + column) / 4 + i / 2 * 2;
          x[i] = pack_16bit<Out>(at(totals, i % 2, begin), at(totals, i % 2, begin + 1));
        }
        stmatrix_x4(rows_smem + Rows::offset(lane_idx % 16, column / 8 + lane_idx / 16), x);
      }
      if constexpr (Shape::kTmaStores) fence_async_proxy();
      __syncwarp();
      if (is_whole) {
        if (lane_idx == 0 && first_row < tile.row_end && panel_column < params.num_columns) {
          tma_store_3d(params.output_map, rows_smem, panel_column, first_row, 0);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 4 * i + lane_idx / 8, granule = lane_idx % 8;
          const int32_t column = panel_column + granule * kGranule;
          const uint4 x = load_shared_16(rows_smem + Rows::offset(row, granule));
          if (first_row + row < tile.row_end && column < params.num_columns) {
            Out* output = static_cast<Out*>(params.output) + (first_row + row) * params.output_row_stride + column;
            *reinterpret_cast<uint4*>(output) = x;
          }
        }
      }
    }
    if constexpr (Shape::kTmaStores) bulk_commit();
  }

  // Every split gives away the sums of the others' columns, and stores its own.
  __device__ __forceinline__ void exchange_and_store(Sums& totals, const GemmTile& tile) const {
    constexpr int kSplits = Shape::kSplits, kGroups = Shape::kSliceGroups;
    const int thread_idx = threadIdx.x;
    const auto pair_of = [&](int group, int half) -> float2 {
      return {at(totals, half, 2 * group), at(totals, half, 2 * group + 1)};
    };
#pragma unroll
    for (int to = 0; to < kSplits; ++to) {
      if (to == part.split) continue;
      const int place = part.split < to ? part.split : part.split - 1;  // among the others of `to`
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        smem.mailbox.send(&smem.exchange.sums[place][i][thread_idx], pair_of(to * kGroups + i / 2, i % 2),
                          to * Shape::kShares + part.share);
      }
    }
    smem.mailbox.receive(sizeof(smem.exchange.sums), 0);
    float slice[4 * kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const int half = i % 2, first = i / 2 * 2;
      float2 sum{0.f, 0.f};
#pragma unroll
      for (int own = 0; own < kSplits; ++own) {
        const float2 mine = pair_of(own * kGroups + i / 2, half);
        sum.x = own == part.split ? mine.x : sum.x, sum.y = own == part.split ? mine.y : sum.y;
      }
#pragma unroll
      for (int place = 0; place < kSplits - 1; ++place) {
        const float2 other = smem.exchange.sums[place][i][thread_idx];
        sum.x += other.x, sum.y += other.y;
      }
      at(slice, half, first) = sum.x, at(slice, half, first + 1) = sum.y;
    }
    store_sums<typename Config::Out, 8 * kGroups>(params, slice,
                                                  tile.row + row_of_wave(0, thread_idx / 32) + lane_row(lane_idx),
                                                  tile.row_end, tile.column + 8 * kGroups * part.split);
  }

  __device__ __forceinline__ void run() const {
    constexpr int kLast = Shape::kWaves - 1;
    uint32_t turn = 0;
    Sums totals[Shape::kWaves];
#pragma unroll
    for (int wave = 0; wave < Shape::kWaves; ++wave) clear(totals[wave]);
    GemmTile before{0, 0, 0, 0};  // of no rows
    part.for_each_tile(params, [&](const GemmTile& tile) {
      sum(totals, turn, [&](int wave) {
        if constexpr (Shape::kSplits == 1) {
          store(totals[wave], wave, wave == kLast ? before : tile);
          clear(totals[wave]);
        }
      });
      turn += part.step_end - part.step_begin;
      if constexpr (Shape::kSplits > 1) {
        exchange_and_store(totals[0], tile);
      } else if constexpr (Shape::kIsScaled) {
        before = tile;
      } else {
        store(totals[0], 0, tile);
      }
    });
    if constexpr (Shape::kIsScaled && Shape::kSplits == 1) store(totals[kLast], kLast, before);
    if constexpr (Shape::kTmaStores) bulk_wait_read<0>();  // a block may not end before
  }
};

}  // namespace flashinfer::sm90
