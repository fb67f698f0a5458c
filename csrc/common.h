// SPDX-License-Identifier: Apache-2.0
// Shared by every compiler that sees our headers: NVRTC, nvcc, g++ and clang++.
// NVRTC has no host headers, so the fixed-width integers are spelled out here once.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cstddef>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define FLASHINFER_HOST_DEVICE __host__ __device__
#else
#define FLASHINFER_HOST_DEVICE
#endif

namespace flashinfer {

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
#endif

template <class A, class B>
FLASHINFER_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace flashinfer

// offsetof as a constant expression. NVRTC has neither <cstddef> nor the builtin, but it keeps the front end's
// address-to-integer intrinsic.
#if defined(__CUDACC_RTC__)
#define FLASHINFER_OFFSETOF(type, member) __INTADDR__(&((type*)0)->member)
#else
#define FLASHINFER_OFFSETOF(type, member) __builtin_offsetof(type, member)
#endif
