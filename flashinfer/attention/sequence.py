# SPDX-License-Identifier: Apache-2.0
"""Keys and values without pages: the rows of one sequence, or of several end to end."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.host import checks, paged_cache
from flashinfer.host.paged_cache import KvStrides
from flashinfer.host.rows import require_rows


class Sequence(NamedTuple):
    """Of the arguments of an operator over one sequence."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    kv_len: int
    kv_strides: KvStrides

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


def check_sequence(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Sequence:
    """q: `[..., num_qo_heads, head_dim]`, k and v as in `row_strides`. Raises ValueError or UnsupportedConfig."""
    checks.require_memory(op, q=q, k=k, v=v)
    paged_cache.require_layout(op, layout)
    strides = row_strides(op, k, v, layout)
    require_rows(op, "q", q)
    checks.require_device(op, "k", k, q, "q")
    rows, heads = (0, 1) if layout == "NHD" else (1, 0)
    head_dim = q.shape[-1]
    checks.require(
        k.shape[2] == head_dim, op, f"k dim 2 (head_dim) is {k.shape[2]}, q has {head_dim}; they must be equal"
    )
    checks.require(v.shape[2] >= 1, op, f"v has shape {list(v.shape)}; expected a head_dim of 1 or more")
    paged_cache.require_heads(op, q.shape[-2], k.shape[heads])
    return Sequence(q.shape[-2], k.shape[heads], head_dim, v.shape[2], k.shape[rows], strides)


def row_strides(op: str, k: torch.Tensor, v: torch.Tensor, layout: str) -> KvStrides:
    """Strides of K and V given as rows: `[kv_len, num_kv_heads, head_dim]` (NHD) or with the first axes swapped
    (HND).
    """
    for name, tensor in (("k", k), ("v", v)):
        checks.require(
            tensor.dim() == 3, op, f"{name} has shape {list(tensor.shape)}; expected three dimensions ({layout})"
        )
        require_rows(op, name, tensor)
    checks.require(
        k.shape[:2] == v.shape[:2], op, f"k has shape {list(k.shape)}, v {list(v.shape)}; lengths and heads must agree"
    )
    checks.require(k.dtype == v.dtype, op, f"k is {k.dtype}, v {v.dtype}; expected one dtype")
    checks.require_device(op, "v", v, k, "k")
    row, head = (0, 1) if layout == "NHD" else (1, 0)
    return KvStrides(k.stride(row), 0, k.stride(head), v.stride(row), 0, v.stride(head))
