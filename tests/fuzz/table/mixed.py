# SPDX-License-Identifier: Apache-2.0
"""Prefill beside decode: a wrapper that is made, planned and run once, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, pair
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan
from tests.oracles.attention import attention


def _starts(d: Draw, counts: list[int]) -> torch.Tensor:
    return d.index([sum(counts[:i]) for i in range(len(counts) + 1)], d.choice((I32, torch.int64)))


def _workspace() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.uint8, device="cpu")


def _run_attention(kv_layout: Any, q: Any, kv_cache: Any, k_scale: Any, v_scale: Any, **plan: Any) -> Any:
    wrapper = flashinfer.BatchAttention(kv_layout, "cpu")
    wrapper.plan(**plan)
    return wrapper.run(q, kv_cache, k_scale=k_scale, v_scale=v_scale)


def _attention(d: Draw) -> Iterator[Call]:
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    kv_lens, page_size = planned.draw_lengths(d, model), d.choice((1, 4, 5))
    qo_lens = [d.random.randint(0, 3) for _ in kv_lens]
    indptr, indices, _ = planned.draw_page_table(d, kv_lens, page_size)
    arguments: dict[str, Any] = {
        "kv_layout": model.layout, "qo_indptr": _starts(d, qo_lens), "kv_indptr": indptr, "kv_indices": indices,
        "kv_len_arr": d.index(kv_lens, d.choice((I32, torch.int64))), "num_qo_heads": shape.heads[0],
        "num_kv_heads": shape.heads[1], "head_dim_qk": shape.head_dim, "head_dim_vo": shape.head_dim,
        "page_size": page_size, "causal": d.kernel(True, False), "sm_scale": d.choice((None, 0.2)),
        "logits_soft_cap": d.kernel(None, 3.0), "q_data_type": shape.dtype, "kv_data_type": shape.kv_dtype,
        "k_scale": d.choice((None, 2.0)), "v_scale": d.choice((None, 0.25)),
    }  # fmt: skip
    model.plan = _read_batch(**arguments)
    arguments["q"] = d.normal(sum(qo_lens) + d.choice((0, 2)), shape.heads[0], shape.head_dim, dtype=shape.dtype,
                              groups=0)  # fmt: skip
    arguments["kv_cache"] = planned.draw_cache(d, model, shape)

    def expect(q: Any, kv_cache: Any, kv_layout: Any, k_scale: Any, v_scale: Any, **given: Any) -> Mapping[str, Check]:
        plan = _read_batch(**given)
        if kv_layout not in ("NHD", "HND"):
            raise Refused("an unknown layout")
        halves = planned.paged_halves(plan, kv_cache, kv_layout)
        unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
        scales = unplanned.read_scales(None, k_scale, v_scale)
        state = planned.attend(plan, q, halves, {**plan.options, **scales}, plan.causal)
        return planned.results(plan, q, state, None, None, True)

    yield from d.maybe_hostile(Call("BatchAttention", _run_attention, arguments, expect))


def _read_batch(
    qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, num_qo_heads: Any, num_kv_heads: Any,
    head_dim_qk: Any, head_dim_vo: Any, page_size: Any, causal: Any, sm_scale: Any, logits_soft_cap: Any,
    q_data_type: Any, kv_data_type: Any, **_: Any,
) -> Plan:  # fmt: skip
    page_size, numbers = planned.read_count("page_size", page_size), integers("kv_indices", kv_indices)
    starts = offsets("kv_indptr", kv_indptr, None, len(numbers))
    lens, rows = integers("kv_len_arr", kv_len_arr, len(starts) - 1), offsets("qo_indptr", qo_indptr, len(starts))
    pages = [numbers[begin:end] for begin, end in itertools.pairwise(starts)]
    if any(not 0 <= length <= len(listed) * page_size for listed, length in zip(pages, lens)):
        raise Refused("more tokens than the pages hold")
    if any(len(listed) * page_size >= LARGEST for listed in pages):
        raise Refused("more rows than int32 counts")
    if causal not in (True, False):
        raise Refused("causal is neither True nor False")
    heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
    unplanned.require_heads(*heads)
    dims = whole("head_dim_qk", head_dim_qk), whole("head_dim_vo", head_dim_vo)
    q_dtype = planned.read_dtype(q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type)
    unplanned.require_prefill(q_dtype, kv_dtype, *dims)
    options = unplanned.read_options(sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)
    listed = [of_request[: -(-length // page_size)] for of_request, length in zip(pages, lens)]
    return Plan(listed, lens, rows, *heads, dims, page_size, None, None, None, options, bool(causal))


def _run_pod(q_p: Any, k_p: Any, v_p: Any, q_d: Any, paged_kv_cache_d: Any, causal_p: Any, **plan: Any) -> Any:
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(_workspace(), plan.pop("kv_layout"))
    wrapper.plan(**plan)
    return wrapper.run(q_p, k_p, v_p, q_d, paged_kv_cache_d, causal_p=causal_p)


def _pod(d: Draw) -> Iterator[Call]:
    shape, model = planned.draw_shape(d), Model(d.choice(("NHD", "HND")))
    arguments = _draw_decode(d, shape, model)
    qo_len, kv_len = d.random.randint(0, 4), d.random.randint(0, 9)
    k, v = unplanned.draw_kv_rows(d, kv_len, shape.heads[1], (shape.head_dim,) * 2, shape.kv_dtype, "NHD")
    arguments.update(
        q_p=d.normal(qo_len, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0), k_p=k, v_p=v,
        causal_p=d.kernel(True, False), kv_layout=model.layout,
    )  # fmt: skip

    def expect(
        q_p: Any, k_p: Any, v_p: Any, q_d: Any, paged_kv_cache_d: Any, causal_p: Any, kv_layout: Any, **given: Any
    ) -> Mapping[str, Check]:
        decoded = _expect_decode(q_d, paged_kv_cache_d, kv_layout, **given)
        if q_p.dim() != 3 or k_p.dim() != 3 or k_p.shape[:2] != v_p.shape[:2] or k_p.dtype != v_p.dtype:
            raise Refused("no sequence")
        if q_p.shape[2] != k_p.shape[2]:
            raise Refused("queries and keys of other dimensions")
        unplanned.require_heads(q_p.shape[1], k_p.shape[1])
        unplanned.require_prefill(q_p.dtype, k_p.dtype, k_p.shape[2], v_p.shape[2])
        unplanned.require_finite(q_p, k_p, v_p)
        out, lse = attention(q_p, k_p, v_p, causal=bool(causal_p))
        return {"return": pair(unplanned.state(out, lse, q_p.dtype, False), decoded)}

    yield from d.maybe_hostile(Call("PODWithPagedKVCacheWrapper", _run_pod, arguments, expect))


def _draw_decode(d: Draw, shape: planned.Shape, model: Model) -> dict[str, Any]:
    kv_lens, page_size = planned.draw_lengths(d, model), d.choice((1, 4))
    indptr, indices, last = planned.draw_page_table(d, kv_lens, page_size)
    arguments = {
        "indptr": indptr, "indices": indices, "last_page_len": last, "num_qo_heads": shape.heads[0],
        "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim, "page_size": page_size,
        "q_data_type": shape.dtype, "kv_data_type": shape.kv_dtype, "window_left": d.kernel(-1, 3),
    }  # fmt: skip
    model.plan = _read_decode(**arguments)
    q_d = d.normal(len(kv_lens), shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0)
    return {**arguments, "q_d": q_d, "paged_kv_cache_d": planned.draw_cache(d, model, shape)}


def _read_decode(
    indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any,
    q_data_type: Any, kv_data_type: Any, window_left: Any,
) -> Plan:  # fmt: skip
    pages, lens, page_size = planned.read_page_table(indptr, indices, last_page_len, page_size)
    heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
    unplanned.require_heads(*heads)
    dim, q_dtype = whole("head_dim", head_dim), planned.read_dtype(q_data_type or "float16")
    kv_dtype = q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type)
    unplanned.require_dtypes(q_dtype, kv_dtype)
    if dim not in unplanned.HEAD_DIMS:
        raise Refused("a head dimension without a kernel")
    rows, options = list(range(len(pages) + 1)), unplanned.read_options(window_left=window_left)
    return Plan(pages, lens, rows, *heads, (dim, dim), page_size, q_dtype, kv_dtype, None, options)


def _expect_decode(q: Any, cache: Any, kv_layout: Any, **given: Any) -> Check:
    plan = _read_decode(**given)
    if kv_layout not in ("NHD", "HND"):
        raise Refused("an unknown layout")
    halves = planned.paged_halves(plan, cache, kv_layout)
    if q.dtype != plan.q_dtype or halves[0].dtype != plan.kv_dtype or len(q) != len(plan.pages):
        raise Refused("queries of another number or dtype than planned")
    state = planned.attend(plan, q, halves, plan.options, False)
    return planned.results(plan, q, state, None, None, False)["return"]


def _run_batch_pod(
    q_p: Any, paged_kv_cache_p: Any, q_d: Any, paged_kv_cache_d: Any, causal_p: Any, return_lse: Any, kv_layout: Any,
    **plan: Any,
) -> Any:  # fmt: skip
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(_workspace(), kv_layout)
    wrapper.plan(**plan)
    found = wrapper.run(q_p, paged_kv_cache_p, q_d, paged_kv_cache_d, causal_p=causal_p, return_lse=return_lse)
    return tuple(zip(*found)) if return_lse else found  # states of either kind


def _batch_pod(d: Draw) -> Iterator[Call]:
    shape, layout, page_size = planned.draw_shape(d), d.choice(("NHD", "HND")), d.choice((1, 4))
    arguments: dict[str, Any] = {
        "kv_layout": layout, "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1],
        "head_dim": shape.head_dim, "page_size": page_size, "q_data_type": shape.dtype,
        "kv_data_type": shape.kv_dtype, "window_left": d.kernel(-1, 3),
        "causal_p": d.kernel(True, False), "return_lse": d.chance(0.5),
    }  # fmt: skip
    ones = d.chance(0.5)
    for of, most in (("p", 4), ("d", 2)):
        model = Model(layout)
        kv_lens = planned.draw_lengths(d, model)
        qo_lens = [1 if of == "d" and ones else d.random.randint(0, most) for _ in kv_lens]
        table = planned.draw_page_table(d, kv_lens, page_size)
        for name, value in zip(("kv_indptr", "kv_indices", "last_page_len"), table):
            arguments[f"{name}_{of}"] = value
        arguments[f"qo_indptr_{of}"] = _starts(d, qo_lens)
        model.plan = _read_half(of, **arguments)
        rows = sum(qo_lens)
        arguments[f"q_{of}"] = d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0)
        arguments[f"paged_kv_cache_{of}"] = planned.draw_cache(d, model, shape)

    def expect(causal_p: Any, return_lse: Any, kv_layout: Any, **given: Any) -> Mapping[str, Check]:
        if causal_p not in (True, False):
            raise Refused("causal is neither True nor False")
        if kv_layout not in ("NHD", "HND"):
            raise Refused("an unknown layout")
        found = []
        for of in "pd":
            plan, q = _read_half(of, **given), given[f"q_{of}"]
            halves = planned.paged_halves(plan, given[f"paged_kv_cache_{of}"], kv_layout)
            unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
            one_each = of == "d" and plan.qo_indptr == list(range(len(plan.pages) + 1))
            if one_each and (q.dtype != plan.q_dtype or halves[0].dtype != plan.kv_dtype or len(q) != len(plan.pages)):
                raise Refused("queries of another number or dtype than planned")
            state = planned.attend(plan, q, halves, plan.options, of == "p" and causal_p)
            found.append(planned.results(plan, q, state, None, None, return_lse)["return"])
        return {"return": pair(*found)}

    yield from d.maybe_hostile(Call("BatchPODWithPagedKVCacheWrapper", _run_batch_pod, arguments, expect))


def _read_half(of: str, **given: Any) -> Plan:
    names = ("num_qo_heads", "num_kv_heads", "head_dim", "page_size", "q_data_type", "kv_data_type", "window_left")
    table = [given[f"{name}_{of}"] for name in ("kv_indptr", "kv_indices", "last_page_len")]
    plan = _read_decode(*table, **{name: given[name] for name in names})
    rows = offsets("qo_indptr", given[f"qo_indptr_{of}"], len(plan.pages) + 1)
    unplanned.require_prefill(plan.q_dtype, plan.kv_dtype, *plan.head_dims)
    return Plan(
        plan.pages, plan.kv_lens, rows, plan.num_qo_heads, plan.num_kv_heads, plan.head_dims, plan.page_size,
        plan.q_dtype, plan.kv_dtype, None, plan.options,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "BatchAttention": _attention,
    "BatchPODWithPagedKVCacheWrapper": _batch_pod,
    "PODWithPagedKVCacheWrapper": _pod,
}
