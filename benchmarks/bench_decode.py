"""Decode attention on a GPU: microseconds and bandwidth against upstream and PyTorch's SDPA.

Bytes are K and V once, q and the output. Lengths are equal unless a case says otherwise. Buffers are rotated so that
nothing is found in the L2 cache; calls are timed inside a CUDA graph.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import copies_for, environment, gpu_us, host_us, print_table, save_plot, upstream

import flashinfer

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
    Case(64, 4096, kv_dtype="e4m3"),
    Case(64, 4096, head_dim=256, num_qo_heads=16, num_kv_heads=4),
]


@dataclass
class Problem:
    """One case, its buffers repeated so often that a round does not fit the L2 cache."""

    case: Case
    indices: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    caches: list[torch.Tensor]
    q: torch.Tensor
    out: torch.Tensor
    num_bytes: int

    @staticmethod
    def make(case: Case) -> Problem:
        device = torch.device("cuda")
        kv_lens = case.kv_lens()
        pages = -(-kv_lens // case.page_size)
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), pages.cumsum(0)]).int().to(device)
        total = int(pages.sum())
        indices = torch.randperm(total).int().to(device)
        last_page_len = ((kv_lens - 1) % case.page_size + 1).int().to(device)
        kv_dtype = DTYPES[case.kv_dtype]
        row_bytes = case.num_kv_heads * case.head_dim * kv_dtype.itemsize
        kv_bytes = 2 * int(kv_lens.sum()) * row_bytes
        shape = (total, 2, case.page_size, case.num_kv_heads, case.head_dim)
        caches = [
            torch.randn(shape, device=device, dtype=torch.bfloat16).to(kv_dtype) for _ in range(copies_for(kv_bytes))
        ]
        q = torch.randn(case.batch, case.num_qo_heads, case.head_dim, device=device, dtype=torch.bfloat16)
        return Problem(
            case,
            (indptr, indices, last_page_len),
            caches,
            q,
            torch.empty_like(q),
            kv_bytes + 2 * q.numel() * q.itemsize,
        )

    def time(self, wrapper: Any) -> float:
        """Microseconds of one planned run of a wrapper of ours or upstream's."""
        case = self.case
        wrapper.plan(
            *self.indices, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size,
            q_data_type=torch.bfloat16, kv_data_type=DTYPES[case.kv_dtype],
        )  # fmt: skip
        calls: list[Callable[[], Any]] = [
            (lambda cache=cache: wrapper.run(self.q, cache, out=self.out)) for cache in self.caches
        ]
        return gpu_us(calls * max(1, 8 // len(calls)))

    def time_sdpa(self) -> float:
        """SDPA over KV already gathered and contiguous; equal lengths alone."""
        case = self.case
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
        return gpu_us(calls)


def measure(case: Case, peers: bool) -> list[object]:
    problem = Problem.make(case)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    ours = problem.time(flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace))
    row: list[object] = [case.name, ours, problem.num_bytes / ours / 1e6]
    if peers:
        theirs: float = math.nan
        other = upstream()
        if other is not None:
            theirs = min(
                problem.time(other.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=tensor_cores))
                for tensor_cores in (False, True)
            )
        sdpa = problem.time_sdpa() if case.lengths == "equal" and case.kv_len % case.page_size == 0 else math.nan
        row += [theirs, sdpa]
    return [*row, case.goal]


def measure_host() -> list[list[object]]:
    """Host microseconds of plan and run beside torch.add(out=), the price of a bare launch."""
    problem = Problem.make(Case(16, 128))
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)

    def plan() -> None:
        wrapper.plan(*problem.indices, 32, 8, 128, 16, q_data_type=torch.bfloat16)

    plan()
    cache, q, out = problem.caches[0], problem.q, problem.out
    x, y, z = (torch.zeros(1024, device="cuda") for _ in range(3))
    k, v = torch.zeros(2, 4096, 8, 128, dtype=torch.bfloat16, device="cuda")
    return [
        ["torch.add(out=)", host_us(lambda: torch.add(x, y, out=z))],
        ["decode.run(out=)", host_us(lambda: wrapper.run(q, cache, out=out))],
        ["decode.run()", host_us(lambda: wrapper.run(q, cache))],
        ["decode.plan", host_us(plan)],
        ["single_decode_with_kv_cache", host_us(lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v))],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-peers", action="store_true", help="time this library alone")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--no-host", action="store_true", help="leave out the host costs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the times as bars; needs matplotlib")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode.py needs an NVIDIA GPU")
    print(environment())
    header = [
        "batch x kv, heads, head_dim, page",
        "us",
        "TB/s",
        *([] if args.no_peers else ["upstream us", "SDPA us"]),
        "goal",
    ]
    rows = [measure(case, not args.no_peers) for case in CASES if args.only in case.name]
    print_table("Batch decode, bf16", header, rows)
    if args.plot:
        save_plot(args.plot, "Batch decode, bf16", header, rows, columns="us")
    if not args.no_host:
        print_table("Host cost per call", ["call", "us"], measure_host())


if __name__ == "__main__":
    main()
