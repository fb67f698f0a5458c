# SPDX-License-Identifier: Apache-2.0
"""Planned attention over a KV that requests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, nothing, tensors_in
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan
from tests.oracles.attention import attention

_NAME = "MultiLevelCascadeAttentionWrapper"
_TABLES = ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")
_BUFFERS = (
    "qo_indptr_buf_arr",
    "paged_kv_indptr_buf_arr",
    "paged_kv_indices_buf_arr",
    "paged_kv_last_page_len_buf_arr",
)
_CAPACITY = 30  # pages of a buffer


class _Cascade:
    """The calls on one cascade: every level is a paged prefill, the last one causal where the plan says so."""

    def __init__(self, d: Draw) -> None:
        self.d, self.shape, self.model = d, planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
        # Groups of queries that share a KV, per level. Buffers for CUDA graphs have room for that many.
        self.num_groups = [1] * d.random.randint(0, 2) + [d.random.randint(1, 2)]
        self.is_graph = d.chance(0.25)
        self.plans: list[Plan] = []  # of the levels

    def make(self) -> Call:
        d, model = self.d, self.model
        arguments: dict[str, Any] = {
            "num_levels": len(self.num_groups), "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8),
            "kv_layout": model.layout,
        }  # fmt: skip
        if self.is_graph:
            sizes = [(count + 1, count + 1, _CAPACITY, count) for count in self.num_groups]
            buffers = [[d.blank(size, dtype=I32) for size in of_kind] for of_kind in zip(*sizes)]
            arguments.update(use_cuda_graph=True, **dict(zip(_BUFFERS, buffers)))
            model.buffers = tuple(tensors_in(buffers))

        def expect(
            num_levels: Any, float_workspace_buffer: Any, kv_layout: Any, use_cuda_graph: Any = False, **buffers: Any
        ) -> Mapping[str, Check]:
            count = whole("num_levels", num_levels)
            if count < 1 or kv_layout not in ("NHD", "HND"):
                raise Refused("no level, or an unknown layout")
            planned.require_workspace(float_workspace_buffer)
            for arrays in buffers.values() if use_cuda_graph else ():
                if not isinstance(arrays, (list, tuple)) or len(arrays) != count:
                    raise Refused("not a buffer a level")
                for buffer in arrays:
                    if not isinstance(buffer, torch.Tensor) or buffer.dtype != I32 or not buffer.is_contiguous():
                        raise Refused("a buffer that is no contiguous int32 vector")
            return {}

        return planned.made(model, _NAME, flashinfer.MultiLevelCascadeAttentionWrapper, arguments, expect)

    def plan(self) -> Call:
        d, model, shape = self.d, self.model, self.shape
        page_size, num_tokens = d.choice((1, 4)), d.random.randint(1, 5)
        levels = []
        for count in self.num_groups:
            cuts = [0, *sorted(d.random.randint(0, num_tokens) for _ in range(count - 1)), num_tokens]
            table = planned.draw_page_table(d, d.lengths(count, 10), page_size, is_exact=self.is_graph)
            levels.append((d.index(cuts, I32), *table))
        arguments = {
            **dict(zip(_TABLES, map(list, zip(*levels)))), "num_qo_heads": shape.heads[0],
            "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim, "page_size": page_size,
            "causal": d.chance(0.5), **unplanned.draw_options(d), "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }  # fmt: skip
        described: list[Plan] = []

        def expect(**given: Any) -> Mapping[str, Check]:
            described.clear()
            if model.origin:
                raise Unspecified  # nobody knows how many levels it was made for
            plans = self._describe(**given)
            if len({(plan.qo_indptr[0], plan.qo_indptr[-1]) for plan in plans}) > 1:
                raise Unspecified  # levels of different tokens
            described.extend(plans)
            return {"return": nothing}

        def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
            plan = _joined(described) if described else None
            model.settle_plan(plan, list(call.arguments.values()), call.changes, raised)
            if raised is None:
                self.plans = list(described)

        return Call(f"{_NAME}.plan", model.wrapper.plan, arguments, expect, fills=model.buffers, settle=settle)

    def _describe(
        self, num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, causal: Any, q_data_type: Any,
        kv_data_type: Any, **given: Any,
    ) -> list[Plan]:  # fmt: skip
        """What a plan of every level means."""
        arrays = [given[name] for name in _TABLES]
        if any(not isinstance(array, (list, tuple)) or len(array) != len(self.num_groups) for array in arrays):
            raise Refused("another number of levels")
        heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        dim, q_dtype = whole("head_dim", head_dim), planned.read_dtype(q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type)
        unplanned.require_prefill(q_dtype, kv_dtype, dim, dim)
        options, plans = unplanned.read_options(**given), []
        for rows, *table in zip(*arrays):
            pages, lens, size = planned.read_page_table(*table, page_size)
            if self.is_graph and (len(pages) != self.num_groups[len(plans)] or sum(map(len, pages)) > _CAPACITY):
                raise Refused("another number of requests than the buffers were made for, or more pages")
            qo_indptr = offsets("qo_indptr", rows, len(pages) + 1)
            is_causal = bool(causal) and len(plans) == len(self.num_groups) - 1
            plans.append(Plan(pages, lens, qo_indptr, *heads, (dim, dim), size, None, None, None, options, is_causal))
        return plans

    def run(self) -> Call:
        d, model, shape = self.d, self.model, self.shape
        rows = model.plan.qo_indptr[-1] if model.plan and model.plan.qo_indptr[-1] < 1000 else 3
        arguments = {
            "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
            "paged_kv_cache": planned.draw_cache(d, model, shape),
        }  # fmt: skip

        def expect(q: Any, paged_kv_cache: Any) -> Mapping[str, Check]:
            model.planned()
            states = []
            for plan in self.plans:
                halves = planned.paged_halves(plan, paged_kv_cache, model.layout)
                unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
                states.append(planned.attend(plan, q, halves, plan.options, plan.causal))
            # Each level rounds its output once more on the way into the merged one.
            scale = float(len(self.plans))
            return planned.results(self.plans[-1], q, unplanned.merged(states), None, None, False, scale)

        return Call(f"{_NAME}.run", model.wrapper.run, arguments, expect)


def _cascade_wrapper(d: Draw) -> Iterator[Any]:
    cascade = _Cascade(d)
    yield from planned.life(d, cascade.model, cascade.make, cascade.plan, cascade.run)


def _joined(plans: list[Plan]) -> Plan:
    """For drawing a cache: the pages of all levels."""
    pages = [page for plan in plans for page in plan.pages]
    return replace(plans[-1], pages=pages, kv_lens=[length for plan in plans for length in plan.kv_lens])


def _shared_prefix(name: str, is_decode: bool, d: Draw) -> Iterator[Any]:
    """A shared prefix as one prefill, the rest paged."""
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    shape = replace(shape, kv_dtype=shape.dtype)
    arguments = {"float_workspace_buffer": torch.zeros(8, dtype=torch.uint8), "kv_layout": model.layout}

    def expect(float_workspace_buffer: Any, kv_layout: Any) -> Mapping[str, Check]:
        planned.require_workspace(float_workspace_buffer)
        if kv_layout not in ("NHD", "HND"):
            raise Refused("an unknown layout")
        return {}

    def plan() -> Call:
        page_size, lens = d.choice((1, 4)), d.lengths(d.random.randint(1, 3), 10)
        table = planned.draw_page_table(d, lens, page_size)
        sizes = {
            "num_qo_heads": shape.heads[0],
            "num_kv_heads": shape.heads[1],
            "head_dim": shape.head_dim,
            "page_size": page_size,
        }
        if is_decode:
            names = ("unique_kv_indptr", "unique_kv_indices", "unique_kv_last_page_len")
            given: dict[str, Any] = {**dict(zip(names, table)), **sizes, "data_type": shape.dtype}
        else:
            names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
            qo_lens = [d.random.randint(0, 4) for _ in lens]
            rows = d.index([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)], I32)
            given = {"qo_indptr": rows, **dict(zip(names, table)), **sizes, "q_data_type": shape.dtype}

        def describe(num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, **given: Any) -> Plan:
            pages, lens, size = planned.read_page_table(*(given[name] for name in names), page_size)
            rows = (
                list(range(len(pages) + 1)) if is_decode else offsets("qo_indptr", given["qo_indptr"], len(pages) + 1)
            )
            heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
            unplanned.require_heads(*heads)
            dim, dtype = (
                whole("head_dim", head_dim),
                planned.read_dtype(given["data_type"] or "float16" if is_decode else given["q_data_type"]),
            )
            unplanned.require_prefill(dtype, dtype, dim, dim)
            return Plan(pages, lens, rows, *heads, (dim, dim), size, dtype, dtype, None, unplanned.read_options())

        return planned.planned(model, f"{name}.begin_forward", model.wrapper.begin_forward, given, describe)

    def run() -> Call:
        rows = model.plan.qo_indptr[-1] if model.plan and model.plan.qo_indptr[-1] < 1000 else 3
        shared = unplanned.draw_kv_rows(
            d, d.size(9), shape.heads[1], (shape.head_dim, shape.head_dim), shape.dtype, model.layout
        )
        given: dict[str, Any] = {
            "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0), "k_shared": shared[0],
            "v_shared": shared[1], "unique_kv_cache": planned.draw_cache(d, model, shape),
        }  # fmt: skip
        if not is_decode:
            given.update(causal=d.chance(0.5), sm_scale=d.choice((None, 0.2)))
        wrapper, layout = model.wrapper, model.layout

        def expect(
            q: Any, k_shared: Any, v_shared: Any, unique_kv_cache: Any, causal: Any = False, sm_scale: Any = None
        ) -> Mapping[str, Check]:
            plan = model.planned()
            options = unplanned.read_options(sm_scale=sm_scale)
            if causal is None:
                raise Unspecified  # what was planned, or not
            halves = planned.paged_halves(plan, unique_kv_cache, layout)
            k, v = unplanned.rows_of(k_shared, v_shared, layout)
            if (k.shape[2], v.shape[2]) != plan.head_dims or k.shape[1] != plan.num_kv_heads:
                raise Refused("a prefix of other heads")
            if is_decode and (q.dtype != plan.q_dtype or len(q) != len(plan.pages)):
                raise Refused("queries of another number or dtype than planned")
            unplanned.require_prefill(q.dtype, k.dtype, *plan.head_dims)
            unique = planned.attend(plan, q, halves, options, causal)
            rows = q[plan.qo_indptr[0] : plan.qo_indptr[-1]]
            unplanned.require_finite(k, v)
            prefix = attention(rows, k, v, **options)
            return planned.results(plan, q, unplanned.merged([prefix, unique]), None, None, False, scale=2.0)

        return Call(f"{name}.forward", wrapper.forward, given, expect)

    yield from planned.life(
        d, model, lambda: planned.made(model, name, getattr(flashinfer, name), arguments, expect), plan, run
    )


CASES: dict[str, Case] = {
    _NAME: _cascade_wrapper,
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", True
    ),
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchPrefillWithSharedPrefixPagedKVCacheWrapper", False
    ),
}
