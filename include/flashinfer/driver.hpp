// SPDX-License-Identifier: Apache-2.0
// The CUDA driver, found by dlopen: its handles are pointers and integers, so that no header of CUDA is needed.
#pragma once

#include <dlfcn.h>

#include <cstdint>

#include "flashinfer/tensor.hpp"

namespace flashinfer::host {

struct LaunchAttribute {  // CUlaunchAttribute
  uint32_t id, pad;
  uint32_t value[16];
};
static_assert(sizeof(LaunchAttribute) == 72);
struct LaunchConfig {  // CUlaunchConfig
  uint32_t grid[3], block[3], smem_bytes;
  void* stream;
  LaunchAttribute* attributes;
  uint32_t num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56);

constexpr uint32_t kClusterDimension = 4, kProgrammaticSerialization = 6;               // CUlaunchAttributeID
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicSmem = 8;                                                      // CUfunction_attribute
constexpr unsigned kNonBlockingStream = 1;                                              // CUstream_flags
constexpr int kThreadLocalCapture = 1;                                                  // CUstreamCaptureMode
constexpr int kInvalidContext = 201, kInvalidHandle = 400;

class Driver {
 public:
  int (*cuInit)(unsigned);
  int (*cuGetErrorName)(int, const char**);
  int (*cuDriverGetVersion)(int*);
  int (*cuDeviceGetCount)(int*);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxGetCurrent)(void**);
  int (*cuCtxSetCurrent)(void*);
  int (*cuCtxSynchronize)();
  int (*cuLibraryLoadData)(void**, const void*, int*, void**, unsigned, int*, void**, unsigned);
  int (*cuLibraryGetKernel)(void**, void*, const char*);
  int (*cuKernelGetFunction)(void**, void*);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int*, void*, int, size_t);
  int (*cuLaunchKernelEx)(const LaunchConfig*, void*, void**, void**);
  int (*cuThreadExchangeStreamCaptureMode)(int*);
  int (*cuTensorMapEncodeTiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                                const uint32_t*, int, int, int, int);
  int (*cuMemAlloc)(uint64_t*, size_t);
  int (*cuMemFree)(uint64_t);
  int (*cuMemcpyHtoDAsync)(uint64_t, const void*, size_t, void*);
  int (*cuMemcpyDtoHAsync)(void*, uint64_t, size_t, void*);
  int (*cuMemsetD8Async)(uint64_t, unsigned char, size_t, void*);
  int (*cuStreamCreate)(void**, unsigned);
  int (*cuStreamSynchronize)(void*);
  int (*cuStreamBeginCapture)(void*, int);
  int (*cuStreamEndCapture)(void*, void**);
  int (*cuGraphInstantiate)(void**, void*, unsigned long long);
  int (*cuGraphLaunch)(void*, void*);
  int (*cuEventCreate)(void**, unsigned);
  int (*cuEventRecord)(void*, void*);
  int (*cuEventSynchronize)(void*);
  int (*cuEventElapsedTime)(float*, void*, void*);
  int (*cuEventDestroy)(void*);

  // Raises Error where no driver is installed, or one before CUDA 12.
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  // (13, 0) as 13000.
  int version() const {
    int number = 0;
    check("cuDriverGetVersion", cuDriverGetVersion(&number));
    return number;
  }

  void check(const char* what, int code) const {
    if (code == 0) return;
    const char* name = nullptr;
    cuGetErrorName(code, &name);
    fail(what, ": error ", code, " of the CUDA driver, ", name == nullptr ? "which it does not name" : name);
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail("no CUDA driver: ", dlerror(), ". Next step: install one, or use Device::cpu()");
    const auto find = [&](auto& function, const char* name) {
      void* symbol = dlsym(library, name);
      if (symbol == nullptr) fail("the CUDA driver has no ", name, "; expected one of CUDA 12 or later");
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
#define FLASHINFER_FIND(name) find(name, #name)
    FLASHINFER_FIND(cuInit);
    FLASHINFER_FIND(cuGetErrorName);
    FLASHINFER_FIND(cuDriverGetVersion);
    FLASHINFER_FIND(cuDeviceGetCount);
    FLASHINFER_FIND(cuDeviceGet);
    FLASHINFER_FIND(cuDeviceGetAttribute);
    FLASHINFER_FIND(cuDevicePrimaryCtxRetain);
    FLASHINFER_FIND(cuCtxGetCurrent);
    FLASHINFER_FIND(cuCtxSetCurrent);
    FLASHINFER_FIND(cuCtxSynchronize);
    FLASHINFER_FIND(cuLibraryLoadData);
    FLASHINFER_FIND(cuLibraryGetKernel);
    FLASHINFER_FIND(cuKernelGetFunction);
    FLASHINFER_FIND(cuFuncSetAttribute);
    FLASHINFER_FIND(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    FLASHINFER_FIND(cuLaunchKernelEx);
    FLASHINFER_FIND(cuThreadExchangeStreamCaptureMode);
    FLASHINFER_FIND(cuTensorMapEncodeTiled);
    FLASHINFER_FIND(cuStreamCreate);
    FLASHINFER_FIND(cuStreamSynchronize);
    FLASHINFER_FIND(cuStreamEndCapture);
    FLASHINFER_FIND(cuGraphLaunch);
    FLASHINFER_FIND(cuEventCreate);
    FLASHINFER_FIND(cuEventRecord);
    FLASHINFER_FIND(cuEventSynchronize);
    FLASHINFER_FIND(cuEventElapsedTime);
#undef FLASHINFER_FIND
    find(cuStreamBeginCapture, "cuStreamBeginCapture_v2");
    find(cuGraphInstantiate, "cuGraphInstantiateWithFlags");
    find(cuMemAlloc, "cuMemAlloc_v2");
    find(cuMemFree, "cuMemFree_v2");
    find(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
    find(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
    find(cuMemsetD8Async, "cuMemsetD8Async");
    find(cuEventDestroy, "cuEventDestroy_v2");
    check("cuInit", cuInit(0));
  }
};

// A device's primary context, the one that torch and the CUDA runtime use, current as long as this is there.
class InContext {
 public:
  explicit InContext(void* context) {
    const Driver& driver = Driver::get();
    driver.check("cuCtxGetCurrent", driver.cuCtxGetCurrent(&previous_));
    if (previous_ != context) driver.check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context));
    is_restored_ = previous_ != nullptr && previous_ != context;
  }
  ~InContext() {
    if (is_restored_) Driver::get().cuCtxSetCurrent(previous_);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  void* previous_ = nullptr;
  bool is_restored_ = false;
};

}  // namespace flashinfer::host
