// SPDX-License-Identifier: Apache-2.0
// How a decode launch is cut into chunks, and the walk of one chunk over its tiles.
#pragma once

#include "attention/decode/params.h"
#include "attention/kv_view.cuh"

namespace flashinfer {

// num_tiles tiles cut into at most max_chunks runs whose lengths differ by at most one, the longer ones first.
struct ChunkSplit {
  int32_t num_chunks, quotient, remainder;

  FLASHINFER_FN static ChunkSplit make(int32_t num_tiles, int32_t max_chunks) {
    const int32_t num_chunks = num_tiles < max_chunks ? num_tiles : max_chunks;
    if (num_chunks == 0) return {0, 0, 0};
    return {num_chunks, num_tiles / num_chunks, num_tiles % num_chunks};
  }
  FLASHINFER_FN int32_t first_tile(int32_t chunk_idx) const {
    return chunk_idx * quotient + (chunk_idx < remainder ? chunk_idx : remainder);
  }
  FLASHINFER_FN int32_t chunk_of(int32_t tile) const {
    const int32_t num_in_long = remainder * (quotient + 1);
    return tile < num_in_long ? tile / (quotient + 1) : remainder + (tile - num_in_long) / quotient;
  }
};

// Where a request's partial result of one chunk is kept. A chunk makes at most two: of the request it begins within and
// of the request that goes on after it. The latter starts in this chunk, which is what tells the two apart.
FLASHINFER_FN int32_t partial_slot(int32_t chunk_idx, bool request_starts_here) {
  return 2 * chunk_idx + (request_starts_here ? 1 : 0);
}

// The chunk of a single sequence needs no plan: it follows from the length alone.
FLASHINFER_FN DecodeChunk single_chunk(int32_t kv_len, int32_t first_key, int32_t tile_len, int32_t max_chunks,
                                       int32_t chunk_idx) {
  const int32_t num_tiles = ceil_div(kv_len - first_key, tile_len);
  const ChunkSplit split = ChunkSplit::make(num_tiles, max_chunks);
  const DecodeRequest request{0, kv_len, first_key, 0, 0, split.num_chunks, num_tiles, 0};
  const int32_t num_empty = kv_len == 0 ? 1 : 0;
  if (chunk_idx >= split.num_chunks) return {0, 0, 0, num_empty, request};
  const int32_t first_tile = split.first_tile(chunk_idx);
  return {0, first_tile, split.first_tile(chunk_idx + 1) - first_tile, num_empty, request};
}

// The request's row of q and out.
template <class Config>
FLASHINFER_FN int32_t token_of(const DecodeRequest& request) {
  if constexpr (Config::kIsMixed) return request.token_idx;
  return request.request_idx;
}

// One chunk's tiles in order. The request after the current one is loaded a request ahead.
struct TileWalk {
  DecodeRequest request, next;
  int32_t tile;                   // within request
  int32_t num_left;               // tiles left in the chunk, this one included
  const DecodeRequest* upcoming;  // address of next

  FLASHINFER_FN static TileWalk start(const DecodeChunk& chunk, const DecodeRequest* requests) {
    TileWalk walk;
    walk.request = chunk.request;
    walk.tile = chunk.first_tile;
    walk.num_left = chunk.num_tiles;
    walk.upcoming = requests + chunk.first_request + 1;
    walk.next = chunk.request;
    if (walk.crosses()) walk.next = *walk.upcoming;
    return walk;
  }

  FLASHINFER_FN bool done() const { return num_left <= 0; }
  FLASHINFER_FN int32_t num_in_request() const {  // tiles from this one to the end of the request or the chunk
    const int32_t rest = request.num_tiles - tile;
    return rest < num_left ? rest : num_left;
  }
  FLASHINFER_FN int32_t first_row(int32_t tile_len) const { return request.first_key + tile * tile_len; }

  FLASHINFER_FN void advance(int32_t num_tiles = 1) {
    tile += num_tiles;
    num_left -= num_tiles;
    if (tile < request.num_tiles || num_left <= 0) return;
    request = next;
    tile = 0;
    ++upcoming;
    if (crosses()) next = *upcoming;
  }

 private:
  FLASHINFER_FN bool crosses() const { return num_left > request.num_tiles - tile; }
};

}  // namespace flashinfer
