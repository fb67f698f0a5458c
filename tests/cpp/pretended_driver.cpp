// SPDX-License-Identifier: Apache-2.0
// A CUDA driver without a GPU: what is launched is written down, a line each, into the file PRETENDED_LAUNCHES. The GPU
// is of PRETENDED_CAPABILITY (90 for 9.0) and has PRETENDED_SMS multiprocessors. "Machine code" is an ELF header and a
// text behind it: the kernel's name, the bytes of its parameters, and how many blocks of it an SM holds. Of real
// machine code the name is what is asked for, and no parameters are written.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "flashinfer/driver.hpp"

namespace {

using flashinfer::host::LaunchConfig;

struct Function {
  char name[64];
  int num_bytes, blocks_per_sm, smem_bytes;
};

int number_of(const char* variable) {
  return std::atoi(std::getenv(variable));
}

void write_down(const std::string& line) {
  std::FILE* file = std::fopen(std::getenv("PRETENDED_LAUNCHES"), "a");
  std::fputs((line + "\n").c_str(), file);
  std::fclose(file);
}

int context_object;
void* current = nullptr;

}  // namespace

extern "C" {

int cuInit(unsigned) {
  return 0;
}
int cuGetExportTable(const void** table, const void*) {  // NVRTC asks for one, and does without
  return *table = nullptr, 801;
}
int cuGetErrorName(int, const char** name) {
  return *name = "CUDA_ERROR_PRETENDED", 0;
}
int cuDriverGetVersion(int* version) {
  return *version = 13000, 0;
}
int cuDeviceGetCount(int* count) {
  return *count = 1, 0;
}
int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, 0;
}
int cuDeviceGetAttribute(int* value, int which, int) {
  const int capability = number_of("PRETENDED_CAPABILITY");
  *value = which == 16 ? number_of("PRETENDED_SMS") : which == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  return *context = &context_object, 0;
}
int cuCtxGetCurrent(void** context) {
  return *context = current, 0;
}
int cuCtxSetCurrent(void* context) {
  return current = context, 0;
}
int cuCtxSynchronize() {
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int*) {
  return 0;
}
int cuStreamSynchronize(void*) {
  return 0;
}
int cuStreamCreate(void** stream, unsigned) {
  return *stream = &context_object, 0;
}
int cuStreamBeginCapture_v2(void*, int) {
  return write_down("capture begins"), 0;
}
int cuStreamEndCapture(void*, void** graph) {
  return *graph = &context_object, write_down("capture ends"), 0;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return *executable = graph, 0;
}
int cuGraphLaunch(void*, void*) {
  return write_down("graph"), 0;
}

int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  auto* function = new Function{};
  const char* text = static_cast<const char*>(code) + 64;
  if (std::sscanf(text, "%63s %d %d", function->name, &function->num_bytes, &function->blocks_per_sm) != 3)
    *function = {"", 0, 1, 0};
  return *library = function, 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  auto* function = static_cast<Function*>(library);
  if (function->name[0] == '\0') std::strncpy(function->name, name, sizeof(function->name) - 1);
  return *kernel = library, std::strcmp(function->name, name) == 0 ? 0 : 500;
}
int cuKernelGetFunction(void** function, void* kernel) {
  return *function = kernel, 0;
}
int cuFuncSetAttribute(void* function, int which, int value) {
  return static_cast<Function*>(function)->smem_bytes = value, which == 8 ? 0 : 1;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int, size_t) {
  return *blocks = static_cast<Function*>(function)->blocks_per_sm, 0;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* handle, void** parameters, void**) {
  if (current == nullptr) return 201;
  const auto* function = static_cast<Function*>(handle);
  char text[256];
  std::snprintf(text, sizeof(text), "%s grid %u,%u,%u block %u,%u,%u smem %u allowed %d stream %p", function->name,
                config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2],
                config->smem_bytes, function->smem_bytes, config->stream);
  std::string line = text;
  for (uint32_t i = 0; i < config->num_attributes; ++i) {
    const auto& attribute = config->attributes[i];
    std::snprintf(text, sizeof(text), " attribute %u:%u,%u,%u", attribute.id, attribute.value[0], attribute.value[1],
                  attribute.value[2]);
    line += text;
  }
  line += " params ";
  const auto* bytes = static_cast<const uint8_t*>(parameters[0]);
  for (int i = 0; i < function->num_bytes; ++i) {
    std::snprintf(text, sizeof(text), "%02x", bytes[i]);
    line += text;
  }
  return write_down(line), 0;
}

// The "descriptor" is what it was made of, as far as there is room.
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int promotion, int fill) {
  uint64_t words[16] = {uint64_t(address)};
  std::memcpy(words + 1, sizes, rank * 8);
  std::memcpy(words + 6, strides, (rank - 1) * 8);
  std::memcpy(words + 10, box, rank * 4);
  for (uint32_t i = 0; i < rank; ++i) words[13] = words[13] * 31 + steps[i];
  words[14] =
      uint64_t(type) << 48 | uint64_t(interleave) << 32 | uint64_t(swizzle) << 16 | uint64_t(promotion) << 8 | fill;
  std::memcpy(map, words, 128);
  return 0;
}

int cuMemAlloc_v2(uint64_t* address, size_t size) {
  return *address = uint64_t(std::aligned_alloc(256, (size / 256 + 1) * 256)), 0;
}
int cuMemFree_v2(uint64_t address) {
  return std::free(reinterpret_cast<void*>(address)), 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void*) {
  return std::memcpy(reinterpret_cast<void*>(to), from, size), 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void*) {
  return std::memcpy(to, reinterpret_cast<void*>(from), size), 0;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void*) {
  return std::memset(reinterpret_cast<void*>(to), value, size), 0;
}
int cuEventCreate(void** event, unsigned) {
  return *event = &context_object, 0;
}
int cuEventRecord(void*, void*) {
  return 0;
}
int cuEventSynchronize(void*) {
  return 0;
}
int cuEventElapsedTime(float* milliseconds, void*, void*) {
  return *milliseconds = 1.f, 0;
}
int cuEventDestroy_v2(void*) {
  return 0;
}
}
