# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over sequences: microseconds and TFLOP/s beside Triton's and another installation of flashinfer.

python benchmarks/bench_gdn.py [--only "1 x 2048"] [--peer FOLDER] [--no-host] [--json]

bf16, keys and queries of length 1, fp32 states in and out. FLOPs are those of the recurrence, 6 x 128 x 128 a token and
head; what chunks need besides does not count. The Triton kernels are those of flash-linear-attention that vLLM carries,
timed where `vllm.model_executor.layers.fla` can be imported. Calls are timed inside a CUDA graph.
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

from flashinfer.gdn_prefill import chunk_gated_delta_rule

DIM = 128
TRITON = "FLA (Triton)"


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    qk_heads: int
    v_heads: int
    goal: str = ""

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.tokens}, {self.qk_heads}/{self.v_heads} heads"

    @property
    def num_bytes(self) -> int:
        """Of q, k, v and output, gates, and the states in and out."""
        rows = 2 * self.qk_heads + 2 * self.v_heads
        return self.batch * (self.tokens * (rows * DIM * 2 + self.v_heads * 8) + self.v_heads * DIM * DIM * 8)

    @property
    def num_flops(self) -> int:
        return 6 * DIM * DIM * self.batch * self.tokens * self.v_heads


# Goals: twice as fast as Triton; in figures, what upstream publishes of an H100.
CASES = [
    Case(1, 2048, 16, 32, "1/2 of Triton"),
    Case(1, 8192, 16, 32, "1/2 of Triton"),
    Case(1, 65536, 16, 32, "1/2 of Triton"),
    Case(16, 1024, 16, 32, "1/2 of Triton"),
    Case(1, 2048, 2, 8, "61 us"),
    Case(1, 8192, 2, 8, "1/2 of Triton"),
    Case(1, 65536, 2, 8, "399 us"),
    Case(16, 1024, 2, 8, "1/2 of Triton"),
]


class Problem:
    """One case, its tensors repeated so often that a round does not fit the L2 cache."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        num_tokens = case.batch * case.tokens
        self.cu_seqlens = torch.arange(0, num_tokens + 1, case.tokens, device=DEVICE, dtype=torch.int32)
        self.sets = [self._draw(case, num_tokens) for _ in range(min(8, copies_for(case.num_bytes)))]
        self.beta = torch.rand(num_tokens, case.v_heads, device=DEVICE)
        self.log_alpha = torch.nn.functional.logsigmoid(torch.randn(num_tokens, case.v_heads, device=DEVICE) + 4)
        self.alpha = self.log_alpha.exp()
        self.state = torch.randn(case.batch, case.v_heads, DIM, DIM, device=DEVICE)
        self.final_state = torch.empty_like(self.state)

    @staticmethod
    def _draw(case: Case, num_tokens: int) -> tuple[torch.Tensor, ...]:
        draw = lambda heads: torch.randn(num_tokens, heads, DIM, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
        q, k = (torch.nn.functional.normalize(draw(case.qk_heads), dim=-1) for _ in range(2))
        v = draw(case.v_heads)
        return q, k, v, torch.empty_like(v)

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor) -> Any:
        return chunk_gated_delta_rule(
            q, k, v, self.alpha, self.beta, None, self.state, True, self.cu_seqlens, output=output,
            output_state=self.final_state,
        )  # fmt: skip

    def time(self) -> float:
        calls: list[Callable[[], Any]] = [(lambda x=x: self.call(*x)) for x in self.sets]
        return device_us(calls)

    def time_triton(self) -> float:
        from vllm.model_executor.layers.fla.ops import chunk_gated_delta_rule as triton_rule

        gates = self.log_alpha[None], self.beta[None]
        calls: list[Callable[[], Any]] = [
            (
                lambda x=x: triton_rule(
                    *(t[None] for t in x[:3]), *gates, initial_state=self.state, output_final_state=True,
                    cu_seqlens=self.cu_seqlens,
                )
            )
            for x in self.sets
        ]  # fmt: skip
        return device_us(calls)


def has_triton_kernels() -> bool:
    try:
        import vllm.model_executor.layers.fla.ops  # noqa: F401
    except ImportError:
        return False
    return DEVICE == "cuda"


def measure(args: argparse.Namespace, times: Times) -> None:
    with_triton = not times.is_peer and has_triton_kernels()
    for case in CASES:
        if args.only not in case.name:
            continue
        problem = Problem(case)
        times.measure(case.name, "", problem.time)
        if with_triton:
            times.measure(case.name, TRITON, problem.time_triton)
    if not args.no_host:
        with times.noting("host costs"):
            problem = Problem(Case(1, 64, 2, 8))
            measure_host(times, {"chunk_gated_delta_rule": lambda: problem.call(*problem.sets[0])})


def main() -> None:
    args, ours, peers = run(parser_of(__doc__), measure)
    print(environment())
    rows: list[list[object]] = []
    timed = []
    others = [TRITON, *(peer.library for peer in peers)]
    for case in CASES:
        if args.only not in case.name:
            continue
        us = [ours.us(case.name), ours.us(case.name, TRITON), *(peer.us(case.name) for peer in peers)]
        rows.append([case.name, us[0], case.num_flops / us[0] / 1e6, case.num_bytes / us[0] / 1e6, *us[1:], case.goal])
        amounts = {"bytes": case.num_bytes, "flops": case.num_flops}
        timed.append((case.name, us[0], dict(zip(others, us[1:])), amounts))
    columns = ["us", "TFLOP/s", "TB/s", *(f"{other} us" for other in others), "goal"]
    print_table("Gated delta rule over sequences, bf16", ["sequences x tokens, heads of q and v", *columns], rows)
    conclude(args, ours, peers, {"gdn prefill": table("us", timed, partial=args.only)})


if __name__ == "__main__":
    main()
