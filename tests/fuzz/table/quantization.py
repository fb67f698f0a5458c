# SPDX-License-Identifier: Apache-2.0
"""Packing of booleans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from flashinfer.quantization import segment_packbits_padded
from tests.fuzz.call import Call, Check, Refused, equal, pair
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case
from tests.fuzz.table.indices import offsets
from tests.oracles import quantization as oracle


def _booleans(d: Draw, count: int) -> torch.Tensor:
    bits = torch.rand(count, generator=d.torch) < 0.5
    return d.dense(bits if d.chance(0.7) else bits.to(d.choice((torch.uint8, torch.int32, torch.float32))))


def _bits(x: Any, bitorder: Any) -> list[bool]:
    if not isinstance(x, torch.Tensor) or x.dim() != 1 or bitorder not in ("big", "little"):
        raise Refused("no vector, or an unknown order")
    return [bool(entry) for entry in x.tolist()]


def _packbits(d: Draw) -> Iterator[Call]:
    def expect(x: Any, bitorder: Any) -> Mapping[str, Check]:
        return {"return": equal(torch.tensor(oracle.packbits(_bits(x, bitorder), bitorder), dtype=torch.uint8))}

    arguments = {"x": _booleans(d, d.choice((0, 1, 7, 8, 9, 64, 1001))), "bitorder": d.kernel("little", "big")}
    yield from d.maybe_hostile(Call("packbits", flashinfer.packbits, arguments, expect))


def _segments(d: Draw, name: str, function: Any, is_padded: bool) -> Iterator[Call]:
    lengths = d.lengths(d.random.randint(0, 5), 20)
    begin, rest = d.choice((0, 0, 0, 3)), d.choice((0, 0, 5))
    indptr = d.index([begin + sum(lengths[:i]) for i in range(len(lengths) + 1)])

    def expect(x: Any, indptr: Any, bitorder: Any) -> Mapping[str, Check]:
        bits = _bits(x, bitorder)
        starts = offsets("indptr", indptr, None, len(bits))
        packed, packed_indptr = [], [0]
        for start, end in itertools.pairwise(starts):
            packed += oracle.packbits(bits[start:end], bitorder)
            packed_indptr.append(len(packed))
        if is_padded and len(starts) > 1:
            packed += [0] * ((len(bits) + 7 * (len(starts) - 1)) // 8 - len(packed))
        ends = equal(torch.tensor(packed_indptr, dtype=indptr.dtype))
        return {"return": pair(equal(torch.tensor(packed, dtype=torch.uint8)), ends)}

    arguments = {
        "x": _booleans(d, begin + sum(lengths) + rest),
        "indptr": indptr,
        "bitorder": d.kernel("little", "big"),
    }
    yield from d.maybe_hostile(Call(name, function, arguments, expect))


CASES: dict[str, Case] = {
    "packbits": _packbits,
    "segment_packbits": lambda d: _segments(d, "segment_packbits", flashinfer.segment_packbits, False),
    "segment_packbits_padded": lambda d: _segments(d, "segment_packbits_padded", segment_packbits_padded, True),
}
