// SPDX-License-Identifier: Apache-2.0
// Short vectors of floats to and from storage types, two elements an instruction where the hardware converts pairs.
#pragma once

#include "device/vec.cuh"

namespace flashinfer {

template <class T>
struct PairCast {
  static constexpr bool kSupported = false;
};
template <>
struct PairCast<bf16> {
  static constexpr bool kSupported = true;
  using Pair = __nv_bfloat162;
  __device__ __forceinline__ static Pair from_floats(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct PairCast<fp16> {
  static constexpr bool kSupported = true;
  using Pair = __half2;
  __device__ __forceinline__ static Pair from_floats(float x, float y) { return __floats2half2_rn(x, y); }
};
template <>
struct PairCast<fp8_e4m3> {
  static constexpr bool kSupported = true;
  using Pair = __nv_fp8x2_storage_t;
  __device__ __forceinline__ static Pair from_floats(float x, float y) {
    return __nv_cvt_float2_to_fp8x2(float2{x, y}, __NV_SATFINITE, __NV_E4M3);
  }
};
template <>
struct PairCast<fp8_e5m2> {
  static constexpr bool kSupported = true;
  using Pair = __nv_fp8x2_storage_t;
  __device__ __forceinline__ static Pair from_floats(float x, float y) {
    return __nv_cvt_float2_to_fp8x2(float2{x, y}, __NV_SATFINITE, __NV_E5M2);
  }
};

// Round to nearest even; fp8 saturates to the largest finite value.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> cast_vec(const float (&x)[N]) {
  Vec<T, N> y;
  if constexpr (PairCast<T>::kSupported && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      reinterpret_cast<typename PairCast<T>::Pair*>(&y)[i / 2] = PairCast<T>::from_floats(x[i], x[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = from_float<T>(x[i]);
  }
  return y;
}

template <class T, int N>
__device__ __forceinline__ void to_floats(const Vec<T, N>& x, float (&y)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = to_float(x[i]);
}

}  // namespace flashinfer
