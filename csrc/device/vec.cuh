// SPDX-License-Identifier: Apache-2.0
// Aligned short vectors: one load or store instruction of up to 16 bytes.
#pragma once

#include "device/types.cuh"

namespace flashinfer {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && ((sizeof(T) * N) & (sizeof(T) * N - 1)) == 0,
                "a vector is one load: a power of two of at most 16 bytes");
  T data[N];

  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }

  __device__ __forceinline__ static Vec load(const T* src) { return *reinterpret_cast<const Vec*>(src); }
  __device__ __forceinline__ void store(T* dst) const { *reinterpret_cast<Vec*>(dst) = *this; }

  // From the L2 cache: what other SMs have just written.
  __device__ __forceinline__ static Vec load_from_l2(const T* src_gmem) {
    Vec vec;
    if constexpr (sizeof(Vec) == 16) {
      reinterpret_cast<uint4&>(vec) = __ldcg(reinterpret_cast<const uint4*>(src_gmem));
    } else if constexpr (sizeof(Vec) == 8) {
      reinterpret_cast<uint2&>(vec) = __ldcg(reinterpret_cast<const uint2*>(src_gmem));
    } else {
      static_assert(sizeof(Vec) == 4);
      reinterpret_cast<uint32_t&>(vec) = __ldcg(reinterpret_cast<const uint32_t*>(src_gmem));
    }
    return vec;
  }

  // To global memory, for what this kernel does not read again: the L1 cache is left to what it does read.
  __device__ __forceinline__ void store_past_l1(T* dst_gmem) const {
    if constexpr (sizeof(Vec) == 16) {
      const uint4& bits = reinterpret_cast<const uint4&>(*this);
      asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(dst_gmem), "r"(bits.x), "r"(bits.y),
                   "r"(bits.z), "r"(bits.w)
                   : "memory");
    } else {
      store(dst_gmem);
    }
  }
};

// 16 bytes of shared memory, loaded here and not where the compiler would rather: past a branch, or after a store to a
// pointer that might alias.
__device__ __forceinline__ uint4 load_shared_16(uint32_t address_smem) {
  uint4 vec;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w)
               : "r"(address_smem)
               : "memory");
  return vec;
}
__device__ __forceinline__ float load_shared_float(uint32_t address_smem) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address_smem) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address_smem) {
  uint2 vec;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(vec.x), "=r"(vec.y) : "r"(address_smem) : "memory");
  return vec;
}
__device__ __forceinline__ void store_shared_16(uint32_t address_smem, const uint4& vec) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address_smem), "r"(vec.x), "r"(vec.y), "r"(vec.z),
               "r"(vec.w)
               : "memory");
}

}  // namespace flashinfer
