// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace flashinfer {

// The scale of a tensor quantized as a whole: it holds value / scale. Known to the host, or only on the device.
struct QuantScale {
  const float* device_value;  // [1] or null: 1
  float host_value;           // multiplied with it
  int32_t reserved;

  FLASHINFER_HOST_DEVICE float reciprocal() const {
    return 1.f / (device_value == nullptr ? host_value : host_value * *device_value);
  }
};

}  // namespace flashinfer
