# SPDX-License-Identifier: Apache-2.0
"""Sequences for the tests of the gated delta rule: inputs, calls, and what is expected of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch

from flashinfer.gdn_prefill import chunk_gated_delta_rule
from tests.gdn import oracle
from tests.tolerances import assert_close

DIM = 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor  # log alpha
    beta: torch.Tensor
    lengths: tuple[int, ...]
    state: torch.Tensor  # [sequences, heads, V, K]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.q.device)

    def expected(self, *, with_state: bool = True, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.state if with_state else None
        return oracle.packed_sequences(
            self.q, self.k, self.v, self.g, self.beta, self.cu_seqlens.tolist(), states, **options
        )


def draw(
    device: torch.device,
    lengths: tuple[int, ...],
    heads: tuple[int, int, int] = (2, 2, 4),
    dtype: torch.dtype = BF16,
    state_dtype: torch.dtype = FP32,
    *,
    decay: float = 0.1,
    unit: bool = True,
) -> Inputs:
    """heads: of q, k and v. decay: log alpha is minus that, times a number from 0 to 1."""
    tokens, num_heads = sum(lengths), max(heads)
    make = torch.Generator().manual_seed(tokens + 1000 * num_heads)
    q, k, v = (torch.randn(tokens, count, DIM, generator=make) for count in heads)
    if unit:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = -decay * torch.rand(tokens, num_heads, generator=make)
    beta = torch.rand(tokens, num_heads, generator=make)
    state = torch.randn(len(lengths), num_heads, DIM, DIM, generator=make)
    return Inputs(
        *(x.to(device, dtype) for x in (q, k, v)), g.to(device), beta.to(device), lengths, state.to(device, state_dtype)
    )


def call(x: Inputs, **options: Any) -> Any:
    given = {"beta": x.beta, "initial_state": x.state, **options}
    if "g" not in given:
        given["g"] = x.g.exp()
    if "cu_seqlens" not in given:
        given["cu_seqlens"] = x.cu_seqlens
    return chunk_gated_delta_rule(x.q, x.k, x.v, **given)


def check(x: Inputs, output: torch.Tensor, state: Optional[torch.Tensor], expected: Any) -> None:
    assert output.dtype == x.q.dtype
    assert_close(output, expected[0])
    if state is not None:  # summed in fp32 from products of operands in the dtype of q
        assert_close(state.to(x.q.dtype), expected[1])
