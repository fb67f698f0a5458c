# SPDX-License-Identifier: Apache-2.0
"""What the tests of decode share: a batch over a hostile paged cache, what the oracle says of it, the comparison."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flashinfer
from tests.attention.prefill_kit import evaluated
from tests.oracles.attention import attention, paged_request
from tests.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    """A batch over a paged cache. Unused pages and entries hold NaN; page numbers are shuffled."""

    name: str
    kv_lens: tuple[int, ...] = (33, 1, 200, 64, 517)
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    page_size: int = 16
    q_dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    o_dtype: torch.dtype | None = None
    layout: str = "NHD"
    cache: str = "one"  # "one" 5-D tensor, "tuple" (k, v), "strided": rows cut out of a wider tensor
    options: dict[str, Any] = field(default_factory=dict)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def cut_rows(x: Tensor, device: torch.device) -> Tensor:
    """The same values as rows of a wider tensor: no stride but the last is the packed one."""
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 32), math.nan, dtype=x.dtype, device=device)
    view = wide[..., : x.shape[-2], : x.shape[-1]]
    view.copy_(x)
    return view


class Batch:
    """The tensors of a case on a device, and what the oracle says."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(seed)
        num_qo_heads, num_kv_heads = case.heads
        kv_dtype = case.kv_dtype or case.q_dtype
        num_pages = [-(-length // case.page_size) for length in case.kv_lens]
        total = sum(num_pages)
        order = torch.randperm(total + 3, generator=generator)  # three pages belong to nobody
        self.indptr = torch.tensor(
            [0, *torch.tensor(num_pages, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32
        )
        self.indices = torch.cat([order[:total], torch.zeros(5, dtype=torch.int64)]).to(torch.int32)
        self.last_page_len = torch.tensor(
            [(length - 1) % case.page_size + 1 if length else 0 for length in case.kv_lens], dtype=torch.int32
        )
        shape = (total + 3, case.page_size, num_kv_heads, case.head_dim)
        self.q = random_rows((len(case.kv_lens), num_qo_heads, case.head_dim), case.q_dtype, generator)
        k, v = random_rows(shape, kv_dtype, generator), random_rows(shape, kv_dtype, generator)
        used = torch.zeros(shape[:2], dtype=torch.bool)
        for i, pages in enumerate(self.pages):
            for j, page in enumerate(pages):
                used[page, : case.page_size if j + 1 < len(pages) else int(self.last_page_len[i])] = True
        for half in (k, v):
            values = half.float()
            values[~used] = math.nan
            half.copy_(values.to(kv_dtype))
        if case.layout == "HND":
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        self.cache: Tensor | tuple[Tensor, Tensor]
        if case.cache == "one":
            self.cache = torch.stack([k, v], dim=1).to(device)
        elif case.cache == "tuple":
            self.cache = (k.to(device), v.to(device))
        else:
            k, v = cut_rows(k, device), cut_rows(v, device)
            self.cache = (k, v)

    @property
    def pages(self) -> list[list[int]]:
        offsets = self.indptr.tolist()
        return [self.indices[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]

    def expected(self, **options: Any) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        functions = evaluated(self.case.options)
        q = self.q.to(self.device)  # where the tensors are that functions read
        for i, pages in enumerate(self.pages):
            k, v = paged_request(self.cache, self.case.layout, pages, int(self.last_page_len[i]))
            out, lse = attention(q[i : i + 1], k, v, **{**self.case.options, **functions, **options}, request_idx=i)
            outs.append(out)
            lses.append(lse)
        if not outs:
            return torch.zeros(self.q.shape, dtype=torch.float64), torch.zeros(self.q.shape[:2], dtype=torch.float64)
        return torch.cat(outs), torch.cat(lses)

    def plan(
        self, wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, index_device: str = "same", **extra: Any
    ) -> None:
        case = self.case
        options = {
            name: value for name, value in case.options.items() if not name.endswith(("q_scale", "k_scale", "v_scale"))
        }
        where = self.device if index_device == "same" else torch.device(index_device)
        wrapper.plan(
            *(x.to(where) for x in (self.indptr, self.indices, self.last_page_len)),
            *case.heads,
            case.head_dim,
            case.page_size,
            q_data_type=case.q_dtype,
            kv_data_type=case.kv_dtype,
            o_data_type=case.o_dtype,
            **{**options, **extra},
        )

    def run(self, wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, **extra: Any) -> tuple[Tensor, Tensor]:
        scales = {
            name: value for name, value in self.case.options.items() if name.endswith(("q_scale", "k_scale", "v_scale"))
        }
        out = torch.full(self.q.shape, math.nan, dtype=self.case.o_dtype or self.case.q_dtype, device=self.device)
        lse = torch.full(self.q.shape[:2], math.nan, device=self.device)
        wrapper.run(self.q.to(self.device), self.cache, out=out, lse=lse, return_lse=True, **{**scales, **extra})
        return out, lse


def make_wrapper(device: torch.device, layout: str = "NHD") -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    workspace = torch.empty(64 << 20 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)


def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], case: Case) -> None:
    out, lse = actual
    # CUDA rounds a rotated key, or one of another 16-bit type than q, to the type of q before the tensor cores take it.
    rotated = case.options.get("pos_encoding_mode") == "ROPE_LLAMA"
    rounded = out.is_cuda and (rotated or (case.q_dtype == BF16 and case.kv_dtype == FP16))
    assert_close(out, expected[0], scale=2.0 if rounded else 1.0)
    finite = torch.isfinite(expected[1])
    assert torch.equal(lse.cpu()[~finite].double(), expected[1][~finite])
    tolerance = 2e-2 if rounded else 1e-4
    torch.testing.assert_close(lse.cpu().double()[finite], expected[1][finite], rtol=1e-5, atol=tolerance)
