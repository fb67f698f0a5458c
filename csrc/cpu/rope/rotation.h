// SPDX-License-Identifier: Apache-2.0
// Angles and the rotation of one head on the CPU; device/rotary.cuh says why angles are 64-bit fractions of a turn.
#pragma once

#include "cpu/page/token_slots.h"
#include "cpu/rotary.h"
#include "cpu/types.h"
#include "rope/params.h"

namespace flashinfer::cpu {

template <class Config>
int64_t rotary_position(const Rotation& rotation, const RotationSetup& setup, int token_idx) {
  using Index = typename Config::PositionIndex;
  if constexpr (Config::kRagged) {
    const Index* indptr = static_cast<const Index*>(rotation.indptr);
    int64_t batch_idx = -1;  // the last whose first token is not behind this one
    for (int64_t behind = setup.batch_size + 1; behind - batch_idx > 1;) {
      const int64_t middle = (batch_idx + behind) / 2;
      (indptr[middle] <= Index(token_idx) ? batch_idx : behind) = middle;
    }
    if (batch_idx < 0 || batch_idx >= setup.batch_size) return 0;  // padding before the first request or past the last
    const int64_t offset = static_cast<const Index*>(rotation.offsets)[batch_idx];
    return int64_t(uint64_t(offset) + uint64_t(token_idx) - uint64_t(indptr[batch_idx]));
  } else {
    return static_cast<const Index*>(rotation.positions)[token_idx];
  }
}

template <class Config>
struct TokenAngles {
  static constexpr int kNumAngles = Config::kRotaryDim / 2;
  float cos[kNumAngles], sin[kNumAngles];

  TokenAngles(const Rotation& rotation, const RotationSetup& setup, int token_idx) {
    const int64_t position = rotary_position<Config>(rotation, setup, token_idx);
    if constexpr (Config::kCosSinCache) {
      using CosSinT = typename Config::CosSinT;
      const int64_t table_row = position >= 0 && position < setup.num_positions ? position : 0;
      const CosSinT* row = static_cast<const CosSinT*>(rotation.cos_sin_cache) + table_row * setup.cos_sin_stride;
      for (int i = 0; i < kNumAngles; ++i) {
        cos[i] = to_float(row[i]);
        sin[i] = to_float(row[kNumAngles + i]);
      }
    } else {
      for (int i = 0; i < kNumAngles; ++i) {
        rotary_cos_sin(position, setup.frequencies[i], cos[i], sin[i]);
      }
    }
  }

  // Turns the first kRotaryDim of a head's elements.
  void rotate(float* x) const {
    constexpr int kStride = Config::kInterleave ? 2 : 1, kPartner = Config::kInterleave ? 1 : kNumAngles;
    for (int i = 0; i < kNumAngles; ++i) {
      const float a = x[i * kStride], b = x[i * kStride + kPartner];
      x[i * kStride] = a * cos[i] - b * sin[i];
      x[i * kStride + kPartner] = b * cos[i] + a * sin[i];
    }
  }
};

template <int kDim, class T>
void load_floats(const T* row, float* x) {
  for (int i = 0; i < kDim; ++i) x[i] = to_float(row[i]);
}

template <int kDim, class T>
void store_floats(const float* x, float scale, T* row) {
  for (int i = 0; i < kDim; ++i) row[i] = from_float<T>(x[i] * scale);
}

}  // namespace flashinfer::cpu
