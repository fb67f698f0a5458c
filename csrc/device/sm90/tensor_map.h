// SPDX-License-Identifier: Apache-2.0
// What the tensor memory accelerator (sm_90) knows of a tensor: for parameter structs, and thus for hosts too.
#pragma once

#include "common.h"

namespace flashinfer {

// CUtensorMap, as cuTensorMapEncodeTiled fills it in. It must be in the kernel's parameters.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

}  // namespace flashinfer
