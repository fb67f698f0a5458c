# SPDX-License-Identifier: Apache-2.0
"""What is proved of a mask over a tile, compiled for the host, beside the mask at every place of the tile: never wrong,
and of affine comparisons never undecided."""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flashinfer
from examples import attention_variants as examples
from flashinfer import env
from flashinfer.families.attention.variants.cxx import function_of, proves_tiles
from flashinfer.jit.source import include_root
from flashinfer.variants import BoundFunction, launch_functions

NONE, SOME, ALL = range(3)
LONGEST, HEADS, FIRST_QUERIES = 400, 4, 32  # so many queries at positions below 0
FAR = 1 << 28  # TileAt::is_near()
INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
NUM_RANDOM, NUM_AFFINE = 60, 40

Tile = tuple[int, int, int, int, int, int, int]  # request, first and last head, query and key


@dataclass(frozen=True)
class Case:
    """A mask, of which nothing is taken for a range, with packed extras, several of the same layout."""

    name: str
    text: str
    extras: tuple[bytes, ...]
    tiles: tuple[Tile, ...]
    held: Any = None  # whose memory the extras point to


PROGRAM = r"""
#include "attention/visibility.cuh"

#include <cstring>

using namespace flashinfer;

template <class Function>
void judge(const void* bytes, const int32_t* tiles, int num_tiles, uint8_t* proved, uint8_t* is) {
  Extras extras;
  std::memcpy(extras.bytes, bytes, sizeof(extras.bytes));
  for (int i = 0; i < num_tiles; ++i, tiles += 7) {
    const TileAt at = {tiles[0], {tiles[1], tiles[2]}, {tiles[3], tiles[4]}, {tiles[5], tiles[6]}, true};
    proved[i] = Function::sees_tile(extras, at);
    bool any = false, all = true;
    for (int64_t h = tiles[1]; h <= tiles[2]; ++h) {
      for (int64_t q = tiles[3]; q <= tiles[4]; ++q) {
        for (int64_t k = tiles[5]; k <= tiles[6]; ++k) {
          const bool sees = Function::sees(extras, {tiles[0], int32_t(h), int32_t(q), int32_t(k)});
          any = any || sees, all = all && sees;
        }
      }
    }
    is[i] = !any ? kSeesNone : all ? kSeesAll : kSeesSome;
  }
}
"""


def without_range(text: str) -> str:
    """The same mask as a text in which every key is looked at."""
    before, _, sees = text.partition("sees = ")
    return f"{before}sees = ({sees.partition('; ')[0]} ^ False)"


# ---------------------------------------------------------------------------------------------------- masks of the docs


@flashinfer.mask(slope=int, offset=int)
def affine(b, h, q, k, x):
    return (x.slope * k - 2 * q <= x.offset + h) & (k - q < q + 7)


@flashinfer.mask(window=int, num_first=int)
def of_every_other(b, h, q, k, x):
    """Which has a gap and holes."""
    return (k <= q) & ((q - k <= x.window) | (k < x.num_first)) & (k % 64 < 32)


@flashinfer.mask(chunk="int > 0", n=int)
def chunks_or_first(b, h, q, k, x):
    return (q // x.chunk == k // x.chunk) | (max(k - x.n, 0) == 0)


@flashinfer.mask(is_seen="bool[batch_size, n, m]")
def blocks(b, h, q, k, x):
    return x.is_seen[b, q // 16, k // 16]


@flashinfer.mask(is_seen="bool[batch_size, n]")
def seen_keys(b, h, q, k, x):
    """Entries side by side, and fewer than keys."""
    return x.is_seen[b, k]


@flashinfer.mask(window="i32[num_heads]")
def window_of_head(b, h, q, k, x):
    return abs(q - k) <= x.window[h]


def masks() -> list[BoundFunction]:
    generator = torch.Generator().manual_seed(3)
    document = (torch.arange(LONGEST) // 50).int().expand(3, -1).contiguous()
    seen = torch.tensor([0, 32, 200], dtype=torch.int32)
    words = torch.randint(0, 1 << 16, (3, LONGEST), generator=generator).int()
    return [
        examples.causal(),
        examples.window_and_first(window=40, num_first=4),
        examples.window_and_first(window=-3, num_first=-3),
        examples.window_and_first(window=1 << 30, num_first=-(1 << 30)),
        examples.prefix_lm(prefix_len=seen),
        examples.documents(document=document),
        examples.documents(document=torch.nn.functional.pad(document, (3, 5))[:, 3:-5]),  # no multiple of 16 bytes
        examples.tree(num_seen=seen, ancestors=words),
        examples.chunked(chunk=64),
        examples.some_heads_local(is_local=torch.tensor([True, False, True, True]), window=20),
        affine(slope=3, offset=-40),
        affine(slope=-2, offset=-500),
        of_every_other(window=40, num_first=4),
        chunks_or_first(chunk=48, n=30),
        blocks(is_seen=torch.rand(3, 25, 25, generator=generator) < 0.5),
        seen_keys(is_seen=torch.rand(3, 9, generator=generator).repeat_interleave(43, 1)[:, 1:] < 0.5),
        window_of_head(window=torch.tensor([10, 20, -1, 300], dtype=torch.int32)),
    ]


TILES_OF_DOCS = tuple(
    (b, h, last_head, q, q + num_q - 1, k, k + num_k - 1)
    for b in range(3)
    for h, last_head in ((0, 3), (2, 2))
    for num_q, num_k in ((1, 16), (32, 64))
    for q in range(-num_q, LONGEST - num_q, 8 * num_q + 24)
    for k in range(0, LONGEST - num_k, num_k)
)
# Of the tiles that are full or empty, the share of those of which that is not proved, where there are any: shifts by
# what differs from key to key, and ends that exclude each other in a tile that neither of them leaves out.
UNDECIDED = {"tree": 0.8, "window_and_first": 0.01}


def of_docs() -> list[Case]:
    cases = []
    for mask in masks():
        made = launch_functions("op", None, mask, torch.device("cpu"), batch_size=3, num_qo_heads=4, num_kv_heads=2)
        assert made is not None
        cases.append(Case(mask.function.name, without_range(made.text), (made.extras,), TILES_OF_DOCS, mask))
    return cases


# ------------------------------------------------------------------------------------------------- random expressions

DECLARED = "x0: int; x1: int; x2: int > 0; x3: i32[_]; x4: bool[num_heads]; "
TABLE = torch.tensor([5, -3, 17, INT_MIN, INT_MAX, 0, 1 << 30], dtype=torch.int32)
FLAGS = torch.tensor([True, False, True, True])
HOSTILE = (0, 1, -1, 2, 31, 32, -7, 1 << 15, 1 << 29, 1 << 30, -(1 << 30), INT_MAX, INT_MIN)


def pack(x0: int, x1: int, x2: int) -> bytes:
    numbers = struct.pack("3i4x", x0, x1, x2)  # tensors begin at multiples of 8
    return numbers + struct.pack("Pi4x", TABLE.data_ptr(), len(TABLE)) + struct.pack("Pi", FLAGS.data_ptr(), len(FLAGS))


class Grammar:
    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def condition(self, depth: int) -> str:
        draw = self._draw
        if depth == 0 or draw.random() < 0.2:
            number = draw.choice([f"({self.number(depth)} {{}} {self.number(depth)})"] * 8 + ["x.x4[h]", "x.x4[q]"])
            return number.format(draw.choice(["<", "<=", ">", ">=", "==", "!="]))
        a, b, c = (self.condition(depth - 1) for _ in range(3))
        return draw.choice([f"({a} & {b})", f"({a} | {b})", f"(~{a})", f"({a} ^ {b})", f"where({a}, {b}, {c})"])

    def number(self, depth: int) -> str:
        draw = self._draw
        if depth == 0 or draw.random() < 0.15:
            return draw.choice(["q", "k", "h", "b", "x.x0", "x.x1", "x.x2", str(draw.choice([0, 1, 3, 64, 1000]))])
        a, b, c = (self.number(depth - 1) for _ in range(3))
        return draw.choice([
            *[f"({a} {op} {b})" for op in ("+", "-", "*", "//", "%", "&", "|", "^", "<<", ">>")], f"({a} + {b})",
            f"({a} - {b})", f"({a} * x.x1)", f"({a} // x.x2)", f"({a} % x.x2)", f"(-{a})", f"(~{a})", f"abs({a})",
            f"min({a}, {b})", f"max({a}, {b})", f"clamp({a}, {b}, {c})", f"where({self.condition(0)}, {a}, {b})",
            f"int({self.condition(0)})", f"x.x3[{a}]", f"int(({a} * 0.5))",
        ])  # fmt: skip

    def sum(self, depth: int) -> str:
        """Affine in h, q and k."""
        draw = self._draw
        if depth == 0:
            return draw.choice(["q", "k", "q", "k", "h", "x.x0", "x.x2", "(x.x0 * k)", "(q * x.x1)", "17"])
        a, b = self.sum(depth - 1), self.sum(depth - 1)
        return draw.choice([f"({a} + {b})", f"({a} - {b})", f"(-{a})", f"({a} * {draw.randint(-2, 2)})"])


def tiles_at(draw: random.Random, queries: Sequence[int], keys: Sequence[int], count: int) -> tuple[Tile, ...]:
    found = []
    for _ in range(count):
        h, q, k = draw.randrange(HEADS), draw.choice(queries), draw.choice(keys)
        lengths = draw.choice([1, 2]), draw.choice([1, 4, 30]), draw.choice([1, 8, 50])
        last = [min(first + n - 1, end) for first, n, end in zip((h, q, k), lengths, (HEADS - 1, INT_MAX, INT_MAX))]
        found.append((draw.randrange(3), h, last[0], q, last[1], k, last[2]))
    return tuple(found)


def drawn() -> list[Case]:
    draw = random.Random(11)
    far = [FAR - 20, FAR - 3, 1 << 30, INT_MAX - 5]
    queries, keys = [*range(-20, 200, 7), 1 - FAR, *far], [*range(0, 200, 5), *far]
    cases = []
    while len(cases) < NUM_RANDOM:
        text = without_range(f"{DECLARED}sees = {Grammar(draw).condition(3)}")
        if proves_tiles(text):
            extras = [pack(draw.randint(-60, 60), draw.randint(-60, 60), draw.randint(1, 60)) for _ in range(4)]
            extras += [pack(draw.choice(HOSTILE), draw.choice(HOSTILE), draw.choice(HOSTILE)) for _ in range(8)]
            cases.append(Case(f"random_{len(cases)}", text, tuple(extras), tiles_at(draw, queries, keys, 60)))
    return cases


def drawn_affine() -> list[tuple[Case, Case, Case]]:
    """Two comparisons, and both."""
    draw = random.Random(12)
    found = []
    for i in range(NUM_AFFINE // 2):
        parts = [f"({Grammar(draw).sum(2)} {draw.choice(['<', '<=', '>', '>='])} {Grammar(draw).sum(2)})" for _ in "ab"]
        extras = tuple(pack(draw.randint(-9, 9), draw.randint(-9, 9), draw.randint(1, 400)) for _ in range(6))
        tiles = tiles_at(draw, range(-20, 200), range(200), 80)
        texts = [without_range(f"{DECLARED}sees = {one}") for one in (*parts, f"({parts[0]} & {parts[1]})")]
        a, b, both = (Case(f"affine_{i}_{which}", one, extras, tiles) for which, one in enumerate(texts))
        found.append((a, b, both))
    return found


# --------------------------------------------------------------------------------------------------------------- tests

Judge = Callable[[Case], list[tuple[Tile, bytes, int, int]]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """For every tile of a case what is proved, and what is."""
    affine_cases = [case for three in drawn_affine() for case in three]
    texts = list(dict.fromkeys(case.text for case in (*of_docs(), *drawn(), *affine_cases) if proves_tiles(case.text)))
    lines = [PROGRAM]
    for i, text in enumerate(texts):
        lines.append(f"namespace f{i} {{\n{function_of(text)['Function']}\n}}")
        lines.append(
            f'extern "C" void judge_{i}(const void* x, const int32_t* t, int n, uint8_t* p, uint8_t* is) {{ '
            f"judge<f{i}::Function>(x, t, n, p, is); }}"
        )
    folder: Path = tmp_path_factory.mktemp("proofs")
    source, binary = folder / "proofs.cpp", folder / "proofs.so"
    source.write_text("\n".join(lines))
    # Sums of 64 bits do not wrap around, or it ends here.
    checks = ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", *checks, f"-I{include_root()}", "-o", str(binary)]
    subprocess.run([env.CXX.get() or "c++", *options, str(source)], check=True)
    library = ctypes.CDLL(str(binary))

    def judge(case: Case) -> list[tuple[Tile, bytes, int, int]]:
        found = []
        tiles = (ctypes.c_int32 * (7 * len(case.tiles)))(*(value for tile in case.tiles for value in tile))
        for extras in case.extras:
            proved, is_so = (bytearray(len(case.tiles)) for _ in range(2))
            arrays = [(ctypes.c_uint8 * len(case.tiles)).from_buffer(one) for one in (proved, is_so)]
            padded = extras + bytes(128 - len(extras))
            library[f"judge_{texts.index(case.text)}"](padded, tiles, len(case.tiles), *arrays)
            found += zip(case.tiles, [extras] * len(case.tiles), proved, is_so)
        return found

    return judge


def test_masks_of_the_docs(judged: Judge) -> None:
    for case, mask in zip(of_docs(), masks()):
        b, h, k = torch.arange(3)[:, None, None, None], torch.arange(HEADS)[:, None, None], torch.arange(LONGEST)
        q = torch.arange(-FIRST_QUERIES, LONGEST)[:, None]
        seen = mask.evaluate(b, h, q, k) | torch.zeros(3, HEADS, len(q), LONGEST, dtype=torch.bool)
        num_sure = num_missed = 0
        for tile, _, proved, is_so in judged(case):
            request, *ends = tile
            h0, h1, q0, q1, k0, k1 = ends
            part = seen[request, h0 : h1 + 1, q0 + FIRST_QUERIES : q1 + 1 + FIRST_QUERIES, k0 : k1 + 1]
            assert is_so == (ALL if part.all() else SOME if part.any() else NONE), (case.name, tile)
            assert proved in (SOME, is_so), (case.name, tile)
            num_sure += is_so != SOME
            num_missed += proved != is_so
        assert num_sure > 1000, case.name
        assert num_missed <= UNDECIDED.get(case.name, 0.0) * num_sure, (case.name, num_missed, num_sure)


def test_random_masks_are_never_wrong(judged: Judge) -> None:
    """Also where integers wrap around, and where positions are so far that nothing is proved."""
    num_proved = 0
    for case in drawn():
        for tile, extras, proved, is_so in judged(case):
            assert proved in (SOME, is_so), (case.text, tile, extras)
            num_proved += proved != SOME
    assert num_proved > 20000


def test_affine_comparisons_are_decided(judged: Judge) -> None:
    """A comparison always; of two, joined by &, that both hold everywhere, or that one holds nowhere."""
    counts = dict.fromkeys((NONE, SOME, ALL), 0)
    for three in drawn_affine():
        for a, b, both in zip(*map(judged, three)):
            for _, _, proved, is_so in (a, b):
                assert proved == is_so, (three, a, b)
                counts[is_so] += 1
            assert both[2] == min(a[3], b[3]) and both[2] in (SOME, both[3]), (three, both)
    assert min(counts.values()) > 500
