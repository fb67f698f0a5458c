// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: asked by the kernels, their planners and their twins on the CPU.
//
//   position of query i = kv_len - qo_len + i, of key j = j       the queries are the last tokens of their request
//   query i sees key j if  j < kv_len
//                     and  j <= position                          under a causal mask
//                     and  bit i * kv_len + j of the mask is set  under a custom one
//                     and  j is none of the queries' own keys, or bit j - (kv_len - qo_len) of row i of the mask is set
//                                                                 under a draft mask
//                     and  j <= position, where j is of the prefix, or position is, or both are of one item
//                                                                 under a mask of items
//                     and  j >= position - window_left            in a window
//                     and  the function of a caller says so       Config::Function
//
// keys_of() is the range outside of which a query sees nothing, whatever the kind of mask. Neither of its ends falls
// from one query to the next; so what a run of queries sees follows from its first and its last. A mask that hides
// keys inside that range too says so in has_holes(), and which in bits_of().
//
// A new kind of mask is an enumerator and a line in these three. docs/add_a_mask.md adds one.
#pragma once

#include "attention/function_tile.cuh"

namespace flashinfer {

enum MaskKind : int { kMaskNone = 0, kMaskCausal = 1, kMaskCustom = 2, kMaskDraft = 3, kMaskItems = 4 };

// Of a request under a mask of items: the tokens before its items, and where the places of those behind are: 0 for a
// delimiter, then 1, 2, … to the next. Tokens beyond `count` are delimiters.
struct ItemsOfRequest {
  int32_t prefix_len, begin, count;
};

// Indices [begin, end), of keys or of tiles of keys. Empty unless begin < end.
struct Range {
  int32_t begin, end;
};

// The rows of a tile: query heads, and positions of queries.
struct TileRows {
  Bounds qo_heads, queries;
};

FLASHINFER_FN int32_t position_of(int32_t qo_idx, int32_t qo_len, int32_t kv_len) {
  return kv_len - qo_len + qo_idx;
}

// 32 bits from first_bit on; bytes from num_bits / 8 on are not read.
FLASHINFER_FN uint32_t load_bits(const uint8_t* bytes, int64_t first_bit, int64_t num_bits) {
  const int64_t first_byte = first_bit >> 3, end_byte = (num_bits + 7) >> 3;
  uint64_t bits = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    if (first_byte + i < end_byte) bits |= uint64_t(bytes[first_byte + i]) << (8 * i);
  }
  return uint32_t(bits >> (first_bit & 7));
}

// What hides keys. In a kernel the compiler knows all of it but window_left, and drops what is not there; a planner is
// told at run time.
template <class Function>
struct VisibilityBy {
  int32_t mask;  // MaskKind
  bool has_window;
  int32_t window_left;
  int32_t request_idx = 0;         // of the queries asked for, to the function
  const Extras* extras = nullptr;  // of the function

  // The keys that a query may see.
  FLASHINFER_FN Range keys_of(int32_t position, int32_t kv_len) const {
    Range keys{0, kv_len};
    if (mask == kMaskCausal || mask == kMaskItems) keys.end = position + 1 < kv_len ? position + 1 : kv_len;
    if (has_window) {  // in an order that cannot overflow: positions may be negative, and the window as wide as int32
      const int32_t hidden = (position > 0 ? position : 0) - window_left;
      keys.begin = hidden > 0 ? hidden : 0;
    }
    if constexpr (Function::kHasBegin) {
      const int32_t first_key = Function::first_key(*extras, request_idx, position);
      keys.begin = first_key <= keys.begin ? keys.begin : first_key < kv_len ? first_key : kv_len;
    }
    if constexpr (Function::kHasEnd) {
      const int32_t last_key = Function::last_key(*extras, request_idx, position);
      keys.end = last_key >= keys.end ? keys.end : last_key < 0 ? 0 : last_key + 1;
    }
    return keys;
  }
  // Keys that a query does not see, among those. It may end before it begins.
  FLASHINFER_FN Range gap_of(int32_t position, int32_t kv_len) const {
    if constexpr (!Function::kHasGap) return {0, 0};
    const int32_t last_before = Function::last_before_gap(*extras, request_idx, position);
    const int32_t first_behind = Function::first_behind_gap(*extras, request_idx, position);
    return {last_before < 0        ? 0
            : last_before < kv_len ? last_before + 1
                                   : kv_len,
            first_behind < 0        ? 0
            : first_behind < kv_len ? first_behind
                                    : kv_len};
  }
  // Whether a gap is all that is hidden of a range; else the function says so too.
  static constexpr bool kGapIsAll = Function::kHasGap && !Function::kHasHoles;
  FLASHINFER_FN static bool is_in_gap(const Range& gap, int32_t idx) {
    return kGapIsAll && idx >= gap.begin && idx < gap.end;
  }
  // Whether ranges of keys begin past zero, or again behind a gap.
  FLASHINFER_FN bool has_begin() const { return has_window || Function::kHasBegin || kGapIsAll; }
  // Whether keys are hidden inside the range: by bits, or by the function.
  FLASHINFER_FN constexpr bool has_holes() const { return has_bits() || Function::kHasHoles; }
  FLASHINFER_FN constexpr bool has_bits() const {
    return mask == kMaskCustom || mask == kMaskDraft || mask == kMaskItems;
  }

  // Whether the function leaves a key inside the range.
  FLASHINFER_FN bool sees(int32_t qo_head_idx, int32_t position, int32_t kv_idx) const {
    if constexpr (Function::kHasHoles) return Function::sees(*extras, {request_idx, qo_head_idx, position, kv_idx});
    return true;
  }

  FLASHINFER_FN TileAt tile_at(const TileRows& rows, int32_t first_key, int32_t num_keys,
                               bool looks_at_entries = true) const {
    return {request_idx, rows.qo_heads, rows.queries, {first_key, first_key + num_keys - 1}, looks_at_entries};
  }
  // What the rows of a tile see of its keys, of what the function leaves inside the range: as far as that is proved.
  template <bool kLooksAtEntries = true>
  FLASHINFER_FN Seen sees_tile(const TileRows& rows, int32_t first_key, int32_t num_keys) const {
    if constexpr (!Function::kHasHoles) return kSeesAll;
    if constexpr (!Function::kProvesTiles || (!kLooksAtEntries && Function::kProvesByEntries)) return kSeesSome;
    return Function::sees_tile(*extras, tile_at(rows, first_key, num_keys, kLooksAtEntries));
  }

  // Where there are bits: which of 32 keys query qo_idx sees, bit k for key first_key + k. Bits of
  // keys outside of the range mean nothing.
  template <class Params>
  FLASHINFER_FN uint32_t bits_of(const Params& params, int32_t request_idx, int32_t qo_idx, int32_t first_key,
                                 int32_t qo_len, int32_t kv_len) const {
    if (mask == kMaskDraft) return bits_of_draft(params, request_idx, qo_idx, kv_len - qo_len - first_key, qo_len);
    if (mask == kMaskItems) return bits_of_items(params, request_idx, position_of(qo_idx, qo_len, kv_len), first_key);
    const uint8_t* bytes = params.mask_indptr == nullptr ? params.mask : params.mask + params.mask_indptr[request_idx];
    return load_bits(bytes, int64_t(qo_idx) * kv_len + first_key, int64_t(qo_len) * kv_len);
  }

  // The same where keys from first_draft on, counted from the first of the 32, are those of the queries. Every token
  // has a row of whole words of 32 bits.
  template <class Params>
  FLASHINFER_FN static uint32_t bits_of_draft(const Params& params, int32_t request_idx, int32_t qo_idx,
                                              int32_t first_draft, int32_t qo_len) {
    if (first_draft >= 32) return 0xffffffffu;
    if (qo_idx >= qo_len) return 0;
    const int64_t token_idx =
        qo_idx + (params.qo_indptr != nullptr ? int64_t(params.qo_indptr[request_idx]) : int64_t(request_idx) * qo_len);
    const int64_t num_bits = ceil_div(params.qo_len, 32) * 32;
    const uint8_t* row = params.mask + token_idx * (num_bits / 8);
    if (first_draft <= 0) return load_bits(row, -int64_t(first_draft), num_bits);
    return load_bits(row, 0, num_bits) << first_draft | bits_before(first_draft);
  }

  // The same where tokens behind a prefix are those of items. Of a delimiter, whose place is 0, no key up to its own is
  // one of its item.
  template <class Params>
  FLASHINFER_FN static uint32_t bits_of_items(const Params& params, int32_t request_idx, int32_t position,
                                              int32_t first_key) {
    const ItemsOfRequest items = reinterpret_cast<const ItemsOfRequest*>(params.mask_indptr)[request_idx];
    if (position < items.prefix_len) return 0xffffffffu;
    const int32_t idx = position - items.prefix_len;
    const int32_t place = idx < items.count ? reinterpret_cast<const uint16_t*>(params.mask)[items.begin + idx] : 0;
    return bits_before(items.prefix_len - first_key) | ~bits_before(position + 1 - place - first_key);
  }

  // Of a word, the bits before one.
  FLASHINFER_FN static uint32_t bits_before(int32_t bit) {
    if (bit <= 0) return 0;
    return bit < 32 ? (1u << bit) - 1 : 0xffffffffu;
  }

  // Whether an index is within a range of ours, of keys or of tiles.
  FLASHINFER_FN bool contains(const Range& range, int32_t idx) const {
    return idx < range.end && (!has_begin() || idx >= range.begin);
  }
  // Whether all of the keys [first, first + count) are, and none of them in the gap.
  FLASHINFER_FN bool contains_all(const Range& keys, int32_t first, int32_t count, const Range& gap = {0, 0}) const {
    const bool avoids_gap = !kGapIsAll || gap.end <= first || gap.begin >= first + count;
    return keys.end - first >= count && (!has_begin() || first >= keys.begin) && avoids_gap;
  }

  // Tiles of keys that a run of queries sees anything of. The others are left out.
  FLASHINFER_FN Range tiles_seen(int32_t first_position, int32_t last_position, int32_t kv_len,
                                 int32_t tile_len) const {
    const int32_t begin = keys_of(first_position, kv_len).begin, end = keys_of(last_position, kv_len).end;
    if (end <= begin) return {0, 0};
    return {begin / tile_len, ceil_div(end, tile_len)};
  }
  // Tiles that every query of the run sees whole; of a function that proves tiles, those of them that sees_tile() says.
  // The others are masked key by key.
  FLASHINFER_FN Range tiles_seen_whole(int32_t first_position, int32_t last_position, int32_t kv_len,
                                       int32_t tile_len) const {
    if (has_bits() || (Function::kHasHoles && !Function::kProvesTiles)) return {0, 0};
    int32_t begin = keys_of(last_position, kv_len).begin;
    if constexpr (kGapIsAll) {  // those behind it
      const int32_t behind_gap = gap_of(last_position, kv_len).end;
      begin = behind_gap <= begin ? begin : behind_gap;
    }
    return {ceil_div(begin, tile_len), keys_of(first_position, kv_len).end / tile_len};
  }

  // Tiles of keys inside the gap of a function, of which no query of a run sees anything.
  FLASHINFER_FN Range tiles_hidden(int32_t first_position, int32_t last_position, int32_t kv_len,
                                   int32_t tile_len) const {
    return {ceil_div(gap_of(last_position, kv_len).begin, tile_len), gap_of(first_position, kv_len).end / tile_len};
  }

  // tiles_seen of a tile of block_m query rows, where row r of a request is token r / group_size.
  FLASHINFER_FN Range tiles_of(int32_t q_tile, int32_t block_m, int32_t group_size, int32_t qo_len, int32_t kv_len,
                               int32_t block_n) const {
    const int32_t first_token = q_tile * block_m / group_size;
    int32_t last_token = (q_tile * block_m + block_m - 1) / group_size;
    if (last_token >= qo_len) last_token = qo_len - 1;
    return tiles_seen(position_of(first_token, qo_len, kv_len), position_of(last_token, qo_len, kv_len), kv_len,
                      block_n);
  }
  // tiles_hidden likewise.
  FLASHINFER_FN Range tiles_hidden_of(int32_t q_tile, int32_t block_m, int32_t group_size, int32_t qo_len,
                                      int32_t kv_len, int32_t block_n) const {
    const int32_t first_token = q_tile * block_m / group_size, last_row = q_tile * block_m + block_m - 1;
    const int32_t last_token = last_row / group_size < qo_len ? last_row / group_size : qo_len - 1;
    return tiles_hidden(position_of(first_token, qo_len, kv_len), position_of(last_token, qo_len, kv_len), kv_len,
                        block_n);
  }
};
using Visibility = VisibilityBy<NoFunction>;

// Of the queries of a request, in a kernel.
template <class Config>
FLASHINFER_FN VisibilityBy<typename Config::Function> visibility_of(const AttentionParams& params,
                                                                    int32_t request_idx) {
  return {Config::kMask, Config::kHasWindow, params.window_left, request_idx, &params.extras};
}

}  // namespace flashinfer
