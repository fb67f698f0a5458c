# SPDX-License-Identifier: Apache-2.0
"""From a call to its launches, one pair prepared for each signature."""

from __future__ import annotations

from typing import Any

import torch

from flashinfer import locks
from flashinfer.attention.block_table.bind import Bound, Given, Options, bind, check_indices, require_tensors
from flashinfer.attention.plan import dtype_of
from flashinfer.attention.planned import Result
from flashinfer.attention.variant import read_scales
from flashinfer.host import memo, traced
from flashinfer.host.checks import LOWEST_ADDRESS

_bounds: memo.Memo[Bound] = memo.Memo()
# A kernel follows its planner at once: on a stream that threads share, another plan would come between.
_planning = locks.lock()


def call(op: str, given: Given, options: Options, return_lse: bool = False) -> Result:
    if not traced.is_dynamo_compiling():
        return _run(op, given, options, return_lse)
    query, kv_cache, out, lse = given.query, given.kv_cache, given.out, given.lse
    if out is None:
        head_dim = (kv_cache if isinstance(kv_cache, torch.Tensor) else kv_cache[1]).shape[-1]
        dtype = query.dtype if options.out_dtype is None else dtype_of(op, "out_dtype", options.out_dtype)
        out = query.new_empty((*query.shape[:-1], head_dim), dtype=dtype)
    if return_lse and lse is None:
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _door(op, *given._replace(out=out, lse=lse), *options[:-1])
    return (out, lse) if return_lse and lse is not None else out


def _run(op: str, given: Given, options: Options, return_lse: bool) -> Result:
    query, kv_cache, workspace_buffer, block_tables, seq_lens, qo_indptr, mask, sinks, out, lse = given
    try:
        if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 5 and kv_cache.shape[1] == 1:
            kv_cache = (kv_cache[:, 0], kv_cache[:, 0])
            given = given._replace(kv_cache=kv_cache)
        k, v = (kv_cache, kv_cache) if isinstance(kv_cache, torch.Tensor) else kv_cache
        bmm1_scale, bmm2_scale = options[:2]
        if isinstance(bmm1_scale, torch.Tensor) or isinstance(bmm2_scale, torch.Tensor):
            given_scales = {"bmm1_scale": bmm1_scale, "v_scale (bmm2_scale)": bmm2_scale}
            bmm1_scale, bmm2_scale = read_scales(op, given_scales, query.device)
            options = options._replace(bmm1_scale=bmm1_scale, bmm2_scale=bmm2_scale)
        q_ptr, k_ptr, v_ptr, work_ptr = query.data_ptr(), k.data_ptr(), v.data_ptr(), workspace_buffer.data_ptr()
        table_ptr, lens_ptr = block_tables.data_ptr(), seq_lens.data_ptr()
        qo_ptr = mask_ptr = sinks_ptr = out_ptr = lse_ptr = 0
        qo_key = mask_key = sinks_key = out_key = lse_key = None
        lowest = min(q_ptr, k_ptr, v_ptr, work_ptr, table_ptr, lens_ptr)
        if qo_indptr is not None:
            qo_ptr, qo_key = qo_indptr.data_ptr(), memo.signature(qo_indptr)
            lowest = min(lowest, qo_ptr)
        if mask is not None:
            mask_ptr, mask_key = mask.data_ptr(), memo.signature(mask)
            lowest = min(lowest, mask_ptr)
        if sinks is not None:
            sinks_ptr, sinks_key = sinks.data_ptr(), memo.signature(sinks)
            lowest = min(lowest, sinks_ptr)
        if out is not None:
            out_ptr, out_key = out.data_ptr(), memo.signature(out)
            lowest = min(lowest, out_ptr)
        if lse is not None:
            lse_ptr, lse_key = lse.data_ptr(), memo.signature(lse)
            lowest = min(lowest, lse_ptr)
        key = (
            op, query.dtype, query.shape, query.stride(), query.device, k.dtype, k.shape, k.stride(), k.device, v.dtype,
            v.shape, v.stride(), v.device, work_ptr, workspace_buffer.numel(), workspace_buffer.dtype,
            workspace_buffer.device, block_tables.dtype, block_tables.shape, block_tables.stride(), block_tables.device,
            seq_lens.dtype, seq_lens.shape, seq_lens.stride(), seq_lens.device, qo_key, mask_key, sinks_key, out_key,
            lse_key,
            options, (q_ptr | k_ptr | v_ptr | out_ptr) & 15,
        )  # fmt: skip
    except (AttributeError, RuntimeError, TypeError, ValueError):
        require_tensors(op, given)
        raise
    if lowest < LOWEST_ADDRESS:
        require_tensors(op, given)
    bound = _bounds.get(key)
    if bound is None:
        bound = _bounds.remember(key, bind(op, given, options))
    if bound.may_see_indices:
        check_indices(op, given, bound)
    run = bound.run
    if out is None:
        out = run.new_out()
        out_ptr = out.data_ptr()
    if return_lse and lse is None:
        lse = run.new_lse()
        lse_ptr = lse.data_ptr()
    addresses = sinks_ptr, q_ptr, out_ptr, lse_ptr, k_ptr, v_ptr + run.v_offset, 0, lens_ptr, table_ptr
    if bound.has_rows:
        with _planning:
            bound.planner(qo_ptr, 0, lens_ptr)
            run.launch(qo_ptr, mask_ptr, 0, *addresses)
    elif not run.is_empty:
        with _planning:
            bound.planner(0, lens_ptr)
            run.launch(*addresses)
    return (out, lse) if return_lse and lse is not None else out


def _run_by_items(op: str, *items: Any) -> None:
    given = Given._make(items[: len(Given._fields)])
    assert given.out is not None
    _run(op, given, Options._make((*items[len(Given._fields) :], given.out.dtype)), False)


_door = traced.door(
    "block_table_attention",
    _run_by_items,
    {
        "op": "str", "query": "Tensor", "kv_cache": traced.TENSORS, "workspace_buffer": "Tensor",
        "block_tables": "Tensor", "seq_lens": "Tensor",
        **dict.fromkeys(("cum_seq_lens_q", "mask", "sinks"), "Tensor?"),
        "out": "Tensor(!)", "lse": "Tensor(!)?", "bmm1_scale": traced.REAL, "bmm2_scale": traced.REAL,
        "window_left": "int", "kv_layout": "str", "pdl": "bool?", "q_len": "int", "mask_kind": "str",
    },
)  # fmt: skip
