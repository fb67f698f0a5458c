# SPDX-License-Identifier: Apache-2.0
"""Latent attention, as TVM's attention backend calls it. What all functions have in common is said in paged.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from flashinfer.attention.plan import Shape
from flashinfer.host import checks
from flashinfer.mla import BatchMLAPagedAttentionWrapper
from flashinfer_tvm import schedules
from flashinfer_tvm.schedules import Batch, Described, take_index, take_offsets, take_workspaces
from flashinfer_tvm.tensors import environment_stream, tensor


def batch_mla_plan(
    float_workspace: Any,
    int_workspace: Any,
    pinned_workspace: Any,
    qo_indptr: Any,
    kv_indptr: Any,
    kv_len: Any,
    num_heads: int,
    head_dim_ckv: int,
    causal: bool,
) -> list[int]:
    """Of `batch_mla_run`.

    Args:
        qo_indptr, kv_indptr: `[batch_size + 1]`, where each request's queries and pages start.
        kv_len: `[batch_size]`, tokens of each request in the cache.
        head_dim_ckv: elements of the latent part of a row.
        causal: as the runs say it, which decide.
    """
    op = "batch_mla_plan"
    _, ints = take_workspaces(op, float_workspace, int_workspace)
    rows = tensor(op, "qo_indptr", qo_indptr)
    checks.require(rows.numel() > 0, op, "qo_indptr is empty; expected [batch_size + 1] offsets")
    batch_size = rows.numel() - 1
    rows = take_offsets(op, "qo_indptr", rows, batch_size)
    pages = take_offsets(op, "kv_indptr", kv_indptr, batch_size)
    lengths = take_index(op, "kv_len", kv_len, batch_size)
    schedules.require_lengths(op, "kv_len", lengths, pages, (1 << 31) - 1)  # the size of a page is known to runs
    shape = Shape.of(op, batch_size, num_heads, 1, 1, head_dim_ckv, head_dim_ckv)
    copies = (rows.clone(), pages.clone(), lengths.clone())
    return schedules.note(ints, op, shape, {}, int(rows[-1]), int(pages[-1]), copies)


def batch_mla_run(
    float_workspace: Any,
    int_workspace: Any,
    plan_info: Any,
    q_nope: Any,
    q_pe: Any,
    ckv_cache: Any,
    kpe_cache: Any,
    kv_indices: Any,
    out: Any,
    lse: Any,
    mask_mode_code: int,
    num_heads: int,
    page_size: int,
    sm_scale: float,
    return_lse_base_on_e: bool = False,
) -> None:
    """Attention of one layer, over the lengths that were planned.

    Args:
        q_nope, q_pe: `[num_tokens, num_heads, head_dim_ckv]` and `[…, head_dim_kpe]`.
        ckv_cache, kpe_cache: `[num_pages, page_size, head_dim_ckv]` and `[…, head_dim_kpe]`, usually parts of one row.
        kv_indices: page numbers.
        return_lse_base_on_e: lse is a natural logarithm.
    """
    op = "batch_mla_run"
    is_natural = checks.boolean(op, "return_lse_base_on_e", return_lse_base_on_e)
    operands = {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
    found = schedules.run(
        op, "batch_mla_plan", _describe, (float_workspace, int_workspace), plan_info, operands, out, lse,
        {"kv_indices": kv_indices}, (mask_mode_code, num_heads, page_size, sm_scale), kv_is_pair=False,
    )  # fmt: skip
    if found is not None and is_natural:
        with environment_stream(found.device):
            found.mul_(math.log(2))


def _describe(
    op: str, batch: Batch, taken: list[torch.Tensor], index: dict[str, Any], options: tuple[Any, ...]
) -> Described:
    q_nope, q_pe, ckv = taken[:3]
    mask_mode_code, num_heads, page_size, sm_scale = options
    schedules.require_reach(op, batch, "q_nope", q_nope, batch.num_tokens)
    checks.require(q_pe.dim() == 3, op, f"q_pe has shape {list(q_pe.shape)}; expected three dimensions")
    heads = checks.integer(op, "num_heads", num_heads, 1)
    checks.require(
        heads == batch.shape.num_qo_heads, op, f"num_heads is {heads}; planned for {batch.shape.num_qo_heads}"
    )
    rows, offsets, lengths = batch.lengths
    pages = take_index(op, "kv_indices", index["kv_indices"], batch.num_entries, q_nope.device)
    arguments = {
        "num_heads": heads,
        "head_dim_ckv": batch.shape.head_dim_vo,
        "head_dim_kpe": q_pe.shape[2],
        "page_size": page_size,
        "causal": schedules.is_causal(op, mask_mode_code),
        "sm_scale": sm_scale,
        "q_data_type": q_nope.dtype,
        "kv_data_type": ckv.dtype,
    }
    return Described(BatchMLAPagedAttentionWrapper, None, (rows, offsets, pages, lengths), arguments)
