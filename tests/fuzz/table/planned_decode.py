# SPDX-License-Identifier: Apache-2.0
"""Planned decode."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import whole
from tests.fuzz.table.planned import Model, Plan, Shape


def _decode_plan(d: Draw, model: Model, shape: Shape, name: str) -> Call:
    page_size = d.choice((1, 4, 5))
    table = planned.draw_page_table(d, planned.draw_lengths(d, model), page_size, is_exact=model.batch_size is not None)
    options = unplanned.draw_options(d)
    kinds = {"q_data_type": planned.draw_dtype(d, shape.dtype), "kv_data_type": planned.draw_dtype(d, shape.kv_dtype)}
    if shape.dtype == shape.kv_dtype and d.chance(0.2):
        kinds = {"data_type": shape.dtype}
    arguments = {
        "indptr": table[0], "indices": table[1], "last_page_len": table[2], "num_qo_heads": shape.heads[0],
        "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim, "page_size": page_size, **options, **kinds,
    }  # fmt: skip
    wrapper = model.wrapper
    function = wrapper.plan if name != "fast_decode_plan" else functools.partial(flashinfer.fast_decode_plan, wrapper)
    if name != "fast_decode_plan" and d.chance(0.2):
        function = wrapper.begin_forward

    def describe(
        indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim: Any,
        page_size: Any, q_data_type: Any = None, kv_data_type: Any = None, data_type: Any = None, **options: Any,
    ) -> Plan:  # fmt: skip
        pages, lens, page_size = planned.read_page_table(indptr, indices, last_page_len, page_size)
        heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        q_dtype = planned.read_dtype(q_data_type or data_type or "float16")
        kv_dtype = planned.read_dtype(kv_data_type or data_type or q_dtype)
        unplanned.require_dtypes(q_dtype, kv_dtype)
        if whole("head_dim", head_dim) not in unplanned.HEAD_DIMS:
            raise Refused("a head dimension without a kernel")
        dims = (int(head_dim), int(head_dim))
        rows = list(range(len(pages) + 1))
        return Plan(
            pages, lens, rows, *heads, dims, page_size, q_dtype, kv_dtype, q_dtype, unplanned.read_options(**options)
        )

    return planned.planned(model, f"{name}.plan", function, arguments, describe)


def _decode_run(d: Draw, model: Model, shape: Shape, of_sinks: bool) -> Call:
    rows = len(model.plan.pages) if model.plan else 2
    as_forward = not of_sinks and d.chance(0.25)
    arguments: dict[str, Any] = {
        "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
        "paged_kv_cache": planned.draw_cache(d, model, shape), **planned.draw_scales(d),
    }  # fmt: skip
    arguments.update(
        unplanned.draw_options(d)
        if as_forward
        else {
            **planned.draw_outputs(d, rows, shape),
            "window_left": d.choice((None, None, 3)),
            "sinks": unplanned.draw_sinks(d, shape.heads[0], always=of_sinks),
        }
    )
    if of_sinks:
        arguments["sm_scale"] = d.choice((None, 0.3))
    wrapper, layout = model.wrapper, model.layout
    method = d.choice(("forward", "forward_return_lse")) if as_forward else "run"

    def expect(
        q: Any, paged_kv_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any, out: Any = None, lse: Any = None,
        return_lse: Any = method == "forward_return_lse", window_left: Any = None, sinks: Any = None,
        **options: Any,
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
        if q.dtype != plan.q_dtype or len(q) != len(plan.pages):
            raise Refused("queries of another number or dtype than planned")
        halves = planned.paged_halves(plan, paged_kv_cache, layout)
        if halves[0].dtype != plan.kv_dtype:
            raise Refused("a cache of another dtype than planned")
        scales = {**unplanned.read_scales(q_scale, k_scale, v_scale), **unplanned.read_sinks(sinks, plan.num_qo_heads)}
        return planned.results(
            plan, q, planned.attend(plan, q, halves, {**given, **scales}, False), out, lse, return_lse
        )

    return Call(
        f"wrapper.{method}", getattr(wrapper, method), arguments, expect, ("out", "lse") if not as_forward else ()
    )


_OF_SINKS = "BatchDecodeWithAttentionSinkWrapper"


def _decode_wrapper(name: str, d: Draw) -> Iterator[Any]:
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    workspace = torch.zeros(d.choice((0, 16)), dtype=torch.uint8)
    is_graph = name.startswith("CUDAGraph") or d.chance(0.25)
    if name.startswith("CUDAGraph"):
        buffers = planned.draw_buffers(d, model, ("indptr_buffer", "indices_buffer", "last_page_len_buffer"))
        arguments = {"workspace_buffer": workspace, **buffers, "kv_layout": model.layout, "use_tensor_cores": False}
    else:
        arguments = {"float_workspace_buffer": workspace, "kv_layout": model.layout, "use_cuda_graph": is_graph}
        if is_graph:
            names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
            arguments.update(planned.draw_buffers(d, model, names))

    def expect(kv_layout: Any, **given: Any) -> Mapping[str, Check]:
        planned.require_workspace(given.get("workspace_buffer", given.get("float_workspace_buffer")))
        planned.require_buffers(model, is_graph and given.get("use_cuda_graph", True), given, kv_layout)
        return {}

    make_name = "BatchDecodeWithPagedKVCacheWrapper" if name == "fast_decode_plan" else name
    yield from planned.life(
        d, model, lambda: planned.made(model, make_name, getattr(flashinfer, make_name), arguments, expect),
        lambda: _decode_plan(d, model, shape, name), lambda: _decode_run(d, model, shape, name == _OF_SINKS),
    )  # fmt: skip


CASES: dict[str, Case] = {
    name: functools.partial(_decode_wrapper, name)
    for name in (
        "BatchDecodeWithPagedKVCacheWrapper",
        _OF_SINKS,
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        "fast_decode_plan",
    )
}
