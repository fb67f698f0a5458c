# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: TFLOP/s of the blocks that are there, beside the same kernels without a mask.

python benchmarks/bench_sparse.py [--only 64x64] [--peer FOLDER] [--json]

FLOPs are 4 head_dim per (query, key, head) of a listed block. Blocks are drawn at random, a quarter of them. "dense" is
prefill of one request over ragged KV, all of whose keys are seen, of the same lengths and heads. Variable blocks are 32
to 192 rows and columns, multiples of 8 where keys are looked up by pages. Both are timed in turns inside CUDA graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
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

HEAD_DIM = 128
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    block: int  # rows and columns; 0: variable ones
    heads: tuple[int, int] = (32, 8)
    length: int = 8192 if DEVICE == "cuda" else 256
    density: float = 0.25
    multiple: int = 0  # of the sizes of variable blocks, where the host sees them

    @property
    def name(self) -> str:
        block = f"{self.block}x{self.block}"
        if not self.block:
            block = f"variable, multiples of {self.multiple}" if self.multiple else "variable"
        return f"{self.length}, {self.heads[0]}/{self.heads[1]}, {block}, {self.density:.0%}"

    def dense_flops(self) -> float:
        return 4.0 * HEAD_DIM * self.length**2 * self.heads[0]


CASES = [
    *[Case(block, heads) for heads in ((32, 8), (32, 4), (32, 32)) for block in (128, 64, 16)],
    Case(128, density=0.05),
    Case(0, (16, 16)),
    Case(0, (16, 16), multiple=8),
    Case(0, (32, 8), multiple=8),
]


class Problem:
    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.q, self.k, self.v = (
            torch.randn(case.length, heads, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
            for heads in (case.heads[0], *[case.heads[1]] * 2)
        )
        self.flops = 0.0

    def of_blocks(self) -> Call:
        case, num_blocks = self.case, self.case.length // self.case.block
        blocks = torch.rand(num_blocks, num_blocks, device=DEVICE) < case.density
        self.flops = case.dense_flops() * float(blocks.float().mean())
        indptr = torch.nn.functional.pad(blocks.sum(1).cumsum(0), (1, 0)).int()
        indices = blocks.nonzero()[:, 1].int().contiguous()
        wrapper = flashinfer.BlockSparseAttentionWrapper(self.workspace)
        wrapper.plan(
            indptr, indices, case.length, case.length, case.block, case.block, *case.heads, HEAD_DIM,
            q_data_type=torch.bfloat16, o_data_type=torch.bfloat16,
        )  # fmt: skip
        return self._call(wrapper, (self.q, self.k, self.v))

    def _sizes(self) -> torch.Tensor:
        """Of a head's blocks, which add up to the length."""
        step = self.case.multiple or 1
        sizes = (torch.randint(32 // step, 192 // step, (self.case.length // 32,)) * step).tolist()
        ends = torch.tensor(sizes).cumsum(0)
        count = int((ends < self.case.length).sum())
        return torch.tensor([*sizes[:count], self.case.length - int(ends[count - 1])])

    def of_variable_blocks(self) -> Call:
        case, num_heads = self.case, self.case.heads[1]
        rows, columns = self._sizes(), self._sizes()
        blocks = torch.rand(num_heads, len(rows), len(columns)) < case.density
        area = (rows[:, None] * columns).double()
        self.flops = case.dense_flops() * float((blocks * area).sum() / (num_heads * area.sum()))
        where = "cpu" if case.multiple else DEVICE
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(self.workspace)
        wrapper.plan(
            blocks.to(where), *(x.int().repeat(num_heads, 1).to(where) for x in (rows, columns)), *case.heads, HEAD_DIM,
            q_data_type=torch.bfloat16,
        )  # fmt: skip
        return self._call(wrapper, [x.transpose(0, 1).contiguous() for x in (self.q, self.k, self.v)])

    def of_all(self) -> Call:
        case = self.case
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self.workspace)
        indptr = torch.tensor([0, case.length], dtype=torch.int32, device=DEVICE)
        wrapper.plan(indptr, indptr, *case.heads, HEAD_DIM, q_data_type=torch.bfloat16)
        return self._call(wrapper, (self.q, self.k, self.v))

    @staticmethod
    def _call(wrapper: Any, operands: Any) -> Call:
        out = torch.empty_like(operands[0])
        return lambda: wrapper.run(*operands, out=out)


def measure(args: argparse.Namespace, times: Times) -> None:
    for case in CASES:
        if args.only not in case.name:
            continue
        problem = Problem(case)
        with times.noting(case.name):
            of_blocks = problem.of_blocks() if case.block else problem.of_variable_blocks()
            calls: dict[str, Sequence[Call]] = {"": [of_blocks] * 2}
            times.columns.setdefault("flops", {})[case.name] = problem.flops
            if not times.is_peer:
                calls["dense"] = [problem.of_all()] * 2
            for column, us in device_us_in_turns(calls).items():
                times.measure(case.name, column, lambda us=us: us)


def main() -> None:
    args, ours, peers = run(parser_of(__doc__, host=False), measure)
    print(environment())
    rows: list[list[object]] = []
    timed = []
    for case in [case for case in CASES if args.only in case.name]:
        us, flops = ours.us(case.name), ours.us(case.name, "flops")
        rate, dense = flops / us / 1e6, case.dense_flops() / ours.us(case.name, "dense") / 1e6
        others = {peer.library: flops / peer.us(case.name) / 1e6 for peer in peers}
        rows.append([case.name, us, rate, dense, rate / dense, *others.values()])
        timed.append((case.name, rate, {"dense": dense, **others}, {"flops": flops}))
    header = ["us", "TFLOP/s", "dense TFLOP/s", "of dense", *(f"{peer.library} TFLOP/s" for peer in peers)]
    print_table("Block-sparse attention, bf16", ["length, heads, blocks, density", *header], rows)
    print_failures(peers)
    write_results(args, {"sparse": table("TFLOP/s", timed, partial=args.only)})


if __name__ == "__main__":
    main()
