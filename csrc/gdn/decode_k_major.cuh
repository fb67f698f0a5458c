// SPDX-License-Identifier: Apache-2.0
// gdn/decode.cuh on states that lie K-major, and one token:
//
//   S ← α S + k (β (v − α Sᵀ k))ᵀ          o = scale · Sᵀ q          S [num_slots, num_v_heads, kKeyDim, kValueDim]
//
// Here a lane has columns of S, values, and a sum over keys runs over the lanes and warps of a block. A block has 128
// bytes of each row: all keys of a few values. Everything that is summed over keys, Sᵀ k and Sᵀ q of the old state and
// the squares of q and k, is summed at once and without the norms, which are factors of the sums: one barrier a block.
#pragma once

#include "gdn/decode.cuh"

namespace flashinfer {

// Grid: batch · num_v_heads · kValueDim / values of a block.
template <class Config>
__device__ __forceinline__ void gdn_decode_k_major(const GdnDecodeParams& params) {
  using T = typename Config::T;
  using StateT = typename Config::StateT;
  using Index = typename Config::Index;
  constexpr int kElems = 16 / sizeof(StateT);           // values of a lane
  constexpr int kLanes = 8, kValues = kLanes * kElems;  // of a row; of a block
  constexpr int kWarps = Config::kNumThreads / kWarpSize;
  constexpr int kRows = Config::kKeyDim / (Config::kNumThreads / kLanes);  // keys of a lane, consecutive
  constexpr int kBlocksPerHead = Config::kValueDim / kValues;
  constexpr int kSums = 2 * kElems + 4;  // S k, S q, q·q, k·k, k·q and one unused
  static_assert(Config::kKeyDim % (Config::kNumThreads / kLanes) == 0 && Config::kValueDim % kValues == 0);
  __shared__ float sums_smem[kWarps][kLanes][kSums];

  const int warp_idx = threadIdx.x / kWarpSize, lane_idx = threadIdx.x % kWarpSize;
  const int request_head = blockIdx.x / kBlocksPerHead;
  const int request_idx = params.num_v_heads.divide(request_head);
  const int head_idx = request_head - request_idx * int(params.num_v_heads.divisor);
  const int qk_head_idx = params.v_heads_per_head.divide(head_idx);
  const int row = threadIdx.x / kLanes * kRows;
  const int column_lane = lane_idx % kLanes;
  const int column = (blockIdx.x % kBlocksPerHead) * kValues + column_lane * kElems;

  wait_for_previous_kernel();
  allow_next_kernel();
  T* output_gmem = static_cast<T*>(params.output) + request_idx * params.output_strides.request +
                   head_idx * params.output_strides.head + column;
  const bool is_first = threadIdx.x < kLanes;
  const int slot = state_slot<Index>(params.input_slots, request_idx, params.num_slots);
  if (slot < 0) {  // of the whole block
    const float zeros[kElems] = {};
    if (is_first) store_floats(zeros, output_gmem);
    return;
  }
  const StateStrides& strides = params.state_strides;
  StateT* state_gmem =
      static_cast<StateT*>(params.states) + slot * strides.slot + head_idx * strides.head + row * strides.row + column;
  Vec<StateT, kElems> s[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) s[i] = Vec<StateT, kElems>::load(state_gmem + i * strides.row);
  float q[kRows], k[kRows], v[kElems];
  load_floats(static_cast<const T*>(params.q) + request_idx * params.q_strides.request +
                  qk_head_idx * params.q_strides.head + row,
              q);
  load_floats(static_cast<const T*>(params.k) + request_idx * params.k_strides.request +
                  qk_head_idx * params.k_strides.head + row,
              k);
  load_floats(static_cast<const T*>(params.v) + request_idx * params.v_strides.request +
                  head_idx * params.v_strides.head + column,
              v);
  const DeltaGates gates = DeltaGates::load<Config>(params, request_idx, 0, head_idx);

  float sums[kSums] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kElems; ++j) {
      sums[j] += to_float(s[i][j]) * k[i];
      sums[kElems + j] += to_float(s[i][j]) * q[i];
    }
    sums[2 * kElems] += q[i] * q[i];
    sums[2 * kElems + 1] += k[i] * k[i];
    sums[2 * kElems + 2] += k[i] * q[i];
  }
#pragma unroll
  for (int i = 0; i < kSums - 1; ++i) {
    sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], kLanes);
    sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2 * kLanes);
  }
  if (lane_idx < kLanes) store_floats(sums, sums_smem[warp_idx][column_lane]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    float part[kSums];
    load_floats(sums_smem[warp][column_lane], part);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += part[i];
  }

  float q_scale = params.scale, k_scale = 1.f;
  if (params.use_qk_l2norm) {
    q_scale *= rsqrtf(sums[2 * kElems] + 1e-6f);
    k_scale = rsqrtf(sums[2 * kElems + 1] + 1e-6f);
  }
  const float k_dot_q = sums[2 * kElems + 2] * k_scale * q_scale;
  float o[kElems], write[kElems];
#pragma unroll
  for (int j = 0; j < kElems; ++j) {
    write[j] = gates.beta * (v[j] - gates.alpha * sums[j] * k_scale);
    o[j] = gates.alpha * sums[kElems + j] * q_scale + write[j] * k_dot_q;
  }
  if (is_first) store_floats(o, output_gmem);
  if (!params.update_state) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float row[kElems];
#pragma unroll
    for (int j = 0; j < kElems; ++j) row[j] = gates.alpha * to_float(s[i][j]) + write[j] * (k[i] * k_scale);
    cast_vec<StateT>(row).store(state_gmem + i * strides.row);
  }
}

}  // namespace flashinfer
