# SPDX-License-Identifier: Apache-2.0
"""What the tests of latent attention share: a batch over hostile memory, what the oracle says of it, the comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer import target as targets
from flashinfer.attention.mla import launch
from flashinfer.families.attention.mla import SHORT_ROWS
from tests.attention.prefill_kit import BF16, check, offsets, widen
from tests.oracles.attention import attention
from tests.tolerances import assert_close

__all__ = [
    "BF16", "SCALED", "Batch", "Case", "check", "check_scaled", "each_kernel", "expect", "make_batch", "make_wrapper",
    "pack_rows", "plan", "run", "unpack_rows",
]  # fmt: skip
SCALED = torch.uint8  # rows of bytes, with scales of their own
DEEPSEEK_SCALE = 1.0 / math.sqrt(192)


@dataclass(frozen=True)
class Case:
    """A batch. Unused pages and entries hold NaN, page numbers are shuffled, and the list of pages goes on behind the
    last one with numbers that are none."""

    name: str
    qo_lens: tuple[int, ...] = (1, 1, 1, 1)
    kv_lens: tuple[int, ...] = (33, 90, 200, 517)
    num_heads: int = 16
    dims: tuple[int, int] = (512, 64)
    page_size: int = 64
    q_dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    causal: bool = True
    rows: str = "one"  # "one": ckv and kpe are views of one row; "two": dense tensors; "wide": cut out of wider ones
    num_shared_pages: int = 0  # that every request begins with
    spare_pages: int = 0  # of each request, listed but behind its last token
    sm_scale: float = DEEPSEEK_SCALE
    cuda_only: bool = False  # named_cases.skip_elsewhere


@dataclass
class Batch:
    case: Case
    q: tuple[Tensor, Tensor]  # q_nope and q_pe
    kv: list[Tensor]  # per request [kv_len, 1, head_dim_ckv + head_dim_kpe]
    caches: tuple[Tensor, Tensor] | tuple[Tensor]
    indices: tuple[Tensor, ...]  # as plan() takes them


def pack_rows(rows: Tensor, generator: torch.Generator, spread: float = 1.0) -> Tensor:
    """Rows of 512 + 64 as bytes: values in e4m3, their scales in float32, what has positions in bf16. Scales differ by
    token and by 128 columns, by 2^spread one way and the other."""
    values = (rows[..., :512].float() * 4).to(torch.float8_e4m3fn)  # four: that all bits of e4m3 are of use
    scales = 0.25 * torch.exp2(spread * (2 * torch.rand(*rows.shape[:-1], 4, generator=generator) - 1))
    parts = values, scales, rows[..., 512:].to(BF16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_rows(packed: Tensor) -> Tensor:
    """What they stand for, in fp64."""
    values = packed[..., :512].view(torch.float8_e4m3fn).double()
    scales = packed[..., 512:528].contiguous().view(torch.float32).double()
    return torch.cat([values * scales.repeat_interleave(128, dim=-1), packed[..., 528:].view(BF16).double()], dim=-1)


def make_batch(case: Case, device: torch.device, seed: int = 0, num_pages: int = 0) -> Batch:
    """num_pages: of the cache at least."""
    generator = torch.Generator().manual_seed(seed)
    (dim_ckv, dim_kpe), size, kv_dtype = case.dims, case.page_size, case.kv_dtype or case.q_dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(sum(case.qo_lens), case.num_heads, dim_ckv + dim_kpe).to(case.q_dtype)
    shared = draw(case.num_shared_pages * size, 1, dim_ckv + dim_kpe)
    if kv_dtype == SCALED:
        shared = pack_rows(shared, generator)
        kv = [torch.cat([shared, pack_rows(draw(n, 1, 576), generator)])[:n] for n in case.kv_lens]
        fill: float = 255  # NaN in each of the three types
    else:
        shared, fill = shared.to(kv_dtype), math.nan
        kv = [torch.cat([shared.float(), draw(n, 1, dim_ckv + dim_kpe)])[:n].to(kv_dtype) for n in case.kv_lens]

    counts = [-(-n // size) for n in case.kv_lens]
    pool = torch.randperm(max(sum(counts) + 3, num_pages), generator=generator).tolist()
    row_dtype = SCALED if kv_dtype == SCALED else torch.float32
    cache = torch.full((len(pool), size, 656 if kv_dtype == SCALED else dim_ckv + dim_kpe), fill, dtype=row_dtype)
    of_shared, listed = [pool.pop() for _ in range(case.num_shared_pages)], []
    for rows, count in zip(kv, counts):
        pages = [of_shared[i] if i < len(of_shared) else pool.pop() for i in range(count)]
        for i, page in enumerate(pages):
            piece = rows[i * size : (i + 1) * size, 0].to(row_dtype)
            cache[page, : len(piece)] = piece
        listed += [*pages, *[-1] * case.spare_pages]
    indptr = offsets(tuple(count + case.spare_pages for count in counts))
    lengths = torch.tensor(case.kv_lens, dtype=torch.int32)
    indices = (offsets(case.qo_lens), indptr, torch.tensor([*listed, -1, 1 << 30], dtype=torch.int32), lengths)

    cache, q = cache.to(device, kv_dtype), q.to(device)
    dense = {"one": lambda x: x, "two": Tensor.contiguous, "wide": widen}[case.rows]
    queries = dense(q[..., :dim_ckv]), dense(q[..., dim_ckv:])
    if kv_dtype == SCALED:
        return Batch(case, queries, [unpack_rows(rows) for rows in kv], (dense(cache),), indices)
    return Batch(case, queries, kv, (dense(cache[..., :dim_ckv]), dense(cache[..., dim_ckv:])), indices)


def make_wrapper(device: torch.device, **options: Any) -> flashinfer.BatchMLAPagedAttentionWrapper:
    size = (128 << 20) if device.type == "cuda" else 8
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    return flashinfer.BatchMLAPagedAttentionWrapper(workspace, **options)


def plan(wrapper: flashinfer.BatchMLAPagedAttentionWrapper, batch: Batch, **overrides: Any) -> None:
    case = batch.case
    arguments = {
        "num_heads": case.num_heads, "head_dim_ckv": case.dims[0], "head_dim_kpe": case.dims[1],
        "page_size": case.page_size, "causal": case.causal, "sm_scale": case.sm_scale, "q_data_type": case.q_dtype,
        "kv_data_type": case.kv_dtype or case.q_dtype,
    }  # fmt: skip
    wrapper.plan(*batch.indices, **{**arguments, **overrides})


def run(wrapper: flashinfer.BatchMLAPagedAttentionWrapper, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    q_nope = batch.q[0]
    out = torch.full(q_nope.shape, math.nan, dtype=q_nope.dtype, device=q_nope.device)
    lse = torch.full(q_nope.shape[:2], math.nan, device=q_nope.device)
    result = wrapper.run(*batch.q, *batch.caches, out=out, lse=lse, return_lse=True, **options)
    assert result[0] is out and result[1] is lse
    return out, lse


def check_scaled(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], num_rows: int, device: torch.device
) -> None:
    """Of rows with scales, under requests of num_rows query rows. Hopper's kernel for many of them multiplies keys that
    were rounded to bf16, by 2^-9 at most: logits of ten are off by 0.01 and more."""
    if device.type == "cpu" or launch.target.of_device(device) != "sm_90a" or num_rows <= SHORT_ROWS:
        check(actual, expected)
        return
    assert_close(actual[0], expected[0], scale=2.0)
    torch.testing.assert_close(actual[1].cpu().double(), expected[1], atol=2.5e-2, rtol=1e-3)


def expect(batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale: of a quantized cache."""
    case, dim_ckv, begin = batch.case, batch.case.dims[0], 0
    q = torch.cat(batch.q, dim=-1)
    states = [(torch.zeros(0, case.num_heads, dim_ckv).double(), torch.zeros(0, case.num_heads).double())]
    for qo_len, rows in zip(case.qo_lens, batch.kv):
        of_request, begin = q[begin : begin + qo_len], begin + qo_len
        values = rows[..., :dim_ckv]
        scales = {"k_scale": scale, "v_scale": scale}
        states.append(attention(of_request, rows, values, causal=case.causal, sm_scale=case.sm_scale, **scales))
    outs, lses = zip(*states)
    return torch.cat(outs), torch.cat(lses)


@pytest.fixture(params=["cpu", *[pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda_any")]])
def each_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each target in turn, and on Hopper the kernel of all other GPUs besides its own: machine code of sm_90."""
    device = torch.device(str(request.param).removesuffix("_any"))
    if request.param == "cuda_any":
        if targets.of_device(device) != "sm_90a":
            pytest.skip("there is one kernel for this GPU")
        monkeypatch.setattr(launch, "target", SimpleNamespace(of_device=lambda device: "sm_90"))
    return device
