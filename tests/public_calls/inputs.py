# SPDX-License-Identifier: Apache-2.0
"""What the calls are given, and the table that they are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS, HEADS, KV_HEADS, DIM, PAGE = 5, 4, 2, 64, 4
VOCAB = 40
SHAPES = (HEADS, KV_HEADS, DIM, PAGE)


class Inputs:
    """Tensors on one device; the same in every instance."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        draw = torch.Generator(device="cpu").manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device, dtype)

        def index(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.x, self.gated, self.residual = random(TOKENS, 32), random(TOKENS, 64), random(TOKENS, 32)
        self.weight, self.fp8 = random(32), torch.zeros(TOKENS, 32, device=device).to(torch.float8_e4m3fn)
        self.scale = torch.full((1,), 0.5, dtype=torch.float32, device=device)
        self.bits, self.segments = random(70) > 0, index(0, 3, 3, 60)
        self.q, self.k, self.v = (random(TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.kv = (random(12, KV_HEADS, DIM), random(12, KV_HEADS, DIM))
        self.lse, self.lse_other = (random(TOKENS, HEADS, dtype=torch.float32) for _ in range(2))
        self.qkv, self.head_weight = random(TOKENS, HEADS + 2 * KV_HEADS, DIM), random(DIM)
        self.positions, self.table = index(*range(TOKENS)), random(16, DIM, dtype=torch.float32)
        # Requests of three and two queries, over seven and nine keys in pages of four.
        self.qo_indptr, self.kv_indptr = index(0, 3, 5), index(0, 2, 5)
        self.pages, self.last_page_len = index(4, 0, 2, 1, 3), index(3, 1)
        self.cache = random(6, 2, PAGE, KV_HEADS, DIM)
        self.batch_indices, self.slots = index(0, 0, 0, 1, 1), index(4, 5, 6, 7, 8)
        self.mask = random(3 * 7 + 2 * 9) > 0
        self.shared = [index(0, 5), index(0, 1), index(5), index(4)]  # one page for all queries
        self.latent = random(6, PAGE, 96)
        self.latent_rows, self.latent_q = random(6, PAGE, 576), random(TOKENS, HEADS, 576)
        self.kv_lens, self.rows = index(7, 9), index(*[(7 * row) % 25 - 1 for row in range(TOKENS * 6)]).view(TOKENS, 6)
        self.logits = random(TOKENS, VOCAB, dtype=torch.float32)
        self.lengths = index(40, 7, 0, 3, 31)
        self.probs = torch.softmax(self.logits, dim=-1)
        self.per_row = torch.full((TOKENS,), 0.7, dtype=torch.float32, device=device)
        self.drafts, self.counts = index(*range(2 * TOKENS)).view(TOKENS, 2), index(*[1] * TOKENS)
        self.chain = self.probs[:, None].repeat(1, 3, 1)
        self.sinks = random(HEADS, dtype=torch.float32)
        a, b = random(TOKENS, 1, HEADS), random(TOKENS, 1, HEADS)
        a_log, dt_bias = random(HEADS, dtype=torch.float32), random(HEADS, dtype=torch.float32)
        self.delta_rule = (self.k[:, None], self.k.flip(0)[:, None], self.q[:, None], a_log, a, dt_bias, b)
        self.delta_rows = random(TOKENS, 2, 128)
        self.workspace = torch.empty(16 << 20 if device.type == "cuda" else 8, dtype=torch.uint8, device=device)

    @property
    def paged(self) -> tuple[Tensor, ...]:
        return self.kv_indptr, self.pages, self.last_page_len


def tensors(result: Any) -> list[Tensor]:
    """Those of a result, as bits that can be compared."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


Call = Callable[[Inputs], Any]
CALLS: dict[str, Call] = {}


def call(name: str) -> Callable[[Call], Call]:
    def add(function: Call) -> Call:
        CALLS[name] = function
        return function

    return add
