// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch (sm_90 and later), the default. Both calls are free when the launch did not ask for it.
//
// Every block of every kernel waits, and does so before it allows the next kernel or returns. So when a kernel starts,
// all but the one right before it have finished (decode/kernel.cuh reads its plan on the strength of that), and when a
// wait is over, all have.
#pragma once

namespace flashinfer {

// Wait until the kernel before this one on the stream has finished and its writes are visible. Call before the first
// read or write of device memory that another kernel touches.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allow the next kernel's blocks to be scheduled; its own wait still holds it back from our results.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace flashinfer
