# SPDX-License-Identifier: Apache-2.0
"""Softmax, sampling and filters over a vocabulary, in microseconds, for rows of several shapes.

python benchmarks/bench_sampling.py [--dtype float32] [--rows 1 16 128 512] [--logits normal flat ...]
                                     [--peer FOLDER] [--json]

Times are of CUDA graph replays over inputs that rotate through more memory than the L2 cache holds (few rows stay in
it, as they would behind the kernel that computes them). torch.softmax is the same in a peer's columns: what differs
there is noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    DEVICE,
    Row,
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
from results import Table

from flashinfer import sampling

# How logits may lie: (name) -> make them from standard normal noise.
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,  # a top-p set of half the vocabulary
    "flat": lambda x: x * 0.05,
    "peaked": lambda x: x * 6,
    # Language models: a few candidates stand out, the rest falls off slowly, and frequent tokens have low ids.
    "model": lambda x: x * 2.2 - 1.1 * torch.log1p(torch.arange(x.shape[-1], device=x.device)) + 10 * (x > 4),
}
VOCAB, ROWS = 128256, [1, 16, 128, 512]
FIXED = {"seed": 7, "offset": 0}
OPS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "softmax": ("logits", lambda x: sampling.softmax(x)),
    "sampling_from_logits": ("logits", lambda x: sampling.sampling_from_logits(x, **FIXED)),
    "sampling_from_probs": ("probs", lambda x: sampling.sampling_from_probs(x, **FIXED)),
    "top_p 0.9": ("probs", lambda x: sampling.top_p_sampling_from_probs(x, 0.9, **FIXED)),
    "top_k 50": ("probs", lambda x: sampling.top_k_sampling_from_probs(x, 50, **FIXED)),
    "min_p 0.1": ("probs", lambda x: sampling.min_p_sampling_from_probs(x, 0.1, **FIXED)),
    "top_k 50 + top_p 0.9, joint": (
        "probs",
        lambda x: sampling.top_k_top_p_sampling_from_probs(x, 50, 0.9, filter_apply_order="joint", **FIXED),
    ),
    "top_k 50 + top_p 0.9, top_k first": (
        "probs",
        lambda x: sampling.top_k_top_p_sampling_from_probs(x, 50, 0.9, **FIXED),
    ),
    "the same from logits, joint": (
        "logits",
        lambda x: sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, filter_apply_order="joint", **FIXED),
    ),
    "top_p 0.9 from logits": (
        "logits",
        lambda x: sampling.top_k_top_p_sampling_from_logits(x, 1 << 30, 0.9, filter_apply_order="joint", **FIXED),
    ),
    "top_p_renorm_probs 0.9": ("probs", lambda x: sampling.top_p_renorm_probs(x, 0.9)),
    "top_k_renorm_probs 50": ("probs", lambda x: sampling.top_k_renorm_probs(x, 50)),
    "top_k_mask_logits 50": ("logits", lambda x: sampling.top_k_mask_logits(x, 50)),
    "torch.softmax": ("logits", lambda x: torch.softmax(x, -1)),
}  # fmt: skip


def inputs(shape: str, num_rows: int, vocab_size: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(0)
    count = copies_for(num_rows * vocab_size * dtype.itemsize)
    logits = [SHAPES[shape](torch.randn(num_rows, vocab_size, device=DEVICE)) for _ in range(count)]
    return {"logits": [x.to(dtype) for x in logits], "probs": [torch.softmax(x, -1).to(dtype) for x in logits]}


def case_name(op: str, shape: str, num_rows: int) -> str:
    return f"{op}: {num_rows} rows, {shape}"


def slowest(times: Times, op: str, shapes: list[str], num_rows: int) -> float:
    """Of the distributions; NaN where one could not be timed."""
    us = [times.us(case_name(op, shape, num_rows)) for shape in shapes]
    return math.nan if any(map(math.isnan, us)) else max(us)


def tables(args: argparse.Namespace, ours: Times, peers: list[Times]) -> dict[str, Table]:
    """Of the slowest distribution, and of each."""
    options = {"vocab": VOCAB, "dtype": "float32", "rows": ROWS, "logits": list(SHAPES)}
    chosen = " ".join(f"--{name} {vars(args)[name]}" for name in options if vars(args)[name] != options[name])

    def rows(shapes: list[str], name: Callable[[str, int], str]) -> list[Row]:
        return [
            (
                name(op, num_rows),
                slowest(ours, op, shapes, num_rows),
                {peer.library: slowest(peer, op, shapes, num_rows) for peer in peers},
                {},
            )
            for op in OPS
            for num_rows in args.rows
        ]

    return {
        "sampling": table("us", rows(args.logits, lambda op, num_rows: f"{op}: {num_rows} rows"), partial=chosen),
        "sampling by distribution": table(
            "us",
            [row for one in args.logits for row in rows([one], lambda op, n, one=one: case_name(op, one, n))],
            partial=chosen,
        ),
    }


def measure(args: argparse.Namespace, times: Times) -> None:
    for shape in args.logits:
        for num_rows in args.rows:
            sets = inputs(shape, num_rows, args.vocab, getattr(torch, args.dtype))
            for op, (kind, call) in OPS.items():
                calls = [partial(call, x) for x in sets[kind]]
                times.measure(case_name(op, shape, num_rows), "", device_us, calls)
    if args.no_host:
        return
    probs = torch.softmax(torch.randn(1, args.vocab, device=DEVICE), -1)
    measure_host(times, {"top_p_sampling_from_probs": lambda: sampling.top_p_sampling_from_probs(probs, 0.9)})


def main() -> None:
    parser = parser_of(__doc__, only=False)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--logits", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args, ours, peers = run(parser, measure)
    print(environment())
    libraries = [("", ours), *((f", {peer.library}", peer) for peer in peers)]
    for num_rows in args.rows:
        header = [f"{shape}{label}" for shape in args.logits for label, _ in libraries]
        rows: list[list[object]] = [
            [op, *(times.us(case_name(op, shape, num_rows)) for shape in args.logits for _, times in libraries)]
            for op in OPS
        ]
        print_table(f"{num_rows} rows of {args.vocab}, {args.dtype}, us", ["", *header], rows)
    header = [f"{num_rows}{label}" for num_rows in args.rows for label, _ in libraries]
    rows = [
        [op, *(slowest(times, op, args.logits, num_rows) for num_rows in args.rows for _, times in libraries)]
        for op in OPS
    ]
    print_table("The slowest of these distributions, by rows, us", ["", *header], rows)
    conclude(args, ours, peers, tables(args, ours, peers))


if __name__ == "__main__":
    main()
