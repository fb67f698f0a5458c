# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of one batch, beside prefill followed by decode: microseconds.

python benchmarks/bench_mixed.py [--only "64 x 4096"] [--peer FOLDER] [--json]

bf16, pages of 16 in a random order; 32 query heads on 8 and head_dim 128 unless the name says otherwise.
`BatchAttention` takes all requests at once; the others are `BatchPrefillWithPagedKVCacheWrapper` and
`BatchDecodeWithPagedKVCacheWrapper`, one behind the other and each alone; "prefill's wrapper" is the former over all
requests, of a peer too. All are timed in turns inside CUDA graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    DEVICE,
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

import flashinfer

HEADS, HEAD_DIM, PAGE_SIZE = (32, 8), 128, 16  # unless a case says otherwise
SCALE = 1 if DEVICE == "cuda" else 32  # of lengths, on a CPU


@dataclass(frozen=True)
class Case:
    prefills: tuple[int, int, int]  # requests, queries and keys of each
    decodes: tuple[int, int]  # requests, keys of each
    heads: tuple[int, int] = HEADS
    head_dim: int = HEAD_DIM

    @property
    def name(self) -> str:
        count, qo_len, kv_len = self.prefills
        on = f" on {kv_len}" if kv_len != qo_len else ""
        shape = f", {self.heads[0]}/{self.heads[1]}" if self.heads != HEADS else ""
        shape += f", head_dim {self.head_dim}" if self.head_dim != HEAD_DIM else ""
        return f"{count} x {qo_len}{on} + {self.decodes[0]} x {self.decodes[1]}{shape}"

    @property
    def lengths(self) -> list[tuple[int, int]]:
        count, *prefill = self.prefills
        requests = [tuple(prefill)] * count + [(1, self.decodes[1])] * self.decodes[0]
        return [(max(1, qo_len // SCALE), max(1, kv_len // SCALE)) for qo_len, kv_len in requests]


CASES = [
    Case((8, 1024, 1024), (64, 4096)),
    Case((16, 1024, 1024), (128, 2048)),
    Case((1, 4096, 4096), (16, 4096)),
    Case((1, 512, 8192), (64, 4096)),
    Case((2, 512, 512), (64, 4096)),
    Case((1, 256, 256), (64, 4096)),
    Case((4, 2048, 2048), (4, 1024)),
    Case((1, 2048, 2048), (8, 32768)),
    Case((0, 1, 1), (64, 4096)),
    Case((8, 1024, 1024), (0, 1)),
    Case((1, 8192, 8192), (128, 1024)),
    Case((1, 8192, 8192), (1, 4096)),
    Case((32, 256, 256), (32, 2048)),
    Case((64, 128, 128), (256, 512)),
    Case((2, 16384, 16384), (8, 4096)),
    Case((4, 512, 16384), (16, 16384)),
    Case((1, 1024, 1024), (1, 131072)),
    Case((1, 2048, 2048), (256, 128)),
    Case((1, 64, 4096), (128, 2048)),
    Case((3, 700, 2500), (40, 3000)),
    Case((4, 1024, 1024), (32, 2048), (32, 32)),
    Case((1, 512, 512), (16, 4096), (32, 32)),
    Case((1, 2048, 8192), (8, 8192), (32, 32)),
    Case((8, 1024, 1024), (64, 4096), (64, 8)),
    Case((1, 512, 512), (64, 4096), (64, 8)),
    Case((4, 2048, 2048), (16, 8192), (64, 8)),
    Case((8, 1024, 1024), (64, 4096), HEADS, 64),
    Case((1, 512, 512), (64, 4096), HEADS, 64),
    Case((2, 4096, 4096), (16, 2048), HEADS, 64),
    Case((4, 1024, 1024), (32, 2048), (32, 32), 64),
    Case((8, 1024, 1024), (64, 4096), (64, 8), 64),
]


class Problem:
    """Index tensors of all requests, of those that are prefilled, and of those that are decoded."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.count = case, case.prefills[0]
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

        return [call(cache) for cache in self.caches * 4]

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

    def measure(self, times: Times) -> None:
        name, parts = self.case.name, {}
        if self.count:
            parts["prefill"] = self.prefill(self.count)
        if self.case.decodes[0]:
            parts["decode"] = self.decode()
        kinds = {"one behind the other": self._calls(*parts.values())}
        kinds |= {part: self._calls(launch) for part, launch in parts.items()}
        if len(parts) == 2:
            kinds["prefill's wrapper"] = self._calls(self.prefill(len(self.case.lengths)))
        with times.noting(name):  # of which a peer may have none
            kinds[""] = self._calls(self.mixed())
        for column, us in device_us_in_turns(kinds).items():
            times.measure(name, column, lambda us=us: us)


def measure(args: argparse.Namespace, times: Times) -> None:
    for case in CASES:
        if args.only in case.name:
            Problem(case).measure(times)


def main() -> None:
    args, ours, peers = run(parser_of(__doc__, host=False), measure)
    print(environment())
    columns = ["one behind the other", "prefill", "decode", "prefill's wrapper"]
    rows: list[list[object]] = []
    timed = []
    for case in [case for case in CASES if args.only in case.name]:
        us, others = ours.us(case.name), {column: ours.us(case.name, column) for column in columns}
        ratio = others[columns[0]] / us
        for peer in peers:
            others[f"{peer.library}, {columns[-1]}"] = peer.us(case.name, columns[-1])
        rows.append([case.name, us, ratio, *others.values()])
        timed.append((case.name, us, others, {}))
    columns += [f"{peer.library}, {columns[-1]}" for peer in peers]
    print_table("Mixed batches, us", ["prefills + decodes", "us", f"{columns[0]} / us", *columns], rows)
    print_failures(peers)
    write_results(args, {"mixed": table("us", timed, partial=args.only)})


if __name__ == "__main__":
    main()
