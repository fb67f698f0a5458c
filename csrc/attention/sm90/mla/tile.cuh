// SPDX-License-Identifier: Apache-2.0
// Geometry of latent attention on Hopper, and its shared memory.
#pragma once

#include "attention/mla/params.h"
#include "attention/sm90/mla/params.h"
#include "attention/sm90/scheduler.cuh"
#include "device/kv_codec.cuh"

namespace flashinfer::sm90::mla {

// What is multiplied. Keys that are scaled as they are widened no longer fit fp16, whatever the scale.
template <class Q, class Kv, bool kHasScales>
struct LatentOperand : CheapestOperand<Q, Kv> {};
template <class Q, class Kv>
struct LatentOperand<Q, Kv, true> : QueryOperand<Q, Kv> {};

// Two consumers share 64 query rows. Of a KV tile, each has the scores of one half of the keys; of the output, one half
// of the columns. Half 0 of either is the first consumer's.
template <class Config>
struct Shape {
  static constexpr bool kHasScales = Config::kScaleBlock > 0;
  static_assert(!kHasScales || (Config::kScaleBlock == 128 && Config::kHeadDimCkv == 512));
  using T = typename LatentOperand<typename Config::Q, typename Config::Kv, kHasScales>::Type;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kNumStages = Config::kNumStages;
  static constexpr int kNumKeys = kBlockN / 2, kNumColumns = Config::kHeadDimCkv / 2;  // of a half
  static_assert(kBlockM == 64 && kNumKeys == 64, "a panel is 64 rows, of queries or of keys");

  static constexpr int kNumConsumers = 2;
  static constexpr int kNumConsumerThreads = kNumConsumers * kWarpgroupSize;
  static constexpr bool kGathers = Config::kGathersKv;  // row by row, by all warps of the producers: gather.cuh
  static constexpr bool kWidens = sizeof(typename Config::Kv) == 1;  // in the same way: widen.cuh
  static constexpr int kNumQueryProducers = kGathers ? 4 : 3;        // warps
  static_assert(Config::kNumThreads == kNumConsumerThreads + kWarpgroupSize);
  static constexpr int kProducerRegisters = kWidens ? 72 : 56, kConsumerRegisters = kWidens ? 216 : 224;

  // Panels of 64 columns: those of ckv, then that of kpe, whose place the probabilities take once the scores are done.
  static constexpr int kPanelColumns = kPanelBytes / int(sizeof(T)), kPanelSize = 64 * kPanelBytes;
  static constexpr int kCkvPanels = Config::kHeadDimCkv / kPanelColumns,
                       kPePanels = Config::kHeadDimKpe / kPanelColumns;
  static constexpr int kPanelsOfHalf = kCkvPanels / 2, kPanels = kCkvPanels + 1;
  static_assert(sizeof(T) == 2 && Config::kHeadDimCkv % 128 == 0 && (kPePanels == 0 || kPePanels == 1));

  static constexpr int kNumScores = kNumKeys / 2, kNumOutputs = kNumColumns / 2;  // of a thread
  static constexpr int kNumProbabilityRegisters = kNumScores / 2;
};

// What a half of the keys comes in: the two halves of its columns, and kpe. Its place is left part by part: the columns
// of a consumer when its product with them is done, that of kpe, where probabilities are by then, by their reader, who
// is not the consumer of these keys.
constexpr int kPositional = 2, kNumParts = 3;

template <class Config>
struct Smem {
  using Shape = mla::Shape<Config>;
  alignas(1024) uint8_t q[Shape::kCkvPanels + Shape::kPePanels][Shape::kPanelSize];
  alignas(1024) uint8_t kv[Shape::kNumStages][2][Shape::kPanels][Shape::kPanelSize];  // by stage and half of the keys
  alignas(16) float scales[2][Shape::kHasScales ? Shape::kNumKeys : 1][4];            // by half of the keys
  MbarrierRing<1> q_full, q_empty;                                                    // a turn a unit
  MbarrierRing<Shape::kNumStages> kv_full[2][kNumParts];  // a turn a KV tile; by half of the keys and part
  MbarrierRing<Shape::kNumStages> kv_empty[2][2];         // by half of the keys and consumer
  MbarrierRing<kNumWorkSlots> work_full, work_empty;      // a turn a unit
  Work work[kNumWorkSlots];
  float max_of_row[2][64], sum_of_row[2][64], largest_of_row[2][64];  // by consumer; the last of the output
  FastDivisor group_size;

  // Until a stage that copies of threads filled is full.
  template <class Ring>
  __device__ __forceinline__ static void await(Ring& full, uint32_t turn) {
    full.wait_full(turn);
    fence_async_proxy();
  }

  // By one thread, before any role starts.
  __device__ __forceinline__ void init(const Sm90MlaParams& params) {
    constexpr int kConsumerWarps = Shape::kNumConsumerThreads / 32;
    q_full.init(32 * Shape::kNumQueryProducers);
    q_empty.init(kConsumerWarps);
    for (int keys = 0; keys < 2; ++keys) {
      for (int part = 0; part < kNumParts; ++part) kv_full[keys][part].init(Shape::kGathers ? kWarpgroupSize : 1);
      for (int part = 0; part < 2; ++part) kv_empty[keys][part].init(kConsumerWarps / 2);
    }
    work_full.init(1);
    work_empty.init(kConsumerWarps + kWarpgroupSize / 32);
    fence_mbarrier_init();
    group_size = FastDivisor::of(params.num_qo_heads);
  }
};

// Named barriers. At the first ones one consumer arrives, and the other waits; the last is the producers'.
enum Barrier : int { kFirstHasScores = 1, kHasHandedOver = 2, kBothConsumers = 4, kWidened = 5 };

}  // namespace flashinfer::sm90::mla
