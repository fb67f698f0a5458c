// SPDX-License-Identifier: Apache-2.0
// Memory for the time of a call. A kernel that takes some returns whether it got it, which its caller makes an error
// of; every other kernel returns nothing.
#pragma once

#include <cstdlib>

#include "common.h"

namespace flashinfer::cpu {

// Uninitialized; null where there is no more memory.
template <class T>
struct Scratch {
  T* const data;

  explicit Scratch(int64_t count = 1)
      : data(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) / 64 + 1) * 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace flashinfer::cpu
