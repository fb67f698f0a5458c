# SPDX-License-Identifier: Apache-2.0
"""Prefill and append attention: TFLOP/s, or bandwidth where the KV dominates, beside SDPA, FlashAttention-3 and another
flashinfer.

python benchmarks/bench_prefill.py [--only ragged] [--fa3 LIBRARY] [--peer FOLDER] [--plot prefill.png] [--json]

FLOPs are 2 (head_dim_qk + head_dim_vo) per visible (query, key, head); bytes are K and V once, q and the output. Calls
are timed inside CUDA graphs, which take turns with those of SDPA and FlashAttention-3 over the same tensors. SDPA is
PyTorch's, through cuDNN on a GPU, over contiguous KV. The peer is timed with each of its backends, "fa2" and "fa3".
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    DEVICE,
    Calls,
    Times,
    conclude,
    copies_for,
    device_us_in_turns,
    environment,
    measure_host,
    parser_of,
    print_table,
    run,
    save_plot,
    table,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashinfer

PEER_BACKENDS = ["fa2", "fa3"]
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SDPA_BACKENDS = {
    "cuda": [SDPBackend.CUDNN_ATTENTION],
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


SCORES: dict[str, dict[str, Any]] = {
    "": {},
    "soft cap": {"logits_soft_cap": 30.0},
    "ALiBi": {"pos_encoding_mode": "ALIBI"},
    "every bit of a custom mask set": {},
}


@dataclass(frozen=True)
class Case:
    batch: int
    qo_len: int
    kv_len: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    head_dim_vo: int = 128
    page_size: int = 0  # 0: ragged
    causal: bool = True
    scores: str = ""  # what else happens to them, of SCORES
    dtype: str = "bf16"  # of q, k and v, of DTYPES; the output is bf16
    goal: str = ""

    @property
    def name(self) -> str:
        lengths = f"{self.qo_len}" if self.qo_len == self.kv_len else f"{self.qo_len} on {self.kv_len}"
        dims = f"d{self.head_dim}" + ("" if self.head_dim == self.head_dim_vo else f"/{self.head_dim_vo}")
        storage = f"page {self.page_size}" if self.page_size else "ragged"
        mask = "causal" if self.causal else "full"
        more = "".join(f", {text}" for text in (self.scores, self.dtype) if text not in ("", "bf16"))
        return f"{self.batch} x {lengths}, {self.num_qo_heads}/{self.num_kv_heads}, {dims}, {storage}, {mask}{more}"

    @property
    def flops(self) -> float:
        pairs = self.qo_len * self.kv_len - (self.qo_len * (self.qo_len - 1) / 2 if self.causal else 0)
        return 2.0 * self.batch * pairs * self.num_qo_heads * (self.head_dim + self.head_dim_vo)

    @property
    def num_bytes(self) -> int:
        kv = self.kv_len * self.num_kv_heads * (self.head_dim + self.head_dim_vo)
        q, out = (self.qo_len * self.num_qo_heads * dim for dim in (self.head_dim, self.head_dim_vo))
        return self.batch * ((kv + q) * DTYPES[self.dtype].itemsize + 2 * out)


def square(batch: int, length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, **more: Any) -> Case:
    return Case(batch, length, length, heads, kv_heads, dim, more.pop("head_dim_vo", dim), **more)


# Goals are those of an H200; of another card, the ratio to the best peer counts: 1.03, paged and fp8 1.10.
CASES = [
    square(4, 4096, goal="615 TFLOP/s"),
    square(4, 4096, page_size=16, goal="590 TFLOP/s"),
    square(4, 4096, page_size=64, goal="590 TFLOP/s"),
    square(4, 4096, page_size=1, goal="540 TFLOP/s"),
    square(1, 16384, page_size=16, goal="625 TFLOP/s"),
    square(16, 1024, goal="500 TFLOP/s"),
    square(1, 16384, goal="645 TFLOP/s"),
    square(1, 32768, goal="660 TFLOP/s"),
    square(1, 16384, causal=False, goal="680 TFLOP/s"),
    square(1, 1024),
    square(4, 4096, dim=64, goal="460 TFLOP/s"),
    square(1, 16384, dim=64, goal="520 TFLOP/s"),
    square(4, 4096, 16, 4, 256, goal="660 TFLOP/s"),
    square(1, 16384, 16, 4, 256, goal="705 TFLOP/s"),
    square(4, 4096, 128, 128, 192, head_dim_vo=128, goal="615 TFLOP/s"),
    square(4, 4096, dtype="fp8", goal="800 TFLOP/s"),
    square(1, 16384, dtype="fp8", goal="950 TFLOP/s"),
    square(4, 4096, page_size=16, dtype="fp8", goal="760 TFLOP/s"),
    square(1, 16384, page_size=16, dtype="fp8", goal="900 TFLOP/s"),
    square(256, 128, 12, 12, 32, causal=False),
    square(4, 4096, scores="soft cap"),
    square(4, 4096, scores="ALiBi"),
    square(4, 4096, causal=False, scores="every bit of a custom mask set"),
    Case(64, 16, 4096, page_size=16, goal="258 us"),
    Case(64, 16, 4096, page_size=1),
    Case(64, 4, 4096, page_size=16, goal="254 us"),
    Case(1, 16, 131072, page_size=16, goal="155 us"),
    Case(8, 512, 8192, page_size=16, goal="575 TFLOP/s"),
]


class Problem:
    """One case, its KV repeated so often that a round does not fit the L2 cache."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        num_tokens, num_kv = case.batch * case.qo_len, case.batch * case.kv_len

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(DTYPES[case.dtype])

        def offsets(step: int) -> torch.Tensor:
            return torch.arange(case.batch + 1, dtype=torch.int32, device=DEVICE) * step

        self.q = draw(num_tokens, case.num_qo_heads, case.head_dim)
        self.out = torch.empty(num_tokens, case.num_qo_heads, case.head_dim_vo, device=DEVICE, dtype=torch.bfloat16)
        rows = [(num_kv,)]
        self.indices: tuple[torch.Tensor, ...] = (offsets(case.qo_len), offsets(case.kv_len))
        if case.page_size:
            num_pages = case.kv_len // case.page_size
            rows = [(case.batch * num_pages, case.page_size)]
            pages = torch.randperm(case.batch * num_pages, device=DEVICE).int()
            last = torch.full((case.batch,), case.page_size, dtype=torch.int32, device=DEVICE)
            self.indices = (offsets(case.qo_len), offsets(num_pages), pages, last)
        kv_bytes = DTYPES[case.dtype].itemsize * num_kv * case.num_kv_heads * (case.head_dim + case.head_dim_vo)
        self.kvs = [
            (draw(*rows[0], case.num_kv_heads, case.head_dim), draw(*rows[0], case.num_kv_heads, case.head_dim_vo))
            for _ in range(copies_for(kv_bytes))
        ]

    def wrapper(self, **options: Any) -> Any:
        case = self.case
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        kind = "Paged" if case.page_size else "Ragged"
        wrapper = getattr(flashinfer, f"BatchPrefillWith{kind}KVCacheWrapper")(workspace, **options)
        shapes = [case.num_qo_heads, case.num_kv_heads, case.head_dim, *([case.page_size] if case.page_size else [])]
        score_options = dict(SCORES[case.scores])
        if "custom mask" in case.scores:
            num_bits = case.batch * case.qo_len * case.kv_len
            score_options["custom_mask"] = torch.ones(num_bits, dtype=torch.bool, device=DEVICE)
        if case.dtype != "bf16":
            score_options |= {"kv_data_type": DTYPES[case.dtype], "o_data_type": torch.bfloat16}
        wrapper.plan(
            *self.indices, *shapes, head_dim_vo=case.head_dim_vo, causal=case.causal, q_data_type=DTYPES[case.dtype],
            **score_options,
        )  # fmt: skip
        return wrapper

    def calls(self, **options: Any) -> Calls:
        """Planned runs; options go to the wrapper."""
        wrapper = self.wrapper(**options)
        if self.case.page_size:
            return [lambda kv=kv: wrapper.run(self.q, kv, out=self.out) for kv in self.kvs]
        return [lambda kv=kv: wrapper.run(self.q, kv[0], kv[1], out=self.out) for kv in self.kvs]

    def time(self, **options: Any) -> float:
        """Microseconds of one planned run."""
        return device_us_in_turns({"": self.calls(**options)})[""]

    def sdpa_calls(self) -> Calls:
        """PyTorch's SDPA over contiguous KV, through cuDNN on a GPU."""
        case = self.case
        q = self.q.view(case.batch, case.qo_len, case.num_qo_heads, -1).transpose(1, 2)
        calls = []
        for k, v in self.kvs:
            k, v = (x.view(case.batch, case.kv_len, case.num_kv_heads, -1).transpose(1, 2) for x in (k, v))

            def call(k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
                with sdpa_kernel(SDPA_BACKENDS[DEVICE]):
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=case.causal, enable_gqa=case.num_qo_heads != case.num_kv_heads
                    )

            calls.append(call)
        return calls

    def fa3_calls(self) -> Calls:
        """FlashAttention-3, by the operator that vLLM registers."""
        case, scale = self.case, self.case.head_dim**-0.5
        qo_indptr, kv_indptr, *pages = self.indices
        table = lens = None
        if pages:
            table, kv_indptr = pages[0].view(case.batch, -1), None
            lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=DEVICE)
        factor = None if case.dtype == "bf16" else torch.ones(case.batch, case.num_kv_heads, device=DEVICE)
        lengths = (qo_indptr, kv_indptr, None, None, lens, case.qo_len, case.kv_len, table)
        # New keys and values, a second part of queries; padding on the left, RoPE; window, soft cap, splits.
        rest = (-1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None)

        def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            tensors = (self.q, k, v, None, None, None, self.out)
            return torch.ops._vllm_fa3_C.fwd(
                *tensors, *lengths, *[None] * 5, factor, factor, factor, scale, case.causal, *rest
            )  # fmt: skip

        return [functools.partial(call, k, v) for k, v in self.kvs]

    def peer_calls(self, has_fa3: bool) -> Iterator[tuple[str, Calls]]:
        """Of libraries that run in this process, as far as they cover the case."""
        case = self.case
        if case.scores:
            return
        # SDPA aligns the causal mask to the first key.
        candidates = {"SDPA": self.sdpa_calls} if case.qo_len == case.kv_len and case.dtype == "bf16" else {}
        if has_fa3:
            candidates["FA3"] = self.fa3_calls
        for name, make in candidates.items():
            with suppress(RuntimeError):  # what it does not cover
                calls = make()
                calls[0]()
                yield name, calls


def measure_host_costs(times: Times) -> None:
    problem = Problem(Case(16, 16, 128, page_size=16))
    wrapper = problem.wrapper()

    def plan() -> None:
        wrapper.plan(*problem.indices, 32, 8, 128, 16, causal=True, q_data_type=torch.bfloat16)

    q, kv, out = problem.q, problem.kvs[0], problem.out
    q1, (k1, v1) = q[:128], (half.view(-1, 8, 128)[:128] for half in kv)
    s = torch.zeros(len(q), 32, device=DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "prefill.run(out=)": lambda: wrapper.run(q, kv, out=out),
        "prefill.run()": lambda: wrapper.run(q, kv),
        "prefill.forward(causal=True)": lambda: wrapper.forward(q, kv, causal=True),
        "prefill.plan": plan,
        "single_prefill_with_kv_cache": lambda: flashinfer.single_prefill_with_kv_cache(q1, k1, v1, causal=True),
        "merge_state_in_place": lambda: flashinfer.merge_state_in_place(q, s, out, s),
    }
    measure_host(times, calls)


def measure(args: argparse.Namespace, times: Times) -> None:
    if args.fa3 and not times.is_peer:
        torch.ops.load_library(args.fa3)
    for case in CASES:
        if args.only not in case.name:
            continue
        problem = Problem(case)
        if times.is_peer:
            for backend in PEER_BACKENDS:
                times.measure(case.name, backend, problem.time, backend=backend)
        else:
            kinds = {"": problem.calls(), **dict(problem.peer_calls(bool(args.fa3)))}
            for column, us in device_us_in_turns(kinds).items():
                times.columns.setdefault(column, {})[case.name] = us
    if not args.no_host:
        with times.noting("host costs"):
            measure_host_costs(times)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--fa3", metavar="LIBRARY", help="time FlashAttention-3 too: vLLM's _vllm_fa3_C.abi3.so, of the torch at hand"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rates as bars; needs matplotlib")
    args, ours, peers = run(parser, measure)
    print(environment())
    columns = [(f"{peer.library} {backend}", peer, backend) for peer in peers for backend in PEER_BACKENDS]
    columns.append(("cuDNN" if DEVICE == "cuda" else "SDPA", ours, "SDPA"))
    if args.fa3:
        columns.append(("FA3", ours, "FA3"))
    cases = [case for case in CASES if args.only in case.name]
    rows: list[list[object]] = []
    timed = []
    rates: dict[str, list[float]] = {}
    for case in cases:
        us = ours.us(case.name)
        others = [case.flops / times.us(case.name, column) / 1e6 for _, times, column in columns]
        rows.append([case.name, us, case.flops / us / 1e6, case.num_bytes / us / 1e6, *others, case.goal])
        amounts = {"flops": case.flops, "bytes": case.num_bytes}
        timed.append((case.name, case.flops / us / 1e6, dict(zip((label for label, *_ in columns), others)), amounts))
        for label, rate in zip(["flashinfer", *(column[0] for column in columns)], [case.flops / us / 1e6, *others]):
            rates.setdefault(label, []).append(rate)
    header = ["us", "TFLOP/s", "TB/s", *(f"{label} TFLOP/s" for label, _, _ in columns), "goal"]
    print_table("Prefill, bf16 or fp8", ["batch x lengths, heads, head_dim, KV, mask", *header], rows)
    conclude(args, ours, peers, {"prefill": table("TFLOP/s", timed, partial=args.only)})
    if args.plot:  # of prefills: an append is bound by its KV
        prefills = [index for index, case in enumerate(cases) if case.qo_len == case.kv_len]
        rates = {label: [values[index] for index in prefills] for label, values in rates.items()}
        save_plot(args.plot, "Prefill, bf16", "TFLOP/s", [cases[index].name for index in prefills], rates)


if __name__ == "__main__":
    main()
