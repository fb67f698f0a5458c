// SPDX-License-Identifier: Apache-2.0
// What a caller hands over: tensors in the memory of a device, which stay the caller's.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flashinfer {

// All errors of this library; what() says what, expected, got, and the next step.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Dtype : int32_t { kFp32 = 0, kFp16 = 1, kBf16 = 2, kFp8E4m3 = 3, kFp8E5m2 = 4, kInt32 = 5, kInt64 = 6 };

// As specs, configs and registries spell it.
inline const char* name_of(Dtype dtype) {
  static const char* const kNames[] = {"fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int32", "int64"};
  return kNames[int(dtype)];
}

inline int itemsize_of(Dtype dtype) {
  static const int kSizes[] = {4, 2, 2, 1, 1, 4, 8};
  return kSizes[int(dtype)];
}

// A view. Strides count elements; the last axis is dense wherever an operator does not say otherwise.
struct Tensor {
  static constexpr int kMaxRank = 5;

  void* data = nullptr;
  Dtype dtype = Dtype::kFp32;
  int32_t rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  Tensor() = default;

  // Contiguous.
  Tensor(const void* address, Dtype type, std::initializer_list<int64_t> sizes)
      : data(const_cast<void*>(address)), dtype(type) {
    if (sizes.size() > kMaxRank) throw Error("a tensor has at most 5 axes");
    for (int64_t size : sizes) {
      if (size < 0) throw Error("a tensor has an axis of " + std::to_string(size) + "; expected 0 or more");
      shape[rank++] = size;
    }
    int64_t dense = 1;
    for (int32_t axis = rank - 1; axis >= 0; --axis) {
      stride[axis] = dense;
      dense *= shape[axis];
    }
  }

  Tensor(const void* address, Dtype type, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides)
      : Tensor(address, type, sizes) {
    if (strides.size() != sizes.size()) throw Error("a tensor has a stride for each axis");
    int32_t axis = 0;
    for (int64_t step : strides) stride[axis++] = step;
  }

  explicit operator bool() const { return data != nullptr; }

  int64_t numel() const {
    int64_t count = 1;
    for (int32_t axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
  }

  // Two axes swapped: a cache in layout HND, [pages, heads, page_size, head_dim], is cache.transposed(1, 2) here.
  Tensor transposed(int32_t a, int32_t b) const {
    Tensor view = *this;
    std::swap(view.shape[a], view.shape[b]);
    std::swap(view.stride[a], view.stride[b]);
    return view;
  }

  bool is_contiguous() const {
    int64_t dense = 1;
    for (int32_t axis = rank - 1; axis >= 0; --axis) {
      if (shape[axis] > 1 && stride[axis] != dense) return false;
      dense *= shape[axis];
    }
    return true;
  }

  // "bf16 [4, 32, 128]"
  std::string described() const {
    std::ostringstream text;
    text << name_of(dtype) << " [";
    for (int32_t axis = 0; axis < rank; ++axis) text << (axis ? ", " : "") << shape[axis];
    text << "]";
    return text.str();
  }
};

namespace host {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

// Shape, where a size of -1 is any, and dtype.
inline void require_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> sizes,
                          const char* axes) {
  bool fits = x.rank == int32_t(sizes.size());
  int32_t axis = 0;
  for (int64_t size : sizes) fits = fits && (size < 0 || x.shape[axis] == size), ++axis;
  if (fits) return;
  std::ostringstream expected;
  for (int64_t size : sizes)
    expected << (expected.tellp() > 0 ? ", " : "") << (size < 0 ? "any" : std::to_string(size));
  fail(op, ": ", name, " is ", x.described(), "; expected [", expected.str(), "], ", axes);
}

inline void require_dtype(const char* op, const char* name, const Tensor& x, Dtype expected) {
  require(x.dtype == expected, op, ": ", name, " is ", x.described(), "; expected ", name_of(expected));
}

inline void require_dense_rows(const char* op, const char* name, const Tensor& x) {
  const bool is_dense = x.rank > 0 && (x.shape[x.rank - 1] <= 1 || x.stride[x.rank - 1] == 1);
  require(is_dense, op, ": the last axis of ", name, " is not dense; expected a stride of 1");
}

inline void require_data(const char* op, const char* name, const Tensor& x) {
  require(x.data != nullptr || x.numel() == 0, op, ": ", name, " has no memory (its address is null)");
}

// Kernels of GPUs copy 16 bytes at a time.
inline void require_aligned_rows(const char* op, const char* name, const Tensor& x, bool is_cuda) {
  require_data(op, name, x);
  require_dense_rows(op, name, x);
  if (!is_cuda || x.numel() == 0) return;
  bool is_aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int32_t axis = 0; axis + 1 < x.rank; ++axis)
    is_aligned = is_aligned && (x.shape[axis] <= 1 || x.stride[axis] * itemsize_of(x.dtype) % 16 == 0);
  require(is_aligned, op, ": rows of ", name, " do not start at multiples of 16 bytes; expected an aligned tensor");
}

// An index tensor as kernels read it: contiguous, of one dimension.
inline void require_index(const char* op, const char* name, const Tensor& x, int64_t size, bool only_int32 = true) {
  const bool is_index = x.dtype == Dtype::kInt32 || (!only_int32 && x.dtype == Dtype::kInt64);
  require(is_index, op, ": ", name, " is ", x.described(), "; expected int32", only_int32 ? "" : " or int64");
  require(x.rank == 1 && x.is_contiguous() && (size < 0 || x.shape[0] == size), op, ": ", name, " is ", x.described(),
          "; expected a contiguous [", size < 0 ? std::string("any") : std::to_string(size), "]");
  require_data(op, name, x);
}

inline int64_t index_at(const Tensor& x, int64_t i) {
  return x.dtype == Dtype::kInt64 ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}

// On a CPU, where an index could lead anywhere: offsets that never fall and stay within `limit`.
inline void check_offsets(const char* op, const char* name, const Tensor& indptr, int64_t limit) {
  int64_t last = 0;
  for (int64_t i = 0; i < indptr.shape[0]; ++i) {
    const int64_t offset = index_at(indptr, i);
    require(offset >= last, op, ": ", name, "[", i, "] is ", offset, "; expected ", last, " or more");
    last = offset;
  }
  require(last <= limit, op, ": ", name, " ends at ", last, "; expected at most ", limit);
}

// The bitwise or of an address and of the strides in bytes, the last axis apart.
inline uint64_t alignment_of(const Tensor& x) {
  uint64_t bits = reinterpret_cast<uintptr_t>(x.data);
  for (int32_t axis = 0; axis + 1 < x.rank; ++axis) bits |= uint64_t(x.stride[axis] * itemsize_of(x.dtype));
  return bits;
}

// Elements per load: the largest power of two that divides the length, within 16 bytes and the alignment.
inline int vec_size(int itemsize, int64_t length, uint64_t alignment = 0) {
  const uint64_t lowest_bit = alignment & (~alignment + 1);
  const int bytes = alignment == 0 || lowest_bit > 16 ? 16 : int(lowest_bit);
  int size = bytes / itemsize > 0 ? bytes / itemsize : 1;
  while (length % size) size /= 2;
  return size;
}

inline int64_t ceil_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace host
}  // namespace flashinfer
