# SPDX-License-Identifier: Apache-2.0
"""What the tests of prefill share: a batch over hostile memory, what the oracle says of it, the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import flashinfer
from flashinfer.attention.plan import Shape
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.attention.variant import Variant
from flashinfer.host.paged_cache import PagedKv
from tests.attention.graph_kit import replay_long_and_short
from tests.oracles.attention import attention
from tests.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CAUSAL = {"causal": True}


@dataclass(frozen=True)
class Case:
    """A batch. In a paged cache, unused pages and entries hold NaN and page numbers are shuffled."""

    name: str
    qo_lens: tuple[int, ...] = (33, 1, 70, 128)
    kv_lens: tuple[int, ...] = (33, 90, 200, 517)
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    head_dim_vo: int = 0
    page_size: int = 16
    q_dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    o_dtype: torch.dtype | None = None
    layout: str = "NHD"
    storage: str = "paged"
    strided: bool = False  # rows cut out of wider tensors
    mask: str = ""  # "bool" or "packed": a random custom mask
    options: dict[str, Any] = field(default_factory=lambda: dict(CAUSAL))
    cuda_only: bool = False  # named_cases.skip_elsewhere


# What every kernel has to get right, whatever it computes on.
LENGTHS_AND_HEADS = (
    Case("long_kv_few_queries", qo_lens=(1, 5, 16), kv_lens=(3000, 5000, 200)),
    Case("many_splits", qo_lens=(3,), kv_lens=(20000,), heads=(4, 1)),  # merged in two steps
    Case("many_short", qo_lens=tuple(i % 7 + 1 for i in range(70)), kv_lens=tuple(i % 40 + 7 for i in range(70))),
    Case("empty_requests", qo_lens=(0, 5, 0, 3, 0), kv_lens=(7, 9, 0, 300, 0)),
    Case("no_kv", qo_lens=(4, 130, 1), kv_lens=(0, 0, 70)),
    Case("queries_beyond_kv", qo_lens=(50, 200), kv_lens=(20, 130)),
    Case("empty_batch", qo_lens=(), kv_lens=()),
    Case("strided", strided=True),
    Case("ragged_strided", storage="ragged", strided=True),
    Case("mha", heads=(4, 4)),
    Case("mqa", heads=(8, 1)),
)


@dataclass
class Batch:
    case: Case
    q: Tensor
    k: list[Tensor]  # per request [kv_len, num_kv_heads, head_dim]
    v: list[Tensor]
    kv: Tensor | tuple[Tensor, Tensor]  # as run() takes it
    indices: tuple[Tensor, ...]  # qo_indptr and the KV's, as plan() takes them
    masks: list[Tensor] | None


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)


def make_batch(case: Case, device: torch.device, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    num_qo_heads, num_kv_heads = case.heads
    dims, kv_dtype = (case.head_dim, case.head_dim_vo or case.head_dim), case.kv_dtype or case.q_dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(sum(case.qo_lens), num_qo_heads, dims[0]).to(case.q_dtype)
    k, v = ([draw(n, num_kv_heads, dim).to(kv_dtype) for n in case.kv_lens] for dim in dims)
    masks = None
    if case.mask:
        masks = [torch.rand(m, n, generator=generator) < 0.6 for m, n in zip(case.qo_lens, case.kv_lens)]
    if case.storage == "ragged":
        halves = [torch.cat([x.float() for x in rows]).to(kv_dtype) if rows else draw(0, num_kv_heads, dim).to(kv_dtype)
                  for rows, dim in zip((k, v), dims)]  # fmt: skip
        if case.layout == "HND":
            halves = [half.transpose(0, 1).contiguous() for half in halves]
        indices: tuple[Tensor, ...] = (offsets(case.qo_lens), offsets(case.kv_lens))
    else:
        num_pages = [-(-n // case.page_size) for n in case.kv_lens]
        pool = torch.randperm(sum(num_pages) + 3, generator=generator)
        halves = []
        for rows, dim in zip((k, v), dims):
            half = torch.full((len(pool), case.page_size, num_kv_heads, dim), math.nan)
            page = 0
            for row in rows:
                for first in range(0, len(row), case.page_size):
                    piece = row[first : first + case.page_size].float()
                    half[pool[page], : len(piece)] = piece
                    page += 1
            if case.layout == "HND":
                half = half.transpose(1, 2).contiguous()
            halves.append(half.to(kv_dtype))
        last = torch.tensor([(n - 1) % case.page_size + 1 for n in case.kv_lens], dtype=torch.int32)
        indices = (offsets(case.qo_lens), offsets(tuple(num_pages)), pool.int(), last)
    q, halves = q.to(device), [half.to(device) for half in halves]
    if case.strided:
        q, *halves = (widen(x) for x in (q, *halves))
    kv: Tensor | tuple[Tensor, Tensor] = (halves[0], halves[1])
    if case.storage == "paged" and not case.strided and dims[0] == dims[1] and case.page_size != 3:
        kv = torch.stack([half.view(torch.uint8) for half in halves], dim=1).view(kv_dtype)
    return Batch(case, q, k, v, kv, indices, masks)


def widen(x: Tensor) -> Tensor:
    """The same values with gaps of NaN between rows and heads."""
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 32), math.nan, device=x.device).to(x.dtype)
    narrow = wide[..., : x.shape[-2], : x.shape[-1]]
    narrow.copy_(x)
    return narrow


def make_plan(kind: type[PrefillPlan], batch_size: int, lengths: tuple[int, int], fixed: int | None) -> PrefillPlan:
    workspaces = (torch.empty(8, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8))
    shape = Shape(batch_size, 32, 8, 16, 128, 128)
    kv = PagedKv("NHD", 16, 8, 128, 128, BF16)
    device = torch.device("cpu")
    return kind(
        "op", device, shape, (BF16, BF16, BF16), "causal", Variant.of("op", 128), kv, workspaces=workspaces,
        split_kv=True, lengths=lengths, fixed_split=fixed,
    )  # fmt: skip


def make_wrapper(case: Case, device: torch.device, **options: Any) -> Any:
    size = (64 << 20) if device.type == "cuda" else 8
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    kind = "Paged" if case.storage == "paged" else "Ragged"
    return getattr(flashinfer, f"BatchPrefillWith{kind}KVCacheWrapper")(workspace, case.layout, **options)


def plan(wrapper: Any, batch: Batch, **overrides: Any) -> None:
    case = batch.case
    options = {**case.options, **overrides}
    if batch.masks is not None:
        if case.mask == "bool":
            options["custom_mask"] = torch.cat([mask.flatten() for mask in batch.masks])
        else:
            packed = [flashinfer.packbits(mask.flatten(), bitorder="little") for mask in batch.masks]
            options["packed_custom_mask"] = torch.cat(packed)
    page = {"page_size": case.page_size} if case.storage == "paged" else {}
    wrapper.plan(
        *batch.indices, num_qo_heads=case.heads[0], num_kv_heads=case.heads[1], head_dim_qk=case.head_dim,
        head_dim_vo=case.head_dim_vo or None, q_data_type=case.q_dtype, kv_data_type=case.kv_dtype,
        o_data_type=case.o_dtype, **page, **options,
    )  # fmt: skip


def arguments(batch: Batch) -> tuple[Any, ...]:
    return (batch.q, *batch.kv) if batch.case.storage == "ragged" else (batch.q, batch.kv)


def run(wrapper: Any, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    out = torch.full((*batch.q.shape[:2], batch.case.head_dim_vo or batch.case.head_dim), math.nan)
    out = out.to(batch.q.device, batch.case.o_dtype or batch.q.dtype)
    lse = torch.full(batch.q.shape[:2], math.nan, device=batch.q.device)
    result = wrapper.run(*arguments(batch), out=out, lse=lse, return_lse=True, **options)
    assert result[0] is out and result[1] is lse
    return out, lse


def evaluated(options: dict[str, Any]) -> dict[str, Any]:
    """Functions of scores and masks among the options, as the oracle calls them."""
    return {name: options[name].evaluate for name in ("variant", "mask") if name in options}


def expect(batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    outs, lses, begin = [], [], 0
    for i, qo_len in enumerate(batch.case.qo_lens):
        mask = {} if batch.masks is None else {"custom_mask": batch.masks[i]}
        q = batch.q[begin : begin + qo_len]
        out, lse = attention(
            q,
            batch.k[i],
            batch.v[i],
            **{**batch.case.options, **mask, **evaluated(batch.case.options), "request_idx": i, **options},
        )
        outs, lses, begin = [*outs, out], [*lses, lse], begin + qo_len
    if not outs:
        return torch.zeros(0, batch.case.heads[0], batch.case.head_dim).double(), torch.zeros(
            0, batch.case.heads[0]
        ).double()
    return torch.cat(outs), torch.cat(lses)


def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    assert_close(actual[0], expected[0], scale=scale)
    # The LSE is fp32, but of scores whose operands were rounded to 16 bits where RoPE stores them again.
    torch.testing.assert_close(actual[1].cpu().double(), expected[1], atol=scale * 1e-3, rtol=1e-4)


def tolerance_of(case: Case, device: torch.device) -> float:
    """Rotated queries and keys are rounded to 16 bits for the tensor cores: one more rounding of either operand."""
    rope = case.options.get("pos_encoding_mode") == "ROPE_LLAMA"
    return (12.0 if case.q_dtype == BF16 else 3.0) if rope and device.type == "cuda" else 1.0


def graph_wrapper(case: Case, device: torch.device, max_pages: int) -> Any:
    batch_size = len(case.qo_lens)
    buffers = {name: torch.zeros(batch_size + 1, dtype=torch.int32, device=device) for name in ("qo", "kv")}
    return make_wrapper(
        case, device, use_cuda_graph=True, qo_indptr_buf=buffers["qo"], paged_kv_indptr_buf=buffers["kv"],
        paged_kv_indices_buf=torch.zeros(max_pages, dtype=torch.int32, device=device),
        paged_kv_last_page_len_buf=torch.zeros(batch_size, dtype=torch.int32, device=device),
    )  # fmt: skip


def replay_other_lengths(case: Case, check: Callable[[Batch, tuple[Tensor, Tensor]], None]) -> None:
    """`graph_kit` over pages. Padding requests have no tokens and no pages. Of the case, dtypes and heads count."""
    device = torch.device("cuda")
    long = replace(case, qo_lens=(5, 40, 0, 19), kv_lens=(4000, 700, 0, 90))
    short = replace(case, qo_lens=(16, 16, 16, 16), kv_lens=(16, 17, 18, 19))
    short_batch, long_batch = (make_batch(case, device, seed=3) for case in (short, long))
    q = short_batch.q.clone()
    max_pages = sum(-(-n // case.page_size) for n in long.kv_lens) + 100
    size = (max_pages, 2, case.page_size, case.heads[1], case.head_dim)
    cache = torch.zeros(size, device=device).to(case.kv_dtype or case.q_dtype)
    wrapper = graph_wrapper(long, device, max_pages)

    def load(batch: Batch) -> None:
        assert isinstance(batch.kv, Tensor)
        q.copy_(batch.q)
        cache[: len(batch.kv)].copy_(batch.kv)

    replay_long_and_short(
        short_batch,
        long_batch,
        load=load,
        plan=lambda batch: plan(wrapper, batch),
        launch=lambda: wrapper.run(q, cache, return_lse=True),
        check=check,
        max_pages=max_pages,
    )


def surround(batch: Batch) -> tuple[Tensor, Tensor]:
    """The rows of a ragged batch's KV between rows of NaN, as views of larger tensors."""
    wide = [torch.full((len(half) + 512, *half.shape[1:]), math.nan).to(half.device, half.dtype) for half in batch.kv]
    k, v = (half[256:-256] for half in wide)
    for inner, half in zip((k, v), batch.kv):
        inner.copy_(half)
    return k, v
