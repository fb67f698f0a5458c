// SPDX-License-Identifier: Apache-2.0
// Devices, and memory of them for those who bring none of their own.
#pragma once

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#include "flashinfer/contract.hpp"
#include "flashinfer/driver.hpp"

namespace flashinfer {

using Stream = void*;  // CUstream or cudaStream_t; nullptr is the default stream. Of no meaning on a CPU

// A GPU, or this machine's CPU.
class Device {
 public:
  static Device cpu() { return Device(); }

  // Raises Error where there is no driver or no such GPU.
  static Device cuda(int ordinal = 0) { return Device(ordinal); }

  bool is_cuda() const { return ordinal_ >= 0; }
  int ordinal() const { return ordinal_; }               // -1: the CPU
  const std::string& target() const { return target_; }  // "sm_90a", "x86-64-v3"
  int num_sms() const { return num_sms_; }
  void* context() const { return context_; }  // CUcontext

  // Waits for what was launched on a stream.
  void synchronize(Stream stream = nullptr) const {
    if (!is_cuda()) return;
    host::InContext in(context_);
    const host::Driver& driver = host::Driver::get();
    driver.check("cuStreamSynchronize", driver.cuStreamSynchronize(stream));
  }

 private:
  Device() : target_(cpu_target()) {}

  explicit Device(int ordinal) : ordinal_(ordinal) {
    const host::Driver& driver = host::Driver::get();
    int count = 0, handle = 0, major = 0, minor = 0;
    driver.check("cuDeviceGetCount", driver.cuDeviceGetCount(&count));
    host::require(ordinal >= 0 && ordinal < count, "cuda:", ordinal, " is not there; expected 0 to ", count - 1);
    driver.check("cuDeviceGet", driver.cuDeviceGet(&handle, ordinal));
    const auto attribute = [&](int which, int& value) {
      driver.check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(&value, which, handle));
    };
    attribute(host::kCapabilityMajor, major);
    attribute(host::kCapabilityMinor, minor);
    attribute(host::kMultiprocessorCount, num_sms_);
    driver.check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(&context_, handle));
    target_ = "sm_" + std::to_string(major) + std::to_string(minor) + (major >= 9 ? "a" : "");
  }

  // The highest level whose flags the processor has, or FLASHINFER_CPU_TARGET.
  static std::string cpu_target() {
    if (const char* chosen = std::getenv("FLASHINFER_CPU_TARGET"); chosen != nullptr && *chosen != '\0') return chosen;
    static const std::string known = level_of_this_machine();
    return known;
  }

  static std::string level_of_this_machine() {
    std::set<std::string> flags;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; flags.empty() && std::getline(file, line);) {
      if (line.compare(0, 5, "flags") != 0 && line.compare(0, 8, "Features") != 0) continue;
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) flags.insert(word);
    }
    const auto highest = [&](const auto& levels) {
      std::string best = levels[0].name;
      for (const contract::CpuLevel& level : levels) {
        std::istringstream needed(level.flags);
        for (std::string flag; needed >> flag;)
          if (flags.count(flag) == 0) return best;
        best = level.name;
      }
      return best;
    };
#if defined(__aarch64__)
    return highest(contract::kArmLevels);
#else
    return highest(contract::kX86Levels);
#endif
  }

  int ordinal_ = -1, num_sms_ = 1;
  void* context_ = nullptr;
  std::string target_;
};

// Memory of a device, 256-byte aligned, freed with the object.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Device& device, size_t num_bytes) : device_(device), num_bytes_(num_bytes) {
    if (device.is_cuda()) {
      host::InContext in(device.context());
      const host::Driver& driver = host::Driver::get();
      uint64_t address = 0;
      driver.check("cuMemAlloc", driver.cuMemAlloc(&address, num_bytes > 0 ? num_bytes : 1));
      data_ = reinterpret_cast<void*>(address);
    } else {
      data_ = std::aligned_alloc(256, (num_bytes / 256 + 1) * 256);
      host::require(data_ != nullptr, "no memory for ", num_bytes, " bytes");
    }
  }
  ~Buffer() { free(); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this == &other) return *this;
    free();
    device_ = other.device_;
    data_ = std::exchange(other.data_, nullptr);
    num_bytes_ = std::exchange(other.num_bytes_, 0);
    return *this;
  }

  void* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

  // From and to memory of the host, in the order of the stream; the host waits.
  void upload(const void* from, size_t num_bytes, Stream stream = nullptr) const {
    if (!device_.is_cuda()) {
      if (num_bytes > 0) std::memcpy(data_, from, num_bytes);
      return;
    }
    host::InContext in(device_.context());
    const host::Driver& driver = host::Driver::get();
    driver.check("cuMemcpyHtoDAsync", driver.cuMemcpyHtoDAsync(address(), from, num_bytes, stream));
    driver.check("cuStreamSynchronize", driver.cuStreamSynchronize(stream));
  }
  void download(void* to, size_t num_bytes, Stream stream = nullptr) const {
    if (!device_.is_cuda()) {
      if (num_bytes > 0) std::memcpy(to, data_, num_bytes);
      return;
    }
    host::InContext in(device_.context());
    const host::Driver& driver = host::Driver::get();
    driver.check("cuMemcpyDtoHAsync", driver.cuMemcpyDtoHAsync(to, address(), num_bytes, stream));
    driver.check("cuStreamSynchronize", driver.cuStreamSynchronize(stream));
  }
  void zero(Stream stream = nullptr) const {
    if (!device_.is_cuda()) {
      std::memset(data_, 0, num_bytes_);
      return;
    }
    host::InContext in(device_.context());
    const host::Driver& driver = host::Driver::get();
    driver.check("cuMemsetD8Async", driver.cuMemsetD8Async(address(), 0, num_bytes_, stream));
  }

 private:
  uint64_t address() const { return reinterpret_cast<uint64_t>(data_); }
  void free() {
    if (data_ == nullptr) return;
    if (device_.is_cuda()) {
      host::InContext in(device_.context());
      host::Driver::get().cuMemFree(address());
    } else {
      std::free(data_);
    }
    data_ = nullptr;
  }

  Device device_ = Device::cpu();
  void* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace flashinfer
