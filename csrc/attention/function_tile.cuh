// SPDX-License-Identifier: Apache-2.0
// What a mask that a caller writes is over a tile at once: a box of query heads, queries and keys of one request. Each
// operation of the function has a twin here on bounds of its operands (flashinfer/families/attention/variants/tiles.py
// prints the calls), whose result holds for every place of the tile. So "all keys are seen" and "none is" are proofs,
// and what is not proved is looked at key by key.
//
// Bounds of an integer are kept beside how it grows along each axis (affine arithmetic: Comba and Stolfi, 1993). Of a
// difference of two such what grows alike cancels, so that comparisons of affine functions are decided exactly.
//
// Integers of functions wrap around at 32 bits. Sums and products are bounded here in 64, where they do not; modulo
// 2^32 both agree, so it is enough to look, ahead of each operation that is no sum or product, whether its operands
// fit.
#pragma once

#include "attention/function.cuh"

namespace flashinfer {

namespace tile {

// A condition: whether there may be places where it holds, or where it does not.
struct Truth {
  bool may_hold, may_fail;

  FLASHINFER_FN static Truth unknown() { return {true, true}; }
  FLASHINFER_FN Seen seen() const { return !may_hold ? kSeesNone : may_fail ? kSeesSome : kSeesAll; }
};
FLASHINFER_FN Truth operator!(Truth x) {
  return {x.may_fail, x.may_hold};
}
FLASHINFER_FN Truth operator&(Truth x, Truth y) {
  return {x.may_hold && y.may_hold, x.may_fail || y.may_fail};
}
FLASHINFER_FN Truth operator|(Truth x, Truth y) {
  return {x.may_hold || y.may_hold, x.may_fail && y.may_fail};
}
FLASHINFER_FN Truth operator^(Truth x, Truth y) {
  return {(x.may_hold && y.may_fail) || (x.may_fail && y.may_hold),
          (x.may_hold && y.may_hold) || (x.may_fail && y.may_fail)};
}
FLASHINFER_FN Truth where(Truth condition, Truth x, Truth y) {
  return {(condition.may_hold && x.may_hold) || (condition.may_fail && y.may_hold),
          (condition.may_hold && x.may_fail) || (condition.may_fail && y.may_fail)};
}

// The least and the largest value of an integer.
struct Ends {
  int32_t low, high;

  FLASHINFER_FN static Ends unknown() { return {-2147483647 - 1, 2147483647}; }
  FLASHINFER_FN bool is_point() const { return low == high; }
};

// An integer: between low and high at the tile's first head, query and key, and so much more a step along each axis.
struct Affine {
  int64_t low, high, by_head, by_query, by_key;

  FLASHINFER_FN static Affine between(int32_t low, int32_t high) { return {low, high, 0, 0, 0}; }
  FLASHINFER_FN static Affine unknown() { return between(Ends::unknown().low, Ends::unknown().high); }
};
FLASHINFER_FN Affine qo_head_idx(const TileAt& at) {
  return {at.qo_heads.first, at.qo_heads.first, 1, 0, 0};
}
FLASHINFER_FN Affine q(const TileAt& at) {
  return {at.queries.first, at.queries.first, 0, 1, 0};
}
FLASHINFER_FN Affine k(const TileAt& at) {
  return {at.keys.first, at.keys.first, 0, 0, 1};
}
// The same all over the tile.
FLASHINFER_FN Affine everywhere(int32_t x) {
  return Affine::between(x, x);
}
FLASHINFER_FN Truth everywhere(bool x) {
  return {x, !x};
}

FLASHINFER_FN Affine operator+(const Affine& x, const Affine& y) {
  return {x.low + y.low, x.high + y.high, x.by_head + y.by_head, x.by_query + y.by_query, x.by_key + y.by_key};
}
FLASHINFER_FN Affine operator-(const Affine& x, const Affine& y) {
  return {x.low - y.high, x.high - y.low, x.by_head - y.by_head, x.by_query - y.by_query, x.by_key - y.by_key};
}
FLASHINFER_FN Affine operator-(const Affine& x) {
  return {-x.high, -x.low, -x.by_head, -x.by_query, -x.by_key};
}
FLASHINFER_FN Affine operator*(const Affine& x, int32_t factor) {
  const int64_t a = x.low * factor, b = x.high * factor;
  return {factor < 0 ? b : a, factor < 0 ? a : b, x.by_head * factor, x.by_query * factor, x.by_key * factor};
}

struct WideEnds {
  int64_t low, high;

  FLASHINFER_FN bool fit() const { return low == int32_t(low) && high == int32_t(high); }
};
FLASHINFER_FN WideEnds wide_ends_of(const Affine& x, const TileAt& at) {
  const int64_t heads = x.by_head * (int64_t(at.qo_heads.last) - at.qo_heads.first);
  const int64_t queries = x.by_query * (int64_t(at.queries.last) - at.queries.first);
  const int64_t keys = x.by_key * (int64_t(at.keys.last) - at.keys.first);
  return {x.low + (heads < 0 ? heads : 0) + (queries < 0 ? queries : 0) + (keys < 0 ? keys : 0),
          x.high + (heads > 0 ? heads : 0) + (queries > 0 ? queries : 0) + (keys > 0 ? keys : 0)};
}
// Of what is known to fit 32 bits, or looked at.
template <bool kFits>
FLASHINFER_FN Ends ends_of(const Affine& x, const TileAt& at) {
  const WideEnds ends = wide_ends_of(x, at);
  if (kFits || ends.fit()) return {int32_t(ends.low), int32_t(ends.high)};
  return Ends::unknown();
}

template <bool kFit>
FLASHINFER_FN Truth is_less(const Affine& x, const Affine& y, const TileAt& at) {
  if (!kFit && !(wide_ends_of(x, at).fit() && wide_ends_of(y, at).fit())) return Truth::unknown();
  const WideEnds difference = wide_ends_of(x - y, at);
  return {difference.low < 0, difference.high >= 0};
}
template <bool kFit>
FLASHINFER_FN Truth is_equal(const Affine& x, const Affine& y, const TileAt& at) {
  if (!kFit && !(wide_ends_of(x, at).fit() && wide_ends_of(y, at).fit())) return Truth::unknown();
  const WideEnds difference = wide_ends_of(x - y, at);
  return {difference.low <= 0 && difference.high >= 0, difference.low != 0 || difference.high != 0};
}

FLASHINFER_FN Affine hull(int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t low_ab = a < b ? a : b, low_cd = c < d ? c : d, high_ab = a < b ? b : a, high_cd = c < d ? d : c;
  return {low_ab < low_cd ? low_ab : low_cd, high_ab < high_cd ? high_cd : high_ab, 0, 0, 0};
}
FLASHINFER_FN Affine multiply(Ends x, Ends y) {
  return hull(int64_t(x.low) * y.low, int64_t(x.low) * y.high, int64_t(x.high) * y.low, int64_t(x.high) * y.high);
}
// By something positive that is the same all over the tile; else nothing is known.
FLASHINFER_FN Affine floor_divide(Ends x, Ends y) {
  if (!y.is_point() || y.low <= 0) return Affine::unknown();
  return Affine::between(function::floor_divide(x.low, y.low), function::floor_divide(x.high, y.low));
}
FLASHINFER_FN Affine modulo(Ends x, Ends y) {
  if (!y.is_point() || y.low <= 0) return Affine::unknown();
  const int32_t quotient = function::floor_divide(x.low, y.low);
  if (quotient != function::floor_divide(x.high, y.low)) return Affine::between(0, y.low - 1);
  return {x.low - int64_t(quotient) * y.low, x.high - int64_t(quotient) * y.low, 0, 0, 0};
}
FLASHINFER_FN Affine min(Ends x, Ends y) {
  return Affine::between(function::min(x.low, y.low), function::min(x.high, y.high));
}
FLASHINFER_FN Affine max(Ends x, Ends y) {
  return Affine::between(function::max(x.low, y.low), function::max(x.high, y.high));
}
FLASHINFER_FN Affine clamp(Ends x, Ends low, Ends high) {
  return Affine::between(function::min(function::max(x.low, low.low), high.low),
                         function::min(function::max(x.high, low.high), high.high));
}
FLASHINFER_FN Affine abs(Ends x) {
  if (x.low == -2147483647 - 1) return Affine::unknown();  // it stays negative
  if (x.low >= 0) return Affine::between(x.low, x.high);
  if (x.high <= 0) return Affine::between(-x.high, -x.low);
  return Affine::between(0, function::max(-x.low, x.high));
}
FLASHINFER_FN Affine where(Truth condition, Ends x, Ends y) {
  if (!condition.may_fail) return Affine::between(x.low, x.high);
  if (!condition.may_hold) return Affine::between(y.low, y.high);
  return Affine::between(function::min(x.low, y.low), function::max(x.high, y.high));
}
FLASHINFER_FN Affine to_int(Truth x) {
  return Affine::between(!x.may_fail, x.may_hold);
}

// Of entries of a tensor.
FLASHINFER_FN Ends point(int32_t x) {
  return {x, x};
}
FLASHINFER_FN Truth point(bool x) {
  return everywhere(x);
}
FLASHINFER_FN Truth point(uint8_t x) {
  return everywhere(x != 0);
}
FLASHINFER_FN Ends hull(Ends x, Ends y) {
  return {function::min(x.low, y.low), function::max(x.high, y.high)};
}
FLASHINFER_FN Truth hull(Truth x, Truth y) {
  return {x.may_hold || y.may_hold, x.may_fail || y.may_fail};
}
FLASHINFER_FN Affine over(Ends x) {
  return Affine::between(x.low, x.high);
}
FLASHINFER_FN Truth over(Truth x) {
  return x;
}

// Between what the entries of a tensor are that a tile reads, in rows and columns, or at one index: columns. Too many,
// or several where none are looked at, may be anything.
FLASHINFER_FN bool are_few(Ends rows, Ends columns, const TileAt& at) {
  const int64_t at_most = at.looks_at_entries ? 128 : 1;
  const int64_t num_rows = int64_t(rows.high) - rows.low + 1, num_columns = int64_t(columns.high) - columns.low + 1;
  return num_rows <= at_most && num_columns <= at_most && num_rows * num_columns <= at_most;
}
template <class Read>
FLASHINFER_FN auto entries_between(Ends rows, Ends columns, const TileAt& at, const Read& read) {
  using Hull = decltype(point(read(0, 0)));
  if (!are_few(rows, columns, at)) return Hull::unknown();
  Hull found = point(read(rows.low, columns.low));
  if (!at.looks_at_entries) return found;
  for (int32_t row = rows.low; row <= rows.high; ++row) {
#pragma unroll 8
    for (int32_t column = columns.low; column <= columns.high; ++column) found = hull(found, point(read(row, column)));
  }
  return found;
}

// Of entries that lie side by side.
template <class T>
FLASHINFER_FN auto hull_of(const T* entry, int32_t count) {
  using Vec = function::EntryVec<T>;
  constexpr int kVecLen = sizeof(Vec) / sizeof(T);
  auto found = point(function::read(entry));
#pragma unroll 1
  for (; count > 0 && reinterpret_cast<uint64_t>(entry) % sizeof(Vec) != 0; ++entry, --count) {
    found = hull(found, point(function::read(entry)));
  }
#pragma unroll 32 / kVecLen  // a line of memory at a time
  for (; count >= kVecLen; entry += kVecLen, count -= kVecLen) {
    const Vec vec = function::read_vec(entry);
#pragma unroll
    for (int i = 0; i < kVecLen; ++i) found = hull(found, point(vec.x[i]));
  }
#pragma unroll 1
  for (; count > 0; ++entry, --count) found = hull(found, point(function::read(entry)));
  return found;
}

// The same where the columns of a row lie side by side, num_columns from row(i) on.
template <class Row>
FLASHINFER_FN auto entries_between(Ends rows, Ends columns, const TileAt& at, int32_t num_columns, const Row& row) {
  using Hull = decltype(point(*row(0)));
  if (!are_few(rows, columns, at)) return Hull::unknown();
  const int32_t first = function::inside(columns.low, num_columns), last = function::inside(columns.high, num_columns);
  Hull found = point(function::read(row(rows.low) + first));
  if (!at.looks_at_entries) return found;
#pragma unroll 1
  for (int32_t i = rows.low; i <= rows.high; ++i) found = hull(found, hull_of(row(i) + first, last - first + 1));
  return found;
}

}  // namespace tile
}  // namespace flashinfer
