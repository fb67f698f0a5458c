# SPDX-License-Identifier: Apache-2.0
"""Norms, activations, RoPE, paged append, fp8 outputs, packing, merging and the fused operators, beside what they
replace.

python benchmarks/bench_elementwise.py [--only norm,rope] [--peer FOLDER] [--json]

Bytes are those that must move once; "replaces" is the time of the separate operators a fused one stands for, or of
torch's own. Buffers rotate, so that nothing is found in the L2 cache but at the smallest sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import DEVICE, copies_for
from rows import Row, main, randn

import flashinfer
from flashinfer import quantization

# What is timed, by group: shapes (tokens, size), numbers of tokens, or numbers of booleans.
CASES: dict[str, list[Any]] = {
    "norm": [(1, 4096), (16, 4096), (128, 8192), (2048, 4096), (8192, 4096), (8192, 8192), (65536, 128)],
    "activation": [(1, 14336), (128, 14336), (8192, 14336)],
    "rope": [1, 128, 8192],
    "append": [64, 8192],
    "fused": [1, 64, 8192],
    "quant": [64, 8192],
    "pack": [1 << 20, 1 << 28],
    "merge": [64, 8192],
}
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16


def norm_rows(shape: tuple[int, int]) -> Iterator[Row]:
    text = f"{shape[0]} x {shape[1]}"
    num_bytes = 2 * shape[0] * shape[1] * 2
    sets = [(randn(*shape), randn(*shape)) for _ in range(copies_for(num_bytes))]
    weight = randn(shape[1])
    norm = torch.nn.functional.rms_norm
    ours = [lambda x=x, out=out: flashinfer.rmsnorm(x, weight, out=out) for x, out in sets]
    replaced = [lambda x=x: norm(x, shape[1:], weight, 1e-6) for x, _ in sets]
    yield "rmsnorm", text, num_bytes, ours, replaced
    ours = [lambda x=x, r=r: flashinfer.fused_add_rmsnorm(x, r, weight) for x, r in sets]
    replaced = [lambda x=x, r=r: norm(r.add_(x), shape[1:], weight, 1e-6) for x, r in sets]
    yield "fused_add_rmsnorm", text, 2 * num_bytes, ours, replaced


def activation_rows(shape: tuple[int, int]) -> Iterator[Row]:
    num_tokens, size = shape
    num_bytes = 3 * num_tokens * size * 2
    sets = [(randn(num_tokens, 2 * size), randn(*shape)) for _ in range(copies_for(num_bytes))]
    silu = torch.nn.functional.silu
    ours = [lambda x=x, out=out: flashinfer.silu_and_mul(x, out=out) for x, out in sets]
    replaced = [lambda x=x, out=out: torch.mul(silu(x[:, :size]), x[:, size:], out=out) for x, out in sets]
    yield "silu_and_mul", f"{num_tokens} x {size}", num_bytes, ours, replaced


def rope_rows(num_tokens: int) -> Iterator[Row]:
    table = randn(1 << 17, HEAD_DIM, dtype=torch.float32)
    shape = f"{num_tokens} x ({NUM_QO_HEADS}+{NUM_KV_HEADS}) x {HEAD_DIM}"
    num_bytes = 2 * num_tokens * (NUM_QO_HEADS + NUM_KV_HEADS) * HEAD_DIM * 2
    positions = torch.randint(0, 1 << 17, (num_tokens,), device=DEVICE, dtype=torch.int32)
    qkv = [randn(num_tokens, NUM_QO_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM) for _ in range(copies_for(num_bytes))]
    pairs = [(x[:, :NUM_QO_HEADS], x[:, NUM_QO_HEADS : NUM_QO_HEADS + NUM_KV_HEADS]) for x in qkv]
    yield (
        "rope in place",
        shape,
        num_bytes,
        [lambda q=q, k=k: flashinfer.apply_rope_pos_ids_inplace(q, k, positions) for q, k in pairs],
        [lambda q=q, k=k: torch_rope(q, k, table, positions) for q, k in pairs],
    )
    yield (
        "rope in place, interleaved",
        shape,
        num_bytes,
        [lambda q=q, k=k: flashinfer.apply_rope_pos_ids_inplace(q, k, positions, None, True) for q, k in pairs],
        [],
    )
    yield (
        "rope in place, cos/sin table",
        shape,
        num_bytes,
        [
            lambda x=x: flashinfer.apply_rope_with_cos_sin_cache_inplace(
                positions,
                x[:, :NUM_QO_HEADS],
                x[:, NUM_QO_HEADS : NUM_QO_HEADS + NUM_KV_HEADS],
                HEAD_DIM,
                table,
            )
            for x in qkv
        ],
        [],
    )


def torch_rope(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """As model code in plain PyTorch has it."""
    cos, sin = table[positions.long()].to(q.dtype)[:, None].chunk(2, dim=-1)
    for x in (q, k):
        a, b = x.chunk(2, dim=-1)
        x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


class Pages:
    """A cache with shuffled pages, and rows to append at the end of at most 64 requests."""

    def __init__(self, num_tokens: int, history: int = 512) -> None:
        num_requests = min(num_tokens, 64)
        appended = num_tokens // num_requests
        length = history + appended
        per_request = -(-length // PAGE_SIZE)
        self.num_pages = per_request * num_requests
        self.indices = torch.randperm(self.num_pages, device=DEVICE).int()
        self.indptr = torch.arange(num_requests + 1, device=DEVICE, dtype=torch.int32) * per_request
        self.last_page_len = torch.full((num_requests,), (length - 1) % PAGE_SIZE + 1, device=DEVICE).int()
        append_indptr = torch.arange(num_requests + 1, device=DEVICE, dtype=torch.int32) * appended
        seq_lens = flashinfer.get_seq_lens(self.indptr, self.last_page_len, PAGE_SIZE)
        self.batch_indices, self.positions = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, num_tokens)
        self.slots = (self.batch_indices, self.positions)
        self.table = (self.indices, self.indptr, self.last_page_len)

    def cache(self, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.num_pages, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        return torch.zeros(shape, device=DEVICE, dtype=torch.int16 if dtype.itemsize == 2 else torch.int8).view(dtype)


def append_rows(num_tokens: int) -> Iterator[Row]:
    pages = Pages(num_tokens)

    def append(x: torch.Tensor, cache: torch.Tensor) -> None:
        k, v = x[:, :NUM_KV_HEADS], x[:, NUM_KV_HEADS:]
        flashinfer.append_paged_kv_cache(k, v, *pages.slots, cache, *pages.table)

    def append_mla(x: torch.Tensor, cache: torch.Tensor) -> None:
        halves = cache[..., :512], cache[..., 512:]
        flashinfer.append_paged_mla_kv_cache(x[:, :512], x[:, 512:], *pages.slots, *halves, *pages.table)

    num_bytes = 2 * num_tokens * 576 * 2
    latent = [
        (randn(num_tokens, 576), randn(pages.num_pages, PAGE_SIZE, 576)) for _ in range(copies_for(2 * num_bytes))
    ]
    yield "append, MLA", f"{num_tokens} x (512+64)", num_bytes, [partial(append_mla, *one) for one in latent], []
    shape = f"{num_tokens} x {NUM_KV_HEADS} x {HEAD_DIM}"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        num_bytes = 2 * num_tokens * NUM_KV_HEADS * HEAD_DIM * (2 + dtype.itemsize)
        sets = [
            (randn(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM), pages.cache(dtype)) for _ in range(copies_for(num_bytes))
        ]
        x, cache = sets[0]
        append(x, cache)
        torch.testing.assert_close(  # upstream takes the bytes of K and V for those of the cache's dtype
            cache.float().abs().sum(), x.to(dtype).float().abs().sum(), rtol=1e-3, atol=0, msg="no conversion to fp8"
        )
        yield f"append, {str(dtype)[6:]} cache", shape, num_bytes, [partial(append, *one) for one in sets], []


def fused_rows(num_tokens: int) -> Iterator[Row]:
    q_weight, k_weight = randn(HEAD_DIM), randn(HEAD_DIM)
    num_heads = NUM_QO_HEADS + 2 * NUM_KV_HEADS
    pages = Pages(num_tokens)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        q_bytes = 2 * num_tokens * NUM_QO_HEADS * HEAD_DIM * 2
        num_bytes = q_bytes + num_tokens * 2 * NUM_KV_HEADS * HEAD_DIM * (2 + dtype.itemsize)
        sets = [
            (*randn(num_tokens, num_heads, HEAD_DIM).split([NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1), cache)
            for cache in [pages.cache(dtype) for _ in range(copies_for(num_bytes))]
        ]

        def separate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, pages: Pages) -> None:
            flashinfer.apply_rope_pos_ids_inplace(q, k, pages.positions)
            flashinfer.append_paged_kv_cache(k, v, *pages.slots, cache, *pages.table)

        yield (
            f"rope + append, {str(dtype)[6:]} cache",
            f"{num_tokens} x ({NUM_QO_HEADS}+{NUM_KV_HEADS}) x {HEAD_DIM}",
            num_bytes,
            [
                lambda q=q, k=k, v=v, cache=cache, pages=pages: flashinfer.rope_append_paged_kv_cache(
                    q, k, v, *pages.slots, cache, *pages.table, q_out=q
                )
                for q, k, v, cache in sets
            ],
            [lambda entry=entry, pages=pages: separate(*entry, pages) for entry in sets],
        )
    num_bytes = 2 * num_tokens * (NUM_QO_HEADS + NUM_KV_HEADS) * HEAD_DIM * 2
    packed = [randn(num_tokens, num_heads, HEAD_DIM) for _ in range(copies_for(num_bytes))]

    def separate_norm(qkv: torch.Tensor, pages: Pages) -> None:
        q, k = qkv[:, :NUM_QO_HEADS], qkv[:, NUM_QO_HEADS : NUM_QO_HEADS + NUM_KV_HEADS]
        flashinfer.rmsnorm(q, q_weight, out=q)
        flashinfer.rmsnorm(k, k_weight, out=k)
        flashinfer.apply_rope_pos_ids_inplace(q, k, pages.positions)

    yield (
        "qk RMSNorm + rope",
        f"{num_tokens} x ({NUM_QO_HEADS}+{NUM_KV_HEADS}) x {HEAD_DIM}",
        num_bytes,
        [
            lambda x=x, pages=pages: flashinfer.fused_qk_rmsnorm_rope(
                x, q_weight, k_weight, pages.positions, NUM_QO_HEADS, NUM_KV_HEADS
            )
            for x in packed
        ],
        [lambda x=x, pages=pages: separate_norm(x, pages) for x in packed],
    )


def quant_rows(num_tokens: int) -> Iterator[Row]:
    fp8 = torch.float8_e4m3fn
    scale = torch.tensor([0.05], device=DEVICE)

    def cast(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_((x.float() / scale).clamp(-448, 448))

    hidden_size, num_elements = 4096, num_tokens * 4096
    weight = randn(hidden_size)
    sets = [
        (randn(num_tokens, hidden_size), randn(num_tokens, hidden_size), torch.zeros(num_tokens, hidden_size))
        for _ in range(copies_for(3 * num_elements))
    ]
    sets = [(x, residual, out.to(DEVICE, fp8)) for x, residual, out in sets]
    yield (
        "rmsnorm to fp8",
        f"{num_tokens} x {hidden_size}",
        3 * num_elements,
        [lambda x=x, out=out: flashinfer.rmsnorm_quant(out, x, weight, scale) for x, _, out in sets],
        [lambda x=x, out=out: cast(flashinfer.rmsnorm(x, weight), out) for x, _, out in sets],
    )
    yield (
        "add + rmsnorm to fp8",
        f"{num_tokens} x {hidden_size}",
        7 * num_elements,
        [lambda x=x, r=r, out=out: flashinfer.fused_add_rmsnorm_quant(out, x, r, weight, scale) for x, r, out in sets],
        [lambda x=x, r=r, out=out: cast(flashinfer.rmsnorm(r.add_(x), weight), out) for x, r, out in sets],
    )
    hidden_size, num_elements = 14336, num_tokens * 14336
    gated = [
        (randn(num_tokens, 2 * hidden_size), torch.zeros(num_tokens, hidden_size, device=DEVICE).to(fp8))
        for _ in range(copies_for(5 * num_elements))
    ]
    yield (
        "silu_and_mul to fp8",
        f"{num_tokens} x {hidden_size}",
        5 * num_elements,
        [lambda x=x, out=out: flashinfer.silu_and_mul_quant(out, x, scale) for x, out in gated],
        [lambda x=x, out=out: cast(flashinfer.silu_and_mul(x), out) for x, out in gated],
    )


def pack_rows(size: int) -> Iterator[Row]:
    num_bytes = size + size // 8
    masks = [torch.rand(size, device=DEVICE) < 0.5 for _ in range(copies_for(num_bytes))]
    shape = f"{size >> 20}M booleans"
    yield "packbits", shape, num_bytes, [lambda x=x: flashinfer.packbits(x) for x in masks], []
    indptr = torch.arange(17, device=DEVICE, dtype=torch.int32) * (size // 16 - 3)  # segments start anywhere
    calls = [lambda x=x, indptr=indptr: quantization.segment_packbits_padded(x, indptr) for x in masks]
    yield "segment_packbits, 16", shape, num_bytes, calls, []


def merge_rows(num_tokens: int) -> Iterator[Row]:
    for num_states in (2, 8):
        shape = (num_tokens, num_states, NUM_QO_HEADS)
        num_bytes = num_tokens * (num_states + 1) * NUM_QO_HEADS * (HEAD_DIM * 2 + 4)
        states = [(randn(*shape, HEAD_DIM), randn(*shape, dtype=torch.float32)) for _ in range(copies_for(num_bytes))]
        text = f"{num_states} of {num_tokens} x {NUM_QO_HEADS} x {HEAD_DIM}"
        yield "merge_states", text, num_bytes, [lambda v=v, s=s: flashinfer.merge_states(v, s) for v, s in states], []
        if num_states == 2:
            pairs = [
                (*(x.contiguous() for x in v.unbind(1)), *(x.contiguous() for x in s.unbind(1))) for v, s in states
            ]
            calls = [partial(flashinfer.merge_state, v, s, w, u) for v, w, s, u in pairs]
            yield "merge_state", text, num_bytes, calls, []


ROWS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "norm": norm_rows,
    "activation": activation_rows,
    "rope": rope_rows,
    "append": append_rows,
    "fused": fused_rows,
    "quant": quant_rows,
    "pack": pack_rows,
    "merge": merge_rows,
}


if __name__ == "__main__":
    main(__doc__, CASES, ROWS)
