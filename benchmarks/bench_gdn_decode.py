# SPDX-License-Identifier: Apache-2.0
"""A decoding layer of gated delta networks: the rule itself, the convolution before it and the gated norm behind it,
beside the Triton kernels of flash-linear-attention that vLLM carries, where they can be imported.

python benchmarks/bench_gdn_decode.py [--only decode,draft,conv,norm] [--peer FOLDER] [--json]

Bytes are those that must move once, states both ways. Buffers rotate, so that nothing is found in the L2 cache but at
the smallest sizes. The last row is what a copy reaches, which is the ceiling.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from common import DEVICE, copies_for
from rows import Call, Row, main, randn

import flashinfer
from flashinfer.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from flashinfer.gdn_decode import gated_delta_rule_decode, gated_delta_rule_decode_pretranspose, gated_delta_rule_mtp

DIM, WIDTH, DRAFTED = 128, 4, 4
# What is timed, by group: (requests, heads of q and k, value heads, dtype of the state); tokens of each sequence;
# (tokens, heads).
CASES: dict[str, list[Any]] = {
    "decode": [
        *[(batch, 16, 32, dtype) for batch in (1, 16, 64, 256) for dtype in (torch.float32, torch.bfloat16)],
        (64, 16, 64, torch.float32),
        (256, 2, 4, torch.float32),
    ],
    "draft": [(64, 16, 32, torch.float32)],
    "conv": [[1] * 64, [1] * 256, [2048], [8192], [1024] * 16],
    "norm": [(64, 32), (256, 32), (8192, 32)],
}


def triton_kernels() -> Any:
    """vLLM's, or None where there are none."""
    try:
        from vllm.model_executor.layers.fla.ops.fused_recurrent import fused_recurrent_gated_delta_rule_packed_decode
        from vllm.model_executor.layers.fla.ops.layernorm_guard import rmsnorm_fn
        from vllm.model_executor.layers.mamba.ops import causal_conv1d
    except ImportError:
        return None
    return argparse.Namespace(
        decode=fused_recurrent_gated_delta_rule_packed_decode, norm=rmsnorm_fn, conv=causal_conv1d
    )


FLA = triton_kernels() if DEVICE == "cuda" else None


class Step:
    """One decoding step of a batch: rows as the convolution leaves them, states in shuffled slots of a pool."""

    def __init__(self, case: tuple[int, int, int, torch.dtype], tokens: int = 1) -> None:
        batch, heads, v_heads, dtype = case
        self.qkv = randn(batch, tokens, (2 * heads + v_heads) * DIM)
        sizes = [heads * DIM, heads * DIM, v_heads * DIM]
        self.rows = [x.unflatten(-1, (-1, DIM)) for x in self.qkv.split(sizes, dim=-1)]
        self.b, self.a = randn(batch, tokens, 2 * v_heads).split(v_heads, dim=-1)
        self.A_log, self.dt_bias = (torch.rand(v_heads, device=DEVICE) for _ in range(2))
        self.gates = self.A_log, self.a, self.dt_bias, self.b
        self.pool = torch.zeros(batch + 1, v_heads, DIM, DIM, device=DEVICE, dtype=dtype)
        self.slots = (torch.randperm(batch, device=DEVICE) + 1).int()
        self.output = randn(batch, tokens, v_heads, DIM)

    def decode(self) -> None:
        pool = {"initial_state": self.pool, "initial_state_indices": self.slots}
        gated_delta_rule_decode_pretranspose(*self.rows, None, *self.gates, output=self.output, **pool)

    def decode_k_major(self) -> None:
        gated_delta_rule_decode(*self.rows, self.pool[1:], *self.gates, output=self.output)

    def draft(self, kept: torch.Tensor) -> None:
        inputs = *self.rows, self.pool, self.slots, *self.gates
        gated_delta_rule_mtp(*inputs, output=self.output, intermediate_states_buffer=kept, disable_state_update=True)

    def triton(self) -> None:
        gates = self.a[:, 0], self.b[:, 0], self.A_log, self.dt_bias
        FLA.decode(self.qkv[:, 0], *gates, DIM**-0.5, self.pool, self.output, self.slots, True)


def bytes_of(case: tuple[int, int, int, torch.dtype], tokens: int, states: int) -> int:
    batch, heads, v_heads, dtype = case
    rows = 2 * batch * tokens * (2 * heads + 2 * v_heads) * DIM
    return rows + batch * v_heads * DIM * DIM * dtype.itemsize * states


def shape_of(case: tuple[int, int, int, torch.dtype]) -> str:
    batch, heads, v_heads, dtype = case
    return f"{batch} x {heads}/{v_heads}, {str(dtype)[6:]} states"


def decode_rows(case: tuple[int, int, int, torch.dtype]) -> Iterator[Row]:
    num_bytes = bytes_of(case, 1, 2)
    steps = [Step(case) for _ in range(copies_for(num_bytes))]
    replaced = [step.triton for step in steps] if FLA else []
    yield "delta rule", shape_of(case), num_bytes, [step.decode for step in steps], replaced
    yield "delta rule, K-major", shape_of(case), num_bytes, [step.decode_k_major for step in steps], []


def draft_rows(case: tuple[int, int, int, torch.dtype]) -> Iterator[Row]:
    num_bytes = bytes_of(case, DRAFTED, 1 + DRAFTED)
    batch, _, v_heads, dtype = case
    calls = []
    for _ in range(copies_for(num_bytes)):
        kept = torch.empty(batch, DRAFTED, v_heads, DIM, DIM, device=DEVICE, dtype=dtype)
        calls.append(partial(Step(case, DRAFTED).draft, kept))
    yield f"delta rule, {DRAFTED} tokens, states kept", shape_of(case), num_bytes, calls, []


def conv_rows(lengths: list[int]) -> Iterator[Row]:
    num_tokens, num_requests, dim = sum(lengths), len(lengths), 8192  # channels of 16 + 16 + 32 heads
    weight = randn(dim, WIDTH)
    slots = (torch.randperm(num_requests, device=DEVICE) + 1).int()
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    num_bytes = 2 * dim * (2 * num_tokens + (2 * num_requests + 1) * (WIDTH - 1))
    sets = [
        (randn(num_tokens, dim), randn(num_requests + 1, WIDTH - 1, dim).transpose(1, 2))
        for _ in range(copies_for(num_bytes))
    ]
    replaced: list[Call] = []
    if max(lengths) == 1:
        ours = [lambda x=x, s=s: causal_conv1d_update(x, s, weight, None, "silu", slots) for x, s in sets]
        if FLA:
            update = FLA.conv.causal_conv1d_update
            replaced = [lambda x=x, s=s: update(x, s, weight, None, "silu", slots) for x, s in sets]
        yield "convolution, update", f"{num_tokens} x {dim}", num_bytes, ours, replaced
        return
    initial = torch.ones(num_requests, dtype=torch.bool, device=DEVICE)
    arguments = weight, None
    ours = [lambda x=x, s=s: causal_conv1d_fn(x.T, *arguments, s, offsets, slots, initial) for x, s in sets]
    if FLA:
        tiles = triton_tiles(lengths)
        replaced = [
            lambda x=x, s=s: FLA.conv.causal_conv1d_fn(x.T, *arguments, s, offsets, slots, initial, metadata=tiles)
            for x, s in sets
        ]
    yield "convolution", f"{num_requests} x {lengths[0]} x {dim}", num_bytes, ours, replaced


def triton_tiles(lengths: list[int], size: int = 8) -> Any:
    """What vLLM's scheduler computes on the host once a step: the sequence and the tile in it of each program."""
    pairs = [(i, tile) for i, length in enumerate(lengths) for tile in range(-(-length // size))]
    batch, tiles = (torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*pairs))
    entry = {"tot": len(pairs), "mlist": batch, "mlist_len": len(pairs), "offsetlist": tiles, "batch_ptr": batch}
    entry["token_chunk_offset_ptr"] = tiles
    return argparse.Namespace(nums_dict={size: entry}, batch_ptr=batch, token_chunk_offset_ptr=tiles)


def norm_rows(case: tuple[int, int]) -> Iterator[Row]:
    shape = (*case, DIM)
    num_bytes = 2 * 3 * case[0] * case[1] * DIM
    weight = randn(DIM)
    sets = [tuple(randn(*shape) for _ in range(3)) for _ in range(copies_for(num_bytes))]
    ours = [lambda x=x, z=z, o=o: flashinfer.gated_rmsnorm(x, z, weight, out=o) for x, z, o in sets]
    replaced = [lambda x=x, z=z: FLA.norm(x, weight, None, z) for x, z, _ in sets] if FLA else []
    yield "gated_rmsnorm", f"{case[0]} x {case[1]} x {DIM}", num_bytes, ours, replaced


ROWS = {"decode": decode_rows, "draft": draft_rows, "conv": conv_rows, "norm": norm_rows}


if __name__ == "__main__":
    main(__doc__, CASES, ROWS, "Triton", "gdn ")
