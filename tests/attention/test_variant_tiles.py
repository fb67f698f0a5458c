# SPDX-License-Identifier: Apache-2.0
"""Which tiles of keys a mask leaves out: what kernels compute of it, on the host, beside every query and key."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import flashinfer
from examples import attention_variants as examples
from flashinfer import env
from flashinfer.families.attention.variants.cxx import function_of, has_gap, has_holes, has_range
from flashinfer.jit.source import include_root
from flashinfer.variants import BoundFunction, launch_functions

N = torch.tensor([0, 30, 9], dtype=torch.int32)


@flashinfer.mask(window=int, num_first=int)
def by_hand(b, h, q, k, x):
    return (k < x.num_first) & (k <= q) | (k > q - x.window) & (q >= k)


@flashinfer.mask(window=int, n="i32[batch_size]")
def hidden_by_not(b, h, q, k, x):
    return (k <= q) & ~((k >= x.n[b]) & (q - k > x.window))


@flashinfer.mask(chunk="int > 0", n="i32[batch_size]")
def own_chunk_and_prefix(b, h, q, k, x):
    return ((k >= q // x.chunk * x.chunk) | (k < x.n[b])) & (k <= q + 2)


@flashinfer.mask(window=int, num_first=int, n=int)
def of_two_gaps(b, h, q, k, x):
    return (k <= q) & ((q - k <= x.window) | (k < x.num_first)) & ((k < 200) | (k > x.n))


@flashinfer.mask()
def two_windows(b, h, q, k):
    return (k >= q - 150) & (k < q - 100) | (k >= q - 20) & (k <= q)


@flashinfer.mask(window=int)
def with_holes(b, h, q, k, x):
    return (k < 7) | (q - k < x.window) & ((q + k) % 3 == 0)


@flashinfer.mask(window=int, num_first=int)
def some_heads(b, h, q, k, x):
    return (q - k < x.window) & (h % 2 == 0) | (k < x.num_first)


@flashinfer.mask(n=int)
def falls(b, h, q, k, x):
    return (k < x.n - q) | (k >= q)


@flashinfer.mask(n=int)
def ends_alone(b, h, q, k, x):
    return (k < x.n) | (k <= q - 3)


@flashinfer.mask(n="i32[batch_size]")
def tree(b, h, q, k, x):
    """Of which all is seen before 200 and n, and behind it what no tile can be proved of."""
    return (k < 200 + x.n[b]) | ((q >> (k & 31)) & 1 == 1)


@flashinfer.mask(size="int > 0")
def blocks(b, h, q, k, x):
    return (k // x.size % 2 == 0) & (k <= q)


# With what a gap leaves to be found: all, or what of a mask is a gap.
GAPS = [
    examples.window_and_first(window=40, num_first=4),
    examples.window_and_first(window=0, num_first=100),
    examples.window_and_first(window=1 << 30, num_first=0),
    examples.window_and_first(window=150, num_first=20),
    by_hand(window=33, num_first=17),
    hidden_by_not(window=10, n=N),
    own_chunk_and_prefix(chunk=48, n=N),
    of_two_gaps(window=60, num_first=9, n=290),
    two_windows(),
    with_holes(window=25),
    some_heads(window=25, num_first=3),
]
WIDE = [*GAPS[2:4], tree(n=N), blocks(size=96)]  # so that there are tiles that are seen whole
NO_GAPS = [*WIDE[2:], falls(n=90), ends_alone(n=50), examples.causal(), examples.chunked(chunk=32)]
LENGTHS = [(300, 300), (64, 500), (1, 700), (257, 90)]  # of queries and keys
TILES = [(128, 4, 64), (64, 1, 16), (16, 8, 32)]  # rows of a tile, query heads of a KV head, keys of a tile

NUM_FIELDS = 13  # ahead of what is proved of each tile of keys
SEES_NONE, SEES_ALL = 0, 2

PROGRAM = r"""
#include "attention/visibility.cuh"

#include <cstring>

using namespace flashinfer;

template <class Function>
void list(int*& row, const unsigned char (&bytes)[128]) {
  Extras extras;
  std::memcpy(extras.bytes, bytes, sizeof(bytes));
  for (const auto& [qo_len, kv_len] : LENGTHS) {
    for (const auto& [block_m, group_size, block_n] : TILES) {
      for (int request_idx = 0; request_idx < 3; ++request_idx) {
        const VisibilityBy<Function> visibility{kMaskNone, false, -1, request_idx, &extras};
        for (int tile = 0; tile * block_m < qo_len * group_size; ++tile) {
          const Range seen = visibility.tiles_of(tile, block_m, group_size, qo_len, kv_len, block_n);
          const Range hidden = visibility.tiles_hidden_of(tile, block_m, group_size, qo_len, kv_len, block_n);
          const int last_row = tile * block_m + block_m - 1, last = last_row / group_size;
          const int first = position_of(tile * block_m / group_size, qo_len, kv_len);
          const Range whole = visibility.tiles_seen_whole(
              first, position_of(last < qo_len ? last : qo_len - 1, qo_len, kv_len), kv_len, block_n);
          const int values[] = {qo_len, kv_len, block_m, group_size, block_n, request_idx, tile,
                                seen.begin, seen.end, hidden.begin, hidden.end, whole.begin, whole.end};
          for (int value : values) *row++ = value;
          // As a warp of a kernel for every GPU whose rows are those of the tile.
          const TileRows rows = {{0, 7}, {first, position_of(last < qo_len ? last : qo_len - 1, qo_len, kv_len)}};
          for (int key_tile = 0; key_tile * block_n < kv_len; ++key_tile) {
            *row++ = visibility.sees_tile(rows, key_tile * block_n, block_n);
          }
        }
      }
    }
  }
}
"""


def program(masks: list[BoundFunction]) -> str:
    lines = [PROGRAM.replace("LENGTHS", "lengths").replace("TILES", "tiles")]
    tables = [("lengths", "int qo_len, kv_len;", LENGTHS), ("tiles", "int block_m, group_size, block_n;", TILES)]
    for name, fields, rows in tables:
        entries = ", ".join("{" + ", ".join(map(str, row)) + "}" for row in rows)
        lines.insert(0, f"static const struct {{ {fields} }} {name}[] = {{{entries}}};")
    calls = []
    for i, mask in enumerate(masks):
        made = launch_functions("op", None, mask, N.device, batch_size=3, num_qo_heads=8, num_kv_heads=2)
        assert made is not None
        lines.append(f"namespace f{i} {{\n{function_of(made.text)['Function']}\n}}")
        padded = made.extras + bytes(128 - len(made.extras))
        call = f"list<f{i}::Function>(row, {{{', '.join(map(str, padded))}}});"
        calls.append(f'extern "C" int list_{i}(int* to) {{ int* row = to; {call} return row - to; }}')
    return "\n".join([*lines, *calls])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[int]]]:
    """By mask, the rows that the program lists."""
    folder: Path = tmp_path_factory.mktemp("tiles")
    source, binary = folder / "tiles.cpp", folder / "tiles.so"
    source.write_text(program([*GAPS, *NO_GAPS]))
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{include_root()}"]
    subprocess.run([env.CXX.get() or "c++", *options, str(source), "-o", str(binary)], check=True)
    library, buffer, rows = ctypes.CDLL(str(binary)), (ctypes.c_int * (1 << 20))(), {}
    for i in range(len(GAPS) + len(NO_GAPS)):
        count, at, rows[i] = library[f"list_{i}"](buffer), 0, []
        assert 0 < count <= len(buffer)
        while at < count:
            _, kv_len, _, _, block_n, *_ = buffer[at : at + NUM_FIELDS]
            end = at + NUM_FIELDS - (-kv_len // block_n)
            rows[i].append(buffer[at:end])
            at = end
    return rows


def text(mask: BoundFunction) -> str:
    return flashinfer.variants.canonical(None, mask.function).text


def seen_by_any(mask: BoundFunction, request_idx: int, qo_len: int, kv_len: int) -> torch.Tensor:
    """bool [qo_len, kv_len], of any head."""
    b = torch.tensor(request_idx)
    h, q, k = (torch.arange(n) for n in (8, qo_len, kv_len))
    return (mask.evaluate(b, h[:, None, None], q[:, None] + kv_len - qo_len, k) + torch.zeros(8, 1, 1).bool()).any(0)


@pytest.mark.parametrize("i", range(len(GAPS) + len(NO_GAPS)), ids=[m.function.name for m in [*GAPS, *NO_GAPS]])
def test_tiles_left_out_and_seen_whole(i: int, found: dict[int, list[list[int]]]) -> None:
    mask, masks, num_hidden, num_missed = [*GAPS, *NO_GAPS][i], {}, 0, 0
    num_whole = 0
    for qo_len, kv_len, block_m, group_size, block_n, request_idx, tile, *ends in found[i]:
        key = (request_idx, qo_len, kv_len)
        if key not in masks:
            masks[key] = seen_by_any(mask, *key)
        rows = range(tile * block_m, min((tile + 1) * block_m, qo_len * group_size))
        tokens = masks[key][rows[0] // group_size : rows[-1] // group_size + 1]
        is_seen = [bool(tokens[:, at : at + block_n].any()) for at in range(0, kv_len, block_n)]
        begin, end, gap_begin, gap_end, whole_begin, whole_end, *proved = ends
        for key_tile in range(whole_begin, whole_end):
            if proved[key_tile] == SEES_ALL:
                num_whole += 1
                assert tokens[:, key_tile * block_n : (key_tile + 1) * block_n].all(), (found[i], key_tile)
        for key_tile, any_key in enumerate(is_seen):
            is_left_out = not begin <= key_tile < end or gap_begin <= key_tile < gap_end
            is_left_out = is_left_out or proved[key_tile] == SEES_NONE
            assert not (any_key and is_left_out), (found[i], key_tile)
        num_hidden += sum(not any_key for any_key in is_seen[begin : max(begin, end)])
        inside = range(max(begin, gap_begin), min(end, gap_end))
        num_missed += sum(not any_key for at, any_key in enumerate(is_seen) if begin <= at < end and at not in inside)
    assert num_whole > 0 or mask not in WIDE
    if mask in GAPS and num_hidden > 100:
        assert num_missed < 0.2 * num_hidden  # of queries and keys that are tiles


def test_what_has_a_gap() -> None:
    for mask in GAPS:
        assert has_gap(text(mask))
    names = {mask.function.name for mask in GAPS if not has_holes(text(mask))}
    assert names == {"window_and_first", "hidden_by_not", "own_chunk_and_prefix"}
    for mask in NO_GAPS:
        assert not has_gap(text(mask))
    for mask in (GAPS[0], by_hand(window=1, num_first=1), two_windows()):
        assert has_range(text(mask))  # of the part behind q
    documents: Any = examples.documents
    assert not has_gap(flashinfer.variants.canonical(None, documents).text)
