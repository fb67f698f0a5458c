"""Planned attention over a KV that requests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, nothing
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan
from tests.oracles.attention import attention


def _cascade_wrapper(d: Draw) -> Iterator[Any]:
    name, num_levels = "MultiLevelCascadeAttentionWrapper", d.random.randint(1, 3)
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    arguments = {
        "num_levels": num_levels,
        "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8),
        "kv_layout": model.layout,
    }

    def expect(num_levels: Any, float_workspace_buffer: Any, kv_layout: Any) -> Mapping[str, Check]:
        if whole("num_levels", num_levels) < 1 or kv_layout not in ("NHD", "HND"):
            raise Refused("no level, or an unknown layout")
        planned.require_workspace(float_workspace_buffer)
        return {}

    levels: list[list[Plan]] = [[]]

    def plan() -> Call:
        page_size, num_tokens = d.choice((1, 4)), d.random.randint(1, 5)
        arrays: dict[str, list[torch.Tensor]] = {
            "qo_indptr_arr": [],
            "paged_kv_indptr_arr": [],
            "paged_kv_indices_arr": [],
            "paged_kv_last_page_len": [],
        }
        for level in range(num_levels):
            cuts = (
                [0, num_tokens] if level < num_levels - 1 else sorted({0, num_tokens, d.random.randint(0, num_tokens)})
            )
            table = planned.draw_page_table(d, d.lengths(len(cuts) - 1, 10), page_size)
            for array, tensor in zip(arrays.values(), (d.index(cuts, I32), *table)):
                array.append(tensor)
        options = unplanned.draw_options(d)
        given = {
            **arrays, "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim,
            "page_size": page_size, "causal": d.chance(0.5), **options, "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }  # fmt: skip
        described: list[list[Plan]] = [[]]

        def expect(
            num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, causal: Any, q_data_type: Any,
            kv_data_type: Any, **given: Any,
        ) -> Mapping[str, Check]:  # fmt: skip
            described[0] = []
            arrays = [
                given[name]
                for name in ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")
            ]
            if any(not isinstance(array, (list, tuple)) or len(array) != num_levels for array in arrays):
                raise Refused("another number of levels")
            heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
            unplanned.require_heads(*heads)
            dim, q_dtype = whole("head_dim", head_dim), planned.read_dtype(q_data_type)
            unplanned.require_prefill(
                q_dtype, q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type), dim, dim
            )
            plans = []
            for i, (rows, *table) in enumerate(zip(*arrays)):
                pages, lens, size = planned.read_page_table(*table, page_size)
                qo_indptr = offsets("qo_indptr", rows, len(pages) + 1)
                is_causal = bool(causal) and i == num_levels - 1
                plans.append(
                    Plan(
                        pages,
                        lens,
                        qo_indptr,
                        *heads,
                        (dim, dim),
                        size,
                        None,
                        None,
                        None,
                        unplanned.read_options(**given),
                        is_causal,
                    )
                )
            if len({(plan.qo_indptr[0], plan.qo_indptr[-1]) for plan in plans}) > 1:
                raise Unspecified  # levels of different tokens
            described[0] = plans
            return {"return": nothing}

        def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
            plans = described[0]
            model.settle_plan(_joined(plans) if plans else None, list(call.arguments.values()), call.changes, raised)
            if raised is None:
                levels[0] = plans

        return Call(f"{name}.plan", model.wrapper.plan, given, expect, settle=settle)

    def run() -> Call:
        rows = model.plan.qo_indptr[-1] if model.plan and model.plan.qo_indptr[-1] < 1000 else 3
        arguments = {
            "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
            "paged_kv_cache": planned.draw_cache(d, model, shape),
        }  # fmt: skip
        wrapper, layout = model.wrapper, model.layout

        def expect(q: Any, paged_kv_cache: Any) -> Mapping[str, Check]:
            model.planned()
            states = []
            for plan in levels[0]:
                halves = planned.paged_halves(plan, paged_kv_cache, layout)
                unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
                states.append(planned.attend(plan, q, halves, plan.options, plan.causal))
            out, lse = unplanned.merged(states)
            # Each level rounds its output once more on the way into the merged one.
            return planned.results(levels[0][-1], q, (out, lse), None, None, False, scale=float(num_levels))

        return Call("wrapper.run", wrapper.run, arguments, expect)

    yield from planned.life(
        d, model, lambda: planned.made(model, name, getattr(flashinfer, name), arguments, expect), plan, run
    )


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
                planned.read_dtype(given["data_type" if is_decode else "q_data_type"]),
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
            halves = planned.paged_halves(plan, unique_kv_cache, layout)
            k, v = unplanned.rows_of(k_shared, v_shared, layout)
            if (
                q.dtype != halves[0].dtype
                or q.dtype != k.dtype
                or (k.shape[2], v.shape[2]) != plan.head_dims
                or k.shape[1] != plan.num_kv_heads
            ):
                raise Refused("a prefix of another dtype or of other heads")
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
    "MultiLevelCascadeAttentionWrapper": _cascade_wrapper,
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", True
    ),
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchPrefillWithSharedPrefixPagedKVCacheWrapper", False
    ),
}
