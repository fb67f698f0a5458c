// Gated activation: output = gate(input[:, :hidden_size]) · input[:, hidden_size:]
//
// Memory-bound: every thread issues the loads of kVecsPerThread independent vector pairs before it computes.
#pragma once

#include "activation/gate.h"
#include "activation/params.h"
#include "device/pdl.cuh"
#include "device/vec.cuh"

namespace flashinfer {

// Grid: (num_rows, ceil(hidden_size / (kNumThreads * kVecsPerThread * kVecSize))).
template <class Config>
__device__ __forceinline__ void act_and_mul(const ActAndMulParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVecSize>;
  constexpr int kVecs = Config::kVecsPerThread;
  const T* gate_gmem = static_cast<const T*>(params.input) + blockIdx.x * params.input_stride;
  const T* up_gmem = gate_gmem + params.hidden_size;
  T* output_gmem = static_cast<T*>(params.output) + blockIdx.x * params.output_stride;
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
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = first_column + i * kColumnStep;
    if (column >= params.hidden_size) return;
#pragma unroll
    for (int j = 0; j < Config::kVecSize; ++j) {
      gates[i][j] = from_float<T>(gate<Config::kGate>(to_float(gates[i][j])) * to_float(ups[i][j]));
    }
    gates[i].store(output_gmem + column);
  }
}

}  // namespace flashinfer
