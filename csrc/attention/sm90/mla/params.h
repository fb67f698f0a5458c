// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernel of latent attention is given besides MlaParams: where TMA finds ckv and kpe.
#pragma once

#include "attention/mla/params.h"
#include "device/sm90/tensor_map.h"

namespace flashinfer {

// As in attention/sm90/params.h, with one head.
struct Sm90MlaMaps {
  TensorMap ckv_map, kpe_map;
};

struct Sm90MlaParams : Sm90MlaMaps, MlaParams {
  int32_t box_rows;  // rows that one copy brings, a divisor of half a KV tile and of the page size
  uint8_t reserved[8];
};

}  // namespace flashinfer
