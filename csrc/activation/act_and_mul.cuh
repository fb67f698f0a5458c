// SPDX-License-Identifier: Apache-2.0
// Gated activation (Shazeer 2020, arXiv:2002.05202):
//
//   output[r, i] = gate(input[r, i]) · input[r, hidden_size + i]       gate: silu, gelu or its tanh form (gate.h)
//
//   input [num_groups, rows_per_group, 2 hidden_size] T      output [num_groups, rows_per_group, hidden_size] OutT
//
// r is (group, row in group), each with a stride; the last axis is dense. Computed in fp32. Memory-bound: a thread
// issues the loads of kVecsPerThread pairs of vectors before it computes.
#pragma once

#include "activation/gate.h"
#include "activation/params.h"
#include "device/cast.cuh"
#include "device/pdl.cuh"

namespace flashinfer {

// output_scale() multiplies the result; it may read memory that the previous kernel wrote.
template <class Config, class OutputScale>
__device__ __forceinline__ void act_and_mul_row(const ActAndMulParams& params, OutputScale output_scale) {
  using T = typename Config::T;
  using OutT = typename Config::OutT;
  using V = Vec<T, Config::kVecSize>;
  constexpr int kVecs = Config::kVecsPerThread;
  const int64_t group_idx = blockIdx.x, row_idx = blockIdx.z;  // within the group
  const T* gate_gmem =
      static_cast<const T*>(params.input) + group_idx * params.input_group_stride + row_idx * params.input_row_stride;
  const T* up_gmem = gate_gmem + params.hidden_size;
  OutT* output_gmem =
      static_cast<OutT*>(params.output) + group_idx * params.output_group_stride + row_idx * params.output_row_stride;
  const int first_column = (blockIdx.y * kVecs * Config::kNumThreads + threadIdx.x) * Config::kVecSize;
  constexpr int kColumnStep = Config::kNumThreads * Config::kVecSize;

  wait_for_previous_kernel();
  allow_next_kernel();
  V gates[kVecs], ups[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = first_column + i * kColumnStep;
    if (column < params.hidden_size) {
      gates[i] = V::load(gate_gmem + column);
      ups[i] = V::load(up_gmem + column);
    }
  }
  const float scale = output_scale();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = first_column + i * kColumnStep;
    if (column >= params.hidden_size) return;
    float products[Config::kVecSize];
#pragma unroll
    for (int j = 0; j < Config::kVecSize; ++j) {
      products[j] = gate<Config::kGate>(to_float(gates[i][j])) * to_float(ups[i][j]) * scale;
    }
    cast_vec<OutT>(products).store(output_gmem + column);
  }
}

// Grid: (num_groups, ceil(hidden_size / (kNumThreads * kVecsPerThread * kVecSize)), rows_per_group).
template <class Config>
__device__ __forceinline__ void act_and_mul(const ActAndMulParams& params) {
  act_and_mul_row<Config>(params, [] { return 1.f; });
}

}  // namespace flashinfer
