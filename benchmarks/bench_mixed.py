# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of one batch, beside prefill followed by decode: microseconds.

python benchmarks/bench_mixed.py [--only "64 x 4096"] [--parts] [--peer FOLDER] [--json]

bf16, pages of 16 in a random order; 32 query heads on 8 and head_dim 128 unless the name says otherwise. 31 cases are
written down; 60 are drawn, their lengths alike or up to eight times apart, and had no part in the numbers that the
planner estimates by (csrc/attention/prefill/share.h).

`BatchAttention` takes all requests at once; the others are `BatchPrefillWithPagedKVCacheWrapper` and
`BatchDecodeWithPagedKVCacheWrapper`, one behind the other, and with --parts each alone, and the former over all
requests. All are timed in turns inside CUDA graphs, one behind the other twice: how far these two differ is what less
says nothing. Slower is a case whose ratio is below 0.99.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
from common import (
    DEVICE,
    Row,
    Times,
    device_us_in_turns,
    environment,
    parser_of,
    print_failures,
    print_table,
    run,
    table,
    write_results,
)
from compare import SLOWER

import flashinfer

HEADS, HEAD_DIM, PAGE_SIZE = (32, 8), 128, 16  # unless a case says otherwise
DRAWN_HEADS = [(32, 8)] * 5 + [(64, 8), (64, 8), (32, 32), (16, 8), (28, 4), (40, 8)]
SERIAL, AGAIN, WHOLE = "one behind the other", "once more", "prefill's wrapper"
SCALE = 1 if DEVICE == "cuda" else 32  # of lengths, on a CPU


@dataclass(frozen=True)
class Case:
    """A batch: queries and keys of each request, those that are prefilled first."""

    name: str
    prefills: Sequence[tuple[int, int]]
    decodes: Sequence[int]  # keys of each
    heads: tuple[int, int] = HEADS
    head_dim: int = HEAD_DIM

    @property
    def lengths(self) -> list[tuple[int, int]]:
        requests = [*self.prefills, *((1, kv_len) for kv_len in self.decodes)]
        return [(max(1, qo_len // SCALE), max(1, kv_len // SCALE)) for qo_len, kv_len in requests]


def alike(
    prefills: tuple[int, int, int], decodes: tuple[int, int], heads: tuple[int, int] = HEADS, head_dim: int = HEAD_DIM
) -> Case:
    """Requests, queries and keys of each; requests, keys of each."""
    count, qo_len, kv_len = prefills
    on = f" on {kv_len}" if kv_len != qo_len else ""
    name = f"{count} x {qo_len}{on} + {decodes[0]} x {decodes[1]}{_shape(heads, head_dim)}"
    return Case(name, [(qo_len, kv_len)] * count, [decodes[1]] * decodes[0], heads, head_dim)


def drawn(seed: int) -> Case:
    """One of some 20 to 1500 microseconds, whose lengths are alike or up to three octaves apart."""
    draw = random.Random(seed)

    def some(low: float, high: float) -> int:
        return round(2 ** draw.uniform(low, high))

    while True:
        heads, head_dim = draw.choice(DRAWN_HEADS), draw.choice((128, 128, 128, 64))
        counts, qo_len, kv_len = (some(0, 5), some(0, 8)), some(6, 13), some(6, 16)
        octaves, prefix = draw.choice((0, 0, 1, 2)), draw.choice((0, 0, 0, some(6, 14)))

        def around(length: int, octaves: int = octaves) -> int:
            return max(1, round(length * 2 ** draw.uniform(-octaves, octaves / 2)))

        prefills = [(length, length + prefix) for length in (around(qo_len) for _ in range(counts[0]))]
        decodes = [around(kv_len) for _ in range(counts[1])]
        row_bytes = heads[1] * head_dim * 4
        flops = sum(4 * heads[0] * head_dim * qo_len * (kv_len - qo_len / 2) for qo_len, kv_len in prefills)
        us = flops / 6e8 + sum(decodes) * row_bytes / 4.3e6
        num_bytes = (sum(kv_len for _, kv_len in prefills) + sum(decodes)) * row_bytes
        if 20 < us < 1500 and num_bytes < 6e9 and sum(qo_len for qo_len, _ in prefills) < 40000:
            means = (sum(lengths) // len(lengths) for lengths in ([qo_len for qo_len, _ in prefills], decodes))
            sizes = " + ".join(f"{count} x ~{mean}" for count, mean in zip(counts, means))
            on = f", prefixes of {prefix}" if prefix else ""
            return Case(f"drawn {seed}: {sizes}{on}{_shape(heads, head_dim)}", prefills, decodes, heads, head_dim)


def _shape(heads: tuple[int, int], head_dim: int) -> str:
    shape = f", {heads[0]}/{heads[1]}" if heads != HEADS else ""
    return shape + (f", head_dim {head_dim}" if head_dim != HEAD_DIM else "")


CASES = [
    alike((8, 1024, 1024), (64, 4096)),
    alike((16, 1024, 1024), (128, 2048)),
    alike((1, 4096, 4096), (16, 4096)),
    alike((1, 512, 8192), (64, 4096)),
    alike((2, 512, 512), (64, 4096)),
    alike((1, 256, 256), (64, 4096)),
    alike((4, 2048, 2048), (4, 1024)),
    alike((1, 2048, 2048), (8, 32768)),
    alike((0, 1, 1), (64, 4096)),
    alike((8, 1024, 1024), (0, 1)),
    alike((1, 8192, 8192), (128, 1024)),
    alike((1, 8192, 8192), (1, 4096)),
    alike((32, 256, 256), (32, 2048)),
    alike((64, 128, 128), (256, 512)),
    alike((2, 16384, 16384), (8, 4096)),
    alike((4, 512, 16384), (16, 16384)),
    alike((1, 1024, 1024), (1, 131072)),
    alike((1, 2048, 2048), (256, 128)),
    alike((1, 64, 4096), (128, 2048)),
    alike((3, 700, 2500), (40, 3000)),
    alike((4, 1024, 1024), (32, 2048), (32, 32)),
    alike((1, 512, 512), (16, 4096), (32, 32)),
    alike((1, 2048, 8192), (8, 8192), (32, 32)),
    alike((8, 1024, 1024), (64, 4096), (64, 8)),
    alike((1, 512, 512), (64, 4096), (64, 8)),
    alike((4, 2048, 2048), (16, 8192), (64, 8)),
    alike((8, 1024, 1024), (64, 4096), HEADS, 64),
    alike((1, 512, 512), (64, 4096), HEADS, 64),
    alike((2, 4096, 4096), (16, 2048), HEADS, 64),
    alike((4, 1024, 1024), (32, 2048), (32, 32), 64),
    alike((8, 1024, 1024), (64, 4096), (64, 8), 64),
    *(drawn(seed) for seed in range(200, 260)),
]


class Problem:
    """Index tensors of all requests, of those that are prefilled, and of those that are decoded."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.count = case, len(case.prefills)
        qo_lens, kv_lens = (torch.tensor(lens) for lens in zip(*case.lengths))
        pages = -(-kv_lens // PAGE_SIZE)
        self.qo_indptr, self.kv_indptr = (
            torch.nn.functional.pad(x.cumsum(0), (1, 0)).int().to(DEVICE) for x in (qo_lens, pages)
        )
        num_pages, self.num_prefilled = int(pages.sum()), int(qo_lens[: self.count].sum())
        self.pages = torch.randperm(num_pages, device=DEVICE).int()
        self.kv_lens = kv_lens.int().to(DEVICE)
        self.last = ((kv_lens - 1) % PAGE_SIZE + 1).int().to(DEVICE)
        (num_qo_heads, num_kv_heads), head_dim = case.heads, case.head_dim
        shape = (num_pages, 2, PAGE_SIZE, num_kv_heads, head_dim)
        is_large = num_pages * PAGE_SIZE * num_kv_heads * head_dim * 4 > 1 << 28
        copies = 1 if is_large or DEVICE == "cpu" else 4
        self.caches = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
        self.q = torch.randn(int(qo_lens.sum()), num_qo_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(self.q.shape[:2], device=DEVICE)

    def _calls(self, *runs: Callable[[torch.Tensor], Any]) -> list[Callable[[], None]]:
        def call(cache: torch.Tensor) -> Callable[[], None]:
            return lambda: [one(cache) for one in runs] and None

        return [call(cache) for cache in self.caches * 2]

    def mixed(self) -> Callable[[torch.Tensor], Any]:
        wrapper = flashinfer.BatchAttention(device=DEVICE)
        given = (self.qo_indptr, self.kv_indptr, self.pages, self.kv_lens)
        wrapper.plan(*given, *self.case.heads, *[self.case.head_dim] * 2, PAGE_SIZE, causal=True)
        return lambda cache: wrapper.run(self.q, cache, self.out, self.lse)

    def prefill(self, count: int) -> Callable[[torch.Tensor], Any]:
        """Of the first requests."""
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace())
        indptrs = self.qo_indptr[: count + 1], self.kv_indptr[: count + 1]
        wrapper.plan(
            *indptrs, self.pages, self.last[:count], *self.case.heads, self.case.head_dim, PAGE_SIZE, causal=True,
            q_data_type=torch.bfloat16,
        )  # fmt: skip
        num_tokens = int(indptrs[0][-1])
        return lambda cache: wrapper.run(self.q[:num_tokens], cache, out=self.out[:num_tokens])

    def decode(self) -> Callable[[torch.Tensor], Any]:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace())
        indptr = self.kv_indptr[self.count :]
        wrapper.plan(
            (indptr - indptr[0]).contiguous(), self.pages[int(indptr[0]) :], self.last[self.count :],
            *self.case.heads, self.case.head_dim, PAGE_SIZE, q_data_type=torch.bfloat16,
        )  # fmt: skip
        return lambda cache: wrapper.run(self.q[self.num_prefilled :], cache, out=self.out[self.num_prefilled :])

    def _workspace(self) -> torch.Tensor:
        return torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def measure(self, times: Times, with_parts: bool) -> None:
        name, parts = self.case.name, {}
        if self.count:
            parts["prefill"] = self.prefill(self.count)
        if self.case.decodes:
            parts["decode"] = self.decode()
        kinds = {column: self._calls(*parts.values()) for column in (SERIAL, AGAIN)}
        if with_parts:
            kinds |= {part: self._calls(launch) for part, launch in parts.items()}
            kinds[WHOLE] = self._calls(self.prefill(len(self.case.lengths)))
        with times.noting(name):  # of which a peer may have none
            kinds[""] = self._calls(self.mixed())
        for column, us in device_us_in_turns(kinds, rounds=4, repeats=3, seconds=0.003).items():
            times.measure(name, column, lambda us=us: us)


def serial_us(times: Times, name: str) -> float:
    """The mean of the two."""
    return (times.us(name, SERIAL) + times.us(name, AGAIN)) / 2


def measure(args: argparse.Namespace, times: Times) -> None:
    for case in CASES:
        if args.only in case.name:
            Problem(case).measure(times, args.parts)
            ratio = serial_us(times, case.name) / times.us(case.name)
            print(f"{times.us(case.name):9.2f} us, {ratio:.3f}  {case.name}", flush=True)


def main() -> None:
    parser = parser_of(__doc__, host=False)
    parser.add_argument("--parts", action="store_true", help="time prefill and decode alone too")
    args, ours, peers = run(parser, measure)
    print(environment())
    names = [case.name for case in CASES if args.only in case.name]
    columns = ["prefill", "decode", WHOLE] if args.parts else []
    rows: list[list[object]] = []
    tables: dict[str, list[Row]] = {"mixed": [], "mixed drawn": []}
    for name in names:
        others = {SERIAL: serial_us(ours, name), **{column: ours.us(name, column) for column in columns}}
        for peer in peers:
            others |= {f"{peer.library}, all": peer.us(name), f"{peer.library}, {SERIAL}": serial_us(peer, name)}
        rows.append([name, ours.us(name), others[SERIAL] / ours.us(name), *others.values()])
        tables["mixed drawn" if name.startswith("drawn") else "mixed"].append((name, ours.us(name), others, {}))
    print_table("Mixed batches, us", ["prefills + decodes", "us", "ratio", *others], rows)
    ratios = [serial_us(ours, name) / ours.us(name) for name in names]
    apart = [ours.us(name, AGAIN) / ours.us(name, SERIAL) for name in names]
    print(
        f"\n{len(ratios)} cases: ratio {min(ratios):.3f} to {max(ratios):.3f}, mean {geometric_mean(ratios):.3f}; "
        f"{sum(ratio < SLOWER for ratio in ratios)} below {SLOWER}. "
        f"Twice the same: {min(apart):.3f} to {max(apart):.3f}"
    )
    print_failures(peers)
    write_results(args, {name: table("us", timed, partial=args.only) for name, timed in tables.items() if timed})


if __name__ == "__main__":
    main()
