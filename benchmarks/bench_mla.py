# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: microseconds, TFLOP/s and bandwidth beside another installation of flashinfer.

python benchmarks/bench_mla.py [--only "64 x 4096"] [--peer FOLDER] [--no-host] [--json]

Rows are 512 + 64 wide, bf16. FLOPs are 2 (576 + 512) per visible (query, row, head), bytes the rows once. Buffers are
rotated so that nothing is found in the L2 cache; calls are timed inside a CUDA graph. The peer is timed with its "fa2"
and "fa3", of which the faster one counts.
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
    conclude,
    copies_for,
    device_us,
    environment,
    measure_host,
    parser_of,
    print_table,
    run,
    table,
)

import flashinfer
import flashinfer.mla

PEER_SETTINGS = {backend: {"backend": backend} for backend in ("fa2", "fa3")}
DIM_CKV, DIM_KPE = 512, 64
SM_SCALE = (128 + 64) ** -0.5


@dataclass(frozen=True)
class Case:
    batch: int
    kv_len: int
    num_heads: int
    qo_len: int = 1
    page_size: int = 64
    lengths: str = "equal"  # "lognormal": mean kv_len, sigma 1
    goal: str = ""

    @property
    def name(self) -> str:
        text = f"{self.batch} x {self.kv_len}, {self.num_heads} heads, p{self.page_size}"
        return (
            text
            + ("" if self.qo_len == 1 else f", {self.qo_len} queries")
            + ("" if self.lengths == "equal" else f", {self.lengths}")
        )

    def kv_lens(self) -> torch.Tensor:
        if self.lengths == "equal":
            return torch.full((self.batch,), self.kv_len)
        drawn = torch.randn(self.batch, generator=torch.Generator().manual_seed(0)).exp()
        return (drawn / drawn.mean() * self.kv_len).round().clamp(min=1).long()

    @property
    def num_bytes(self) -> int:
        return int(self.kv_lens().sum()) * (DIM_CKV + DIM_KPE) * torch.bfloat16.itemsize

    @property
    def num_flops(self) -> int:
        pairs = int(self.kv_lens().sum()) * self.qo_len - self.batch * self.qo_len * (self.qo_len - 1) // 2
        return 2 * (2 * DIM_CKV + DIM_KPE) * pairs * self.num_heads


# Goals: the fastest kernel there was on another H200, less a few percent.
CASES = [
    Case(1, 8192, 128, goal="18 us"),
    Case(16, 4096, 128, goal="42 us"),
    Case(64, 4096, 128, goal="138 us"),
    Case(128, 8192, 128, goal="545 us"),
    Case(128, 8192, 64, goal="300 us"),
    Case(64, 4096, 16, goal="74 us"),
    Case(128, 8192, 16, goal="290 us"),
    Case(1, 131072, 16, goal="42 us"),
    Case(64, 4096, 128, 2, goal="240 us"),
    Case(64, 4096, 128, lengths="lognormal", goal="92% of equal"),
    Case(64, 4096, 128, page_size=16),
    Case(64, 4096, 128, page_size=1, goal="110% of p64"),
    Case(64, 4096, 16, page_size=1, goal="110% of p64"),
]


class Problem:
    """One case, its cache repeated so often that a round does not fit the L2 cache."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        kv_lens = case.kv_lens()
        pages = -(-kv_lens // case.page_size)
        num_pages = int(pages.sum())
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), pages.cumsum(0)])
        qo_indptr = torch.arange(case.batch + 1) * case.qo_len
        self.case = case
        self.indices = [x.int().to(DEVICE) for x in (qo_indptr, indptr, torch.randperm(num_pages), kv_lens)]
        shape = (num_pages, case.page_size, DIM_CKV + DIM_KPE)
        self.caches = [
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).split([DIM_CKV, DIM_KPE], dim=-1)
            for _ in range(copies_for(case.num_bytes))
        ]
        rows = case.batch * case.qo_len, case.num_heads
        self.q_nope = torch.randn(*rows, DIM_CKV, device=DEVICE, dtype=torch.bfloat16)
        self.q_pe = torch.randn(*rows, DIM_KPE, device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q_nope)

    def wrapper(self, **options: Any) -> Any:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        return flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, **options)

    def plan(self, wrapper: Any) -> None:
        case, dtype = self.case, torch.bfloat16
        wrapper.plan(*self.indices, case.num_heads, DIM_CKV, DIM_KPE, case.page_size, True, SM_SCALE, dtype, dtype)

    def time(self, **options: Any) -> float:
        """Microseconds of one planned run; options go to the wrapper."""
        wrapper = self.wrapper(**options)
        self.plan(wrapper)
        calls: list[Callable[[], Any]] = [
            (lambda cache=cache: wrapper.run(self.q_nope, self.q_pe, *cache, out=self.out)) for cache in self.caches
        ]
        return device_us(calls * max(1, 8 // len(calls)))


def measure_host_costs(times: Times) -> None:
    problem = Problem(Case(16, 128, 16))
    wrapper = problem.wrapper()
    problem.plan(wrapper)
    cache = problem.caches[0]
    calls: dict[str, Callable[[], Any]] = {
        "mla.run(out=)": lambda: wrapper.run(problem.q_nope, problem.q_pe, *cache, out=problem.out),
        "mla.run()": lambda: wrapper.run(problem.q_nope, problem.q_pe, *cache),
        "mla.plan": lambda: problem.plan(wrapper),
    }
    measure_host(times, calls)


def measure(args: argparse.Namespace, times: Times) -> None:
    for case in CASES:
        if args.only in case.name:
            problem = Problem(case)
            for column, options in (PEER_SETTINGS if times.is_peer else {"": {}}).items():
                times.measure(case.name, column, problem.time, **options)
    if not args.no_host:
        with times.noting("host costs"):
            measure_host_costs(times)


def main() -> None:
    args, ours, peers = run(parser_of(__doc__), measure)
    print(environment())
    rows: list[list[object]] = []
    timed = []
    for case in CASES:
        if args.only not in case.name:
            continue
        us = [ours.us(case.name), *(peer.best_us(case.name) for peer in peers)]
        rows.append([case.name, us[0], case.num_flops / us[0] / 1e6, case.num_bytes / us[0] / 1e6, *us[1:], case.goal])
        others = dict(zip([peer.library for peer in peers], us[1:]))
        timed.append((case.name, us[0], others, {"bytes": case.num_bytes, "flops": case.num_flops}))
    columns = ["us", "TFLOP/s", "TB/s", *(f"{peer.library} us" for peer in peers), "goal"]
    print_table("Latent attention, bf16", ["batch x kv, heads, page", *columns], rows)
    conclude(args, ours, peers, {"mla": table("us", timed, partial=args.only)})


if __name__ == "__main__":
    main()
