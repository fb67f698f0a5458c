# SPDX-License-Identifier: Apache-2.0
"""Decode attention: microseconds and bandwidth beside PyTorch's SDPA and another installation of flashinfer.

python benchmarks/bench_decode.py [--only "64 x 4096"] [--peer FOLDER] [--plot decode.png] [--json]

Bytes are K and V once, q and the output. Lengths are equal unless a case says otherwise. Buffers are rotated so that
nothing is found in the L2 cache; calls are timed inside a CUDA graph. SDPA gets its KV gathered and contiguous. Of the
peer's two kernels (use_tensor_cores) the faster one counts.
"""

from __future__ import annotations

import argparse
import math
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
    save_plot,
    table,
)

import flashinfer

PEER_SETTINGS = {"CUDA cores": {"use_tensor_cores": False}, "tensor cores": {"use_tensor_cores": True}}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    batch: int
    kv_len: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: str = "bf16"
    lengths: str = "equal"  # "lognormal": mean kv_len, sigma 1
    goal: str = ""

    @property
    def name(self) -> str:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads}"
        text = f"{self.batch} x {self.kv_len}, {heads}, d{self.head_dim}, p{self.page_size}"
        return (
            text
            + ("" if self.kv_dtype == "bf16" else f", {self.kv_dtype}")
            + ("" if self.lengths == "equal" else f", {self.lengths}")
        )

    def kv_lens(self) -> torch.Tensor:
        if self.lengths == "equal":
            return torch.full((self.batch,), self.kv_len)
        drawn = torch.randn(self.batch, generator=torch.Generator().manual_seed(0)).exp()
        return (drawn / drawn.mean() * self.kv_len).round().clamp(min=1).long()

    @property
    def num_bytes(self) -> int:
        kv_rows = 2 * int(self.kv_lens().sum()) * self.num_kv_heads
        q_and_out_rows = 2 * self.batch * self.num_qo_heads
        return self.head_dim * (kv_rows * DTYPES[self.kv_dtype].itemsize + q_and_out_rows * torch.bfloat16.itemsize)


CASES = [
    Case(64, 4096, goal="2.90 TB/s"),
    Case(64, 4096, page_size=1, goal="2.90 TB/s"),
    Case(64, 4096, 28, 4, goal="2.85 TB/s"),
    Case(64, 4096, 64, 8),
    Case(16, 4096, 32, 32),
    Case(256, 1024, goal="2.86 TB/s"),
    Case(256, 1024, head_dim=64, goal="2.75 TB/s"),
    Case(64, 2048, goal="reference of the next"),
    Case(64, 2048, lengths="lognormal", goal="95% of equal"),
    Case(1, 1024, goal="9 us"),
    Case(1, 8192, goal="14 us"),
    Case(1, 131072, goal="185 us"),
    Case(16, 1024, goal="30 us"),
    Case(16, 8192, goal="188 us"),
    Case(1, 32768, 8, 1),  # one KV head a GPU: 70B models in tensor parallel over eight
    Case(16, 4096, 8, 1),
    Case(64, 4096, kv_dtype="e4m3"),
    Case(64, 4096, head_dim=256, num_qo_heads=16, num_kv_heads=4),
]


class Problem:
    """One case, its KV repeated so often that a round does not fit the L2 cache."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        kv_lens, page_size = case.kv_lens(), case.page_size
        pages = -(-kv_lens // page_size)
        num_pages = int(pages.sum())
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), pages.cumsum(0)])
        last_page_len = (kv_lens - 1) % page_size + 1
        self.case = case
        self.indices = [x.int().to(DEVICE) for x in (indptr, torch.randperm(num_pages), last_page_len)]
        shape = (num_pages, 2, page_size, case.num_kv_heads, case.head_dim)
        self.caches = [
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(DTYPES[case.kv_dtype])
            for _ in range(copies_for(case.num_bytes))
        ]
        self.q = torch.randn(case.batch, case.num_qo_heads, case.head_dim, device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)

    def time(self, **options: Any) -> float:
        """Microseconds of one planned run; options go to the wrapper."""
        case = self.case
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, **options)
        wrapper.plan(
            *self.indices, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size,
            q_data_type=torch.bfloat16, kv_data_type=DTYPES[case.kv_dtype],
        )  # fmt: skip
        calls: list[Callable[[], Any]] = [
            (lambda cache=cache: wrapper.run(self.q, cache, out=self.out)) for cache in self.caches
        ]
        return device_us(calls * max(1, 8 // len(calls)))

    def time_sdpa(self) -> float:
        """SDPA over KV already gathered and contiguous; equal lengths alone."""
        case = self.case
        if case.lengths != "equal" or case.kv_len % case.page_size:
            return math.nan
        q = self.q.unsqueeze(2)
        calls = []
        for cache in self.caches:
            kv = cache.to(torch.bfloat16).transpose(0, 1).reshape(2, case.batch, -1, case.num_kv_heads, case.head_dim)
            k, v = kv.transpose(2, 3).contiguous().unbind(0)
            calls.append(
                lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, enable_gqa=k.shape[1] != q.shape[1]
                )
            )
        return device_us(calls)


def measure_host_costs(times: Times) -> None:
    problem = Problem(Case(16, 128))
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)

    def plan() -> None:
        wrapper.plan(*problem.indices, 32, 8, 128, 16, q_data_type=torch.bfloat16)

    plan()
    cache, q, one_q, out = problem.caches[0], problem.q, problem.q[0], problem.out
    k, v = torch.randn(2, 4096, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "decode.run(out=)": lambda: wrapper.run(q, cache, out=out),
        "decode.run()": lambda: wrapper.run(q, cache),
        "decode.plan": plan,
        "single_decode_with_kv_cache": lambda: flashinfer.single_decode_with_kv_cache(one_q, k, v),
    }
    measure_host(times, calls)


def measure(args: argparse.Namespace, times: Times) -> None:
    for case in CASES:
        if args.only in case.name:
            problem = Problem(case)
            for column, options in (PEER_SETTINGS if times.is_peer else {"": {}}).items():
                times.measure(case.name, column, problem.time, **options)
            if not times.is_peer:
                times.measure(case.name, "SDPA", problem.time_sdpa)
    if not args.no_host:
        with times.noting("host costs"):
            measure_host_costs(times)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the bandwidths as bars; needs matplotlib")
    args, ours, peers = run(parser, measure)
    print(environment())
    cases = [case for case in CASES if args.only in case.name]
    rows: list[list[object]] = []
    timed = []
    bandwidths: dict[str, list[float]] = {}
    for case in cases:
        us = [ours.us(case.name), *(peer.best_us(case.name) for peer in peers), ours.us(case.name, "SDPA")]
        rows.append([case.name, us[0], case.num_bytes / us[0] / 1e6, *us[1:], case.goal])
        others = dict(zip([*(peer.library for peer in peers), "SDPA"], us[1:]))
        timed.append((case.name, us[0], others, {"bytes": case.num_bytes}))
        for label, time in zip(["flashinfer", *(peer.library for peer in peers), "SDPA, gathered KV"], us):
            bandwidths.setdefault(label, []).append(case.num_bytes / time / 1e6)
    columns = ["us", "TB/s", *(f"{peer.library} us" for peer in peers), "SDPA us", "goal"]
    print_table("Batch decode, bf16", ["batch x kv, heads, head_dim, page", *columns], rows)
    conclude(args, ours, peers, {"decode": table("us", timed, partial=args.only)})
    if args.plot:
        save_plot(args.plot, "Batch decode, bf16", "TB/s", [case.name for case in cases], bandwidths)


if __name__ == "__main__":
    main()
