# SPDX-License-Identifier: Apache-2.0
"""Planned prefill."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan, Shape


def _prefill_plan(d: Draw, model: Model, shape: Shape, is_paged: bool) -> Call:
    kv_lens = planned.draw_lengths(d, model)
    qo_lens = [d.random.randint(0, 4) for _ in kv_lens]
    qo_indptr = d.index([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)], d.choice((I32, I32, torch.int64)))
    kind = "none" if model.batch_size is not None else d.kernel("causal", "none", "bool", "packed")
    common: dict[str, Any] = {
        "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1], "head_dim_qk": shape.head_dim,
        **unplanned.draw_mask(d, kind, list(zip(qo_lens, kv_lens))), "causal": kind == "causal",
        **unplanned.draw_options(d), "q_data_type": planned.draw_dtype(d, shape.dtype),
        "kv_data_type": planned.draw_dtype(d, shape.kv_dtype),
    }  # fmt: skip
    arguments: dict[str, Any] = {"qo_indptr": qo_indptr}
    if is_paged:
        page_size = d.choice((1, 4, 5))
        table = planned.draw_page_table(d, kv_lens, page_size, is_exact=model.batch_size is not None)
        arguments.update(
            paged_kv_indptr=table[0], paged_kv_indices=table[1], paged_kv_last_page_len=table[2], page_size=page_size
        )
    else:
        arguments["kv_indptr"] = d.index([sum(kv_lens[:i]) for i in range(len(kv_lens) + 1)], I32)
    arguments.update(common)

    def describe(qo_indptr: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim_qk: Any, **given: Any) -> Plan:
        if is_paged:
            pages, kv_lens, page_size = planned.read_page_table(
                given["paged_kv_indptr"], given["paged_kv_indices"], given["paged_kv_last_page_len"], given["page_size"]
            )
        else:
            starts = offsets("kv_indptr", given["kv_indptr"])
            if starts[-1] > 1 << 16:
                pages, kv_lens, page_size = (
                    [[1 << 16]] * (len(starts) - 1),
                    [1] * (len(starts) - 1),
                    0,
                )  # past any rows here
            else:
                pages = [list(range(begin, end)) for begin, end in itertools.pairwise(starts)]
                kv_lens, page_size = [len(rows) for rows in pages], 0
        rows = offsets("qo_indptr", qo_indptr, len(pages) + 1)
        heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        q_dtype, kv_dtype = planned.read_dtype(given["q_data_type"]), given["kv_data_type"]
        dim = whole("head_dim_qk", head_dim_qk)
        unplanned.require_prefill(q_dtype, q_dtype if kv_dtype is None else planned.read_dtype(kv_dtype), dim, dim)
        lengths = [(end - begin, kv_len) for begin, end, kv_len in zip(rows, rows[1:], kv_lens)]
        masks = (
            unplanned.read_mask(given["custom_mask"], given["packed_custom_mask"], lengths)
            if rows[-1] < LARGEST >> 8
            else None
        )
        options = unplanned.read_options(**given)
        return Plan(
            pages, kv_lens, rows, *heads, (dim, dim), page_size, None, None, None, options, bool(given["causal"]), masks
        )

    function = model.wrapper.begin_forward if d.chance(0.2) else model.wrapper.plan
    return planned.planned(model, "wrapper.plan", function, arguments, describe)


def _prefill_run(d: Draw, model: Model, shape: Shape, is_paged: bool, of_sinks: bool) -> Call:
    plan = model.plan
    rows = (plan.qo_indptr[-1] if plan and plan.qo_indptr[-1] < 1000 else 3) + d.choice((0, 0, 2))
    as_forward = not of_sinks and d.chance(0.25)
    arguments: dict[str, Any] = {"q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0)}
    if is_paged:
        arguments["paged_kv_cache"] = planned.draw_cache(d, model, shape)
    else:
        length = max(
            (row + 1 for of_request in (plan.pages if plan else []) for row in of_request if row < 1000), default=0
        )
        dims = (shape.head_dim, shape.head_dim)
        length += d.choice((0, 2))
        arguments["k"], arguments["v"] = unplanned.draw_kv_rows(
            d, length, shape.heads[1], dims, shape.kv_dtype, model.layout
        )
    if as_forward:
        arguments.update(causal=d.chance(0.5), **unplanned.draw_options(d))
    else:
        arguments.update(**planned.draw_scales(d), **planned.draw_outputs(d, rows, shape))
        arguments["sinks"] = unplanned.draw_sinks(d, shape.heads[0], always=of_sinks)
        if of_sinks:
            arguments["sm_scale"] = d.choice((None, 0.3))
        if is_paged:
            arguments["window_left"] = d.choice((None, None, 3))
    wrapper, layout = model.wrapper, model.layout
    method = d.choice(("forward", "forward_return_lse")) if as_forward else "run"

    def expect(
        q: Any, paged_kv_cache: Any = None, k: Any = None, v: Any = None, q_scale: Any = None, k_scale: Any = None,
        v_scale: Any = None, out: Any = None, lse: Any = None, return_lse: Any = method == "forward_return_lse",
        window_left: Any = None, causal: Any = None, sinks: Any = None, **options: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        plan = model.planned()
        given = dict(plan.options)
        if as_forward:
            given = unplanned.read_options(window_left=window_left, **options)
        elif window_left is not None:
            given["window_left"] = unplanned.read_options(window_left=window_left)["window_left"]
        if of_sinks and options["sm_scale"] is not None:
            given["sm_scale"] = unplanned.read_options(sm_scale=options["sm_scale"])["sm_scale"]
        if of_sinks and sinks is None:
            raise Refused("no sinks")
        halves = planned.paged_halves(plan, paged_kv_cache, layout) if is_paged else unplanned.rows_of(k, v, layout)
        unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
        scales = {**unplanned.read_scales(q_scale, k_scale, v_scale), **unplanned.read_sinks(sinks, plan.num_qo_heads)}
        if as_forward and causal is None:
            raise Unspecified  # what was planned, or not
        state = planned.attend(plan, q, halves, {**given, **scales}, causal if as_forward else plan.causal)
        return planned.results(plan, q, state, out, lse, return_lse)

    return Call(
        f"wrapper.{method}", getattr(wrapper, method), arguments, expect, ("out", "lse") if not as_forward else ()
    )


def _prefill_wrapper(name: str, is_paged: bool, d: Draw) -> Iterator[Any]:
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    is_graph = d.chance(0.25)
    arguments: dict[str, Any] = {
        "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8), "kv_layout": model.layout,
        "use_cuda_graph": is_graph,
    }  # fmt: skip
    if is_graph:
        paged = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        arguments.update(planned.draw_buffers(d, model, paged if is_paged else ("qo_indptr_buf", "kv_indptr_buf")))
        if not is_paged:
            model.capacity = LARGEST  # of rows, which no buffer lists

    def expect(float_workspace_buffer: Any, kv_layout: Any, use_cuda_graph: Any, **given: Any) -> Mapping[str, Check]:
        planned.require_workspace(float_workspace_buffer)
        planned.require_buffers(model, use_cuda_graph, given, kv_layout)
        return {}

    yield from planned.life(
        d, model, lambda: planned.made(model, name, getattr(flashinfer, name), arguments, expect),
        lambda: _prefill_plan(d, model, shape, is_paged),
        lambda: _prefill_run(d, model, shape, is_paged, "Sink" in name),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "BatchAttentionWithAttentionSinkWrapper": functools.partial(
        _prefill_wrapper, "BatchAttentionWithAttentionSinkWrapper", True
    ),
    "BatchPrefillWithPagedKVCacheWrapper": functools.partial(
        _prefill_wrapper, "BatchPrefillWithPagedKVCacheWrapper", True
    ),
    "BatchPrefillWithRaggedKVCacheWrapper": functools.partial(
        _prefill_wrapper, "BatchPrefillWithRaggedKVCacheWrapper", False
    ),
}
