"""What the tests of latent attention share: a batch over hostile memory, what the oracle says of it, the comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashinfer
from tests.attention.prefill_kit import BF16, check, offsets, widen
from tests.oracles.attention import attention

__all__ = ["BF16", "Batch", "Case", "check", "expect", "make_batch", "make_wrapper", "plan", "run"]
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


@dataclass
class Batch:
    case: Case
    q: tuple[Tensor, Tensor]  # q_nope and q_pe
    kv: list[Tensor]  # per request [kv_len, 1, head_dim_ckv + head_dim_kpe]
    caches: tuple[Tensor, Tensor]
    indices: tuple[Tensor, ...]  # as plan() takes them


def make_batch(case: Case, device: torch.device, seed: int = 0, num_pages: int = 0) -> Batch:
    """num_pages: of the cache at least."""
    generator = torch.Generator().manual_seed(seed)
    (dim_ckv, dim_kpe), size, kv_dtype = case.dims, case.page_size, case.kv_dtype or case.q_dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(sum(case.qo_lens), case.num_heads, dim_ckv + dim_kpe).to(case.q_dtype)
    shared = draw(case.num_shared_pages * size, 1, dim_ckv + dim_kpe).to(kv_dtype)
    kv = [torch.cat([shared.float(), draw(n, 1, dim_ckv + dim_kpe)])[:n].to(kv_dtype) for n in case.kv_lens]

    counts = [-(-n // size) for n in case.kv_lens]
    pool = torch.randperm(max(sum(counts) + 3, num_pages), generator=generator).tolist()
    cache = torch.full((len(pool), size, dim_ckv + dim_kpe), math.nan)
    of_shared, listed = [pool.pop() for _ in range(case.num_shared_pages)], []
    for rows, count in zip(kv, counts):
        pages = [of_shared[i] if i < len(of_shared) else pool.pop() for i in range(count)]
        for i, page in enumerate(pages):
            piece = rows[i * size : (i + 1) * size, 0].float()
            cache[page, : len(piece)] = piece
        listed += [*pages, *[-1] * case.spare_pages]
    indptr = offsets(tuple(count + case.spare_pages for count in counts))
    lengths = torch.tensor(case.kv_lens, dtype=torch.int32)
    indices = (offsets(case.qo_lens), indptr, torch.tensor([*listed, -1, 1 << 30], dtype=torch.int32), lengths)

    cache, q = cache.to(device, kv_dtype), q.to(device)
    caches, queries = (cache[..., :dim_ckv], cache[..., dim_ckv:]), (q[..., :dim_ckv], q[..., dim_ckv:])
    if case.rows != "one":
        dense = widen if case.rows == "wide" else Tensor.contiguous
        caches, queries = (dense(caches[0]), dense(caches[1])), (dense(queries[0]), dense(queries[1]))
    return Batch(case, queries, kv, caches, indices)


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
