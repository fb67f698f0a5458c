# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode, as TVM's attention backend calls them: a plan function for a step, a run function for each layer.

Arguments come by position, in the order of the functions here. Of all of them:

- `float_workspace`, `int_workspace`: memory on the device of the run, for partial results and the schedule. An int
  workspace holds one plan at a time. `pinned_workspace` is not used: schedules are made on the device.
- index arrays of a plan function are int32 on the CPU, those of a run function int32 on the device; planned again
  whenever their values change.
- `plan_info`: what the plan function returned.
- `q` `[num_tokens, num_qo_heads, head_dim_qk]`, `out` `[num_tokens, num_qo_heads, head_dim_vo]`, `lse` fp32
  `[num_tokens, num_qo_heads]` (base 2) or None.
- `kv_layout_code`: 0 for NHD, 1 for HND. `mask_mode_code`: 0 for none, 1 for causal.
- `rope_rcp_scale`, `rope_rcp_theta` are of rotation on the fly, which TVM has done elsewhere; they change nothing.

Errors are those of flashinfer, and say which argument it was.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.attention.plan import Shape
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from flashinfer_tvm import schedules
from flashinfer_tvm.schedules import Batch, Described, take_index, take_offsets, take_workspaces
from flashinfer_tvm.tensors import tensors


def batch_prefill_plan(
    float_workspace: Any,
    int_workspace: Any,
    pinned_workspace: Any,
    qo_indptr: Any,
    kv_indptr: Any,
    kv_len: Any,
    total_num_rows: int,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    enable_cuda_graph: bool,
    head_dim_qk: int,
    head_dim_vo: int,
    causal: bool,
    window_left: int,
    fixed_split_size: int = -1,
    disable_split_kv: bool = False,
    num_colocated_ctas: int = 0,
) -> list[int]:
    """Of `batch_prefill_paged_run`, or with page_size 1 of `batch_prefill_ragged_run`, whose rows count as pages.

    Args:
        qo_indptr, kv_indptr: `[batch_size + 1]`, where each request's queries and pages start.
        kv_len: `[batch_size]`, keys of each request.
        total_num_rows: tokens of the batch.
        causal, window_left: as the runs say them, which decide.
        fixed_split_size, disable_split_kv: as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        num_colocated_ctas: of no use here.
    """
    op = "batch_prefill_plan"
    _, ints = take_workspaces(op, float_workspace, int_workspace)
    schedules.require_no_graph(op, enable_cuda_graph)
    shape = Shape.of(op, batch_size, num_qo_heads, num_kv_heads, page_size, head_dim_qk, head_dim_vo)
    rows = take_offsets(op, "qo_indptr", qo_indptr, shape.batch_size)
    pages = take_offsets(op, "kv_indptr", kv_indptr, shape.batch_size)
    lengths = take_index(op, "kv_len", kv_len, shape.batch_size)
    schedules.require_lengths(op, "kv_len", lengths, pages, shape.page_size)
    num_tokens, num_rows = int(rows[-1]), checks.integer(op, "total_num_rows", total_num_rows, 0)
    checks.require(
        num_tokens <= num_rows, op, f"qo_indptr ends at {num_tokens}; expected at most total_num_rows, {num_rows}"
    )
    options = {
        "fixed_split_size": checks.integer(op, "fixed_split_size", fixed_split_size, -1),
        "disable_split_kv": checks.boolean(op, "disable_split_kv", disable_split_kv),
    }
    return schedules.note(ints, op, shape, options, num_tokens, int(pages[-1]))


def batch_prefill_paged_run(
    float_workspace: Any,
    int_workspace: Any,
    plan_info: Any,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    qo_indptr: Any,
    kv_indptr: Any,
    kv_indices: Any,
    last_page_len: Any,
    out: Any,
    lse: Any,
    mask_mode_code: int,
    kv_layout_code: int,
    window_left: int,
    enable_pdl: bool,
    sm_scale: float,
    rope_rcp_scale: float = 1.0,
    rope_rcp_theta: float = 1.0,
) -> None:
    """Attention of one layer over pages.

    Args:
        k_pages, v_pages: `[num_pages, page_size, num_kv_heads, head_dim]` (NHD; HND swaps the axes in the middle), any
            strides over whole rows.
        kv_indices: page numbers, as many as kv_indptr of the plan ends at, or more.
        last_page_len: `[batch_size]`, keys in the last page of each request.
    """
    schedules.run(
        "batch_prefill_paged_run", "batch_prefill_plan", _describe_paged, (float_workspace, int_workspace), plan_info,
        {"q": q, "k_pages": k_pages, "v_pages": v_pages}, out, lse,
        {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "last_page_len": last_page_len},
        (kv_layout_code, mask_mode_code, window_left, sm_scale), enable_pdl,
    )  # fmt: skip


def batch_prefill_ragged_run(
    float_workspace: Any,
    int_workspace: Any,
    plan_info: Any,
    q: Any,
    k: Any,
    v: Any,
    qo_indptr: Any,
    kv_indptr: Any,
    out: Any,
    lse: Any,
    mask_mode_code: int,
    kv_layout_code: int,
    window_left: int,
    enable_pdl: bool,
    sm_scale: float,
    rope_rcp_scale: float = 1.0,
    rope_rcp_theta: float = 1.0,
) -> None:
    """Attention of one layer over keys and values that lie request after request.

    Args:
        k, v: `[num_kv_tokens, num_kv_heads, head_dim]` (NHD; HND swaps the first axes).
    """
    schedules.run(
        "batch_prefill_ragged_run", "batch_prefill_plan", _describe_ragged, (float_workspace, int_workspace), plan_info,
        {"q": q, "k": k, "v": v}, out, lse, {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr},
        (kv_layout_code, mask_mode_code, window_left, sm_scale), enable_pdl, kv_is_pair=False,
    )  # fmt: skip


def batch_decode_plan(
    float_workspace: Any,
    int_workspace: Any,
    pinned_workspace: Any,
    kv_indptr: Any,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    enable_cuda_graph: bool,
    window_left: int,
    logits_soft_cap: float,
    head_dim_qk: int,
    head_dim_vo: int,
    empty_q: Any,
    empty_kv: Any,
) -> list[int]:
    """Of `batch_decode_run`.

    Args:
        kv_indptr: `[batch_size + 1]`, where each request's pages start.
        window_left: as the runs say it, which decide.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`; 0 for none.
        empty_q, empty_kv: tensors of any size that have the dtypes of q and of the cache.
    """
    op = "batch_decode_plan"
    _, ints = take_workspaces(op, float_workspace, int_workspace)
    schedules.require_no_graph(op, enable_cuda_graph)
    shape = Shape.of(op, batch_size, num_qo_heads, num_kv_heads, page_size, head_dim_qk, head_dim_vo)
    if shape.head_dim_qk != shape.head_dim_vo:
        raise UnsupportedConfig(
            f"{op}: head_dim_qk is {shape.head_dim_qk}, head_dim_vo {shape.head_dim_vo}; expected one head_dim. Next "
            "step: plan it as a prefill of one query a request"
        )
    pages = take_offsets(op, "kv_indptr", kv_indptr, shape.batch_size)
    like_q, like_kv = tensors(op, empty_q=empty_q, empty_kv=empty_kv)
    options = {
        "logits_soft_cap": checks.real(op, "logits_soft_cap", logits_soft_cap, at_least=0),
        "q_data_type": like_q.dtype,
        "kv_data_type": like_kv.dtype,
    }
    return schedules.note(ints, op, shape, options, shape.batch_size, int(pages[-1]))


def batch_decode_run(
    float_workspace: Any,
    int_workspace: Any,
    plan_info: Any,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    kv_indptr: Any,
    kv_indices: Any,
    last_page_len: Any,
    out: Any,
    lse: Any,
    kv_layout_code: int,
    window_left: int,
    enable_pdl: bool,
    sm_scale: float,
    rope_rcp_scale: float = 1.0,
    rope_rcp_theta: float = 1.0,
) -> None:
    """Attention of one new token a request. k_pages, v_pages, kv_indices, last_page_len: as in
    `batch_prefill_paged_run`."""
    schedules.run(
        "batch_decode_run", "batch_decode_plan", _describe_decode, (float_workspace, int_workspace), plan_info,
        {"q": q, "k_pages": k_pages, "v_pages": v_pages}, out, lse,
        {"kv_indptr": kv_indptr, "kv_indices": kv_indices, "last_page_len": last_page_len},
        (kv_layout_code, window_left, sm_scale), enable_pdl,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ how runs are planned


def _describe_paged(
    op: str, batch: Batch, taken: list[torch.Tensor], index: dict[str, Any], options: tuple[Any, ...]
) -> Described:
    layout, *mask_and_scale = options
    q, device = taken[0], taken[0].device
    schedules.require_reach(op, batch, "q", q, batch.num_tokens)
    arguments = {"page_size": batch.shape.page_size, **_arguments_of_prefill(op, batch, taken, *mask_and_scale)}
    places = _index(op, batch, index, device)
    return Described(BatchPrefillWithPagedKVCacheWrapper, schedules.layout_of(op, layout), places, arguments)


def _describe_ragged(
    op: str, batch: Batch, taken: list[torch.Tensor], index: dict[str, Any], options: tuple[Any, ...]
) -> Described:
    layout, *mask_and_scale = schedules.layout_of(op, options[0]), *options[1:]
    q, k, device = taken[0], taken[1], taken[0].device
    checks.require(
        batch.shape.page_size == 1, op, f"planned for pages of {batch.shape.page_size}; expected page_size 1"
    )
    schedules.require_reach(op, batch, "q", q, batch.num_tokens)
    schedules.require_reach(op, batch, "k", k, batch.num_entries, axis=int(layout == "HND"))
    places = _index(op, batch, index, device)
    arguments = _arguments_of_prefill(op, batch, taken, *mask_and_scale)
    return Described(BatchPrefillWithRaggedKVCacheWrapper, layout, places, arguments)


def _describe_decode(
    op: str, batch: Batch, taken: list[torch.Tensor], index: dict[str, Any], options: tuple[Any, ...]
) -> Described:
    layout, window_left, sm_scale = options
    arguments = {
        "num_qo_heads": batch.shape.num_qo_heads,
        "num_kv_heads": batch.shape.num_kv_heads,
        "head_dim": batch.shape.head_dim_qk,
        "page_size": batch.shape.page_size,
        "window_left": window_left,
        "sm_scale": sm_scale,
        "o_data_type": taken[-1].dtype,
        **batch.options,
    }
    places = _index(op, batch, index, taken[0].device)
    return Described(BatchDecodeWithPagedKVCacheWrapper, schedules.layout_of(op, layout), places, arguments)


def _index(op: str, batch: Batch, index: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    num_requests = batch.shape.batch_size
    sizes = {"kv_indices": batch.num_entries, "last_page_len": num_requests}
    return tuple(
        take_index(op, name, given, sizes.get(name, num_requests + 1), device) for name, given in index.items()
    )


def _arguments_of_prefill(
    op: str, batch: Batch, taken: list[torch.Tensor], mask_mode_code: Any, window_left: Any, sm_scale: Any
) -> dict[str, Any]:
    q, k, _, out = taken
    return {
        "num_qo_heads": batch.shape.num_qo_heads,
        "num_kv_heads": batch.shape.num_kv_heads,
        "head_dim_qk": batch.shape.head_dim_qk,
        "head_dim_vo": batch.shape.head_dim_vo,
        "causal": schedules.is_causal(op, mask_mode_code),
        "window_left": window_left,
        "sm_scale": sm_scale,
        "q_data_type": q.dtype,
        "kv_data_type": k.dtype,
        "o_data_type": out.dtype,
        **batch.options,
    }
