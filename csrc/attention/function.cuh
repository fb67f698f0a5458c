// SPDX-License-Identifier: Apache-2.0
// What the functions of scores and masks that a caller writes (flashinfer/variants.py) are made of in C++. A Config has
// theirs as Config::Function, with the members of NoFunction; flashinfer/families/attention/variants/ prints it.
#pragma once

#include "attention/params.h"
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "device/fast_math.cuh"
#endif

namespace flashinfer {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = __builtin_bit_cast(float, 0xff800000u);  // the LSE of no key

// Where a score is: request and query head, positions of query and key. A row or a key that does not exist may be asked
// for as well: what comes of it is dropped, and no element outside of an extra tensor is read for it.
struct ScoreAt {
  int32_t request_idx, qo_head_idx, q, k;
};

// First and last, both included.
struct Bounds {
  int32_t first, last;
};

// Where a tile of scores is.
struct TileAt {
  int32_t request_idx;
  Bounds qo_heads, queries, keys;
  // Whether entries of tensors that the tile reads are looked at, or one at most.
  bool looks_at_entries;

  // Whether all positions are so small that sums of a few fit 32 bits. Beyond, nothing is proved.
  FLASHINFER_FN bool is_near() const {
    constexpr int32_t kFar = 1 << 28;
    return queries.first > -kFar && queries.last < kFar && keys.first >= 0 && keys.last < kFar;
  }

  // What is found of entries that the request and the keys alone lead to, by the kSite-th look at such. Who proves many
  // tiles over the same keys hides this by what remembers it.
  template <int kSite, class Find>
  FLASHINFER_FN auto of_keys(const Find& find) const {
    return find();
  }
};

// What the queries of a tile see of its keys.
enum Seen : int { kSeesNone = 0, kSeesSome = 1, kSeesAll = 2 };

struct NoFunction {
  static constexpr bool kHasScore = false;
  // Of a mask: whether it is a range of keys that begins past zero, that ends before the last, and whether keys inside
  // of the range are hidden: by sees(), and in a gap.
  static constexpr bool kHasBegin = false, kHasEnd = false, kHasHoles = false, kHasGap = false;
  // Whether sees_tile() may say of a tile that sees() is the same all over it.
  static constexpr bool kProvesTiles = false;
  // Whether it says so of no tile unless it looks at several entries of a tensor.
  static constexpr bool kProvesByEntries = false;
  static constexpr int kNumLooksByKeys = 0;  // TileAt::of_keys

  // logit = score() * scale(), of qk, the product before sm_scale. scale() > 0.
  FLASHINFER_FN static float scale(const Extras&, float) { return 1.f; }
  FLASHINFER_FN static float score(const Extras&, float, float qk, const ScoreAt&) { return qk; }
  FLASHINFER_FN static bool sees(const Extras&, const ScoreAt&) { return true; }
  template <class At>
  FLASHINFER_FN static Seen sees_tile(const Extras&, const At&) {
    return kSeesSome;
  }
  FLASHINFER_FN static int32_t first_key(const Extras&, int32_t, int32_t) { return 0; }
  FLASHINFER_FN static int32_t last_key(const Extras&, int32_t, int32_t) { return 0; }
  // The keys between these two, if there are any, are hidden. Neither falls from one query to the next.
  FLASHINFER_FN static int32_t last_before_gap(const Extras&, int32_t, int32_t) { return 0; }
  FLASHINFER_FN static int32_t first_behind_gap(const Extras&, int32_t, int32_t) { return 0; }
};

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// From exp2: tanh.approx is off by up to 5e-4, which a soft cap of 50 turns into 2.5% of a probability.
FLASHINFER_FN float soft_tanh(float x) {
  return fmaf(-2.f, fast_rcp(1.f + fast_exp2(2.f * kLog2E * x)), 1.f);
}
#else
FLASHINFER_FN float soft_tanh(float x) {
  return __builtin_tanhf(x);
}
#endif

// Elementary functions and operators, by the names that functions use.
namespace function {

// Entries of a tensor that are read at once, from an address that is a multiple of 16.
template <class T>
struct alignas(16) EntryVec {
  T x[16 / sizeof(T)];
};

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
FLASHINFER_FN float exp2(float x) {
  return fast_exp2(x);
}
FLASHINFER_FN float log2(float x) {
  return fast_log2(x);
}
FLASHINFER_FN float sqrt(float x) {
  return sqrtf(x);
}
FLASHINFER_FN float rsqrt(float x) {
  return rsqrtf(x);
}
FLASHINFER_FN float abs(float x) {
  return fabsf(x);
}
FLASHINFER_FN float divide(float x, float y) {
  return x * fast_rcp(y);
}
template <class T>
FLASHINFER_FN T read(const T* address) {
  return __ldg(address);
}
template <class T>
FLASHINFER_FN EntryVec<T> read_vec(const T* address) {
  return __builtin_bit_cast(EntryVec<T>, __ldg(reinterpret_cast<const int4*>(address)));
}
#else
FLASHINFER_FN float exp2(float x) {
  return __builtin_exp2f(x);
}
FLASHINFER_FN float log2(float x) {
  return __builtin_log2f(x);
}
FLASHINFER_FN float sqrt(float x) {
  return __builtin_sqrtf(x);
}
FLASHINFER_FN float rsqrt(float x) {
  return 1.f / __builtin_sqrtf(x);
}
FLASHINFER_FN float abs(float x) {
  return __builtin_fabsf(x);
}
FLASHINFER_FN float divide(float x, float y) {
  return x / y;
}
template <class T>
FLASHINFER_FN T read(const T* address) {
  return *address;
}
template <class T>
FLASHINFER_FN EntryVec<T> read_vec(const T* address) {
  return *reinterpret_cast<const EntryVec<T>*>(address);
}
#endif
FLASHINFER_FN float exp(float x) {
  return function::exp2(x * kLog2E);
}
FLASHINFER_FN float log(float x) {
  return function::log2(x) * 0.6931471805599453f;
}
FLASHINFER_FN float tanh(float x) {
  return soft_tanh(x);
}
FLASHINFER_FN int32_t abs(int32_t x) {
  return x < 0 ? int32_t(0u - uint32_t(x)) : x;
}
template <class T>
FLASHINFER_FN T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
FLASHINFER_FN T max(T x, T y) {
  return x < y ? y : x;
}

// As in Python: rounded down, and a remainder with the sign of the divisor. By zero: 0.
FLASHINFER_FN int32_t floor_divide(int32_t x, int32_t y) {
  if (y == 0) return 0;
  if (y == -1) return int32_t(0u - uint32_t(x));
  const int32_t quotient = x / y;
  return quotient - (x % y != 0 && (x < 0) != (y < 0));
}
FLASHINFER_FN int32_t modulo(int32_t x, int32_t y) {
  return int32_t(uint32_t(x) - uint32_t(floor_divide(x, y)) * uint32_t(y));
}
// By 0 to 31; anything else shifts all bits out.
FLASHINFER_FN int32_t shift_left(int32_t x, int32_t y) {
  return uint32_t(y) < 32 ? int32_t(uint32_t(x) << y) : 0;
}
FLASHINFER_FN int32_t shift_right(int32_t x, int32_t y) {
  return x >> (uint32_t(y) < 32 ? y : 31);
}

// In 32 bits that wrap around.
FLASHINFER_FN int32_t add(int32_t x, int32_t y) {
  return int32_t(uint32_t(x) + uint32_t(y));
}
FLASHINFER_FN int32_t subtract(int32_t x, int32_t y) {
  return int32_t(uint32_t(x) - uint32_t(y));
}
FLASHINFER_FN int32_t multiply(int32_t x, int32_t y) {
  return int32_t(uint32_t(x) * uint32_t(y));
}

// An index within an axis; one outside stands for the entry nearest to it.
FLASHINFER_FN uint32_t inside(int32_t idx, int32_t len) {
  const int32_t at_most = idx < len - 1 ? idx : len - 1;
  return uint32_t(at_most > 0 ? at_most : 0);
}
FLASHINFER_FN int32_t to_int(float x) {
  return x >= 2147483520.f ? 2147483520 : x <= -2147483648.f ? -2147483647 - 1 : x == x ? int32_t(x) : 0;
}

}  // namespace function
}  // namespace flashinfer
