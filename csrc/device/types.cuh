// SPDX-License-Identifier: Apache-2.0
// Element types and their conversions to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "common.h"

namespace flashinfer {

using fp32 = float;
using fp16 = __half;
using bf16 = __nv_bfloat16;
using fp8_e4m3 = __nv_fp8_e4m3;
using fp8_e5m2 = __nv_fp8_e5m2;

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float to_float(fp16 x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}

// Round to nearest even; fp8 saturates to the largest finite value, as PyTorch's quantizers expect.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return T(x);
}
template <>
__device__ __forceinline__ fp16 from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace flashinfer
