# SPDX-License-Identifier: Apache-2.0
"""Latent attention: planned, over lists of rows, and the keys of what is not absorbed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from flashinfer.decode import BatchDecodeMlaWithPagedKVCacheWrapper
from tests.fuzz.call import Call, Check, Refused, equal, nothing
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan, Shape
from tests.oracles import rope
from tests.oracles.attention import attention

E4M3 = torch.float8_e4m3fn
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, E4M3))  # of q and cache
DIMS = ((512, 64), (512, 0), (256, 64))  # of ckv and kpe
# Sums of some 500 products in fp32.
SCALE = 2.0


def _draw_shape(d: Draw, *, dims: tuple[int, int] | None = None) -> tuple[Shape, int]:
    """Of one KV head and the head_dim of ckv; and the dimension of kpe."""
    dtype, kv_dtype = d.kernel(*DTYPES)
    dim_ckv, dim_kpe = dims or d.kernel(*DIMS)
    return Shape((d.choice((1, 3, 5)), 1), dim_ckv, dtype, kv_dtype), dim_kpe


def _require_kernel(dim_ckv: Any, dim_kpe: Any, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[int, int]:
    dims = whole("head_dim_ckv", dim_ckv), whole("head_dim_kpe", dim_kpe)
    if dims[0] not in (512, 256) or dims[1] not in (64, 0):
        raise Refused("dimensions without a kernel")
    if q_dtype not in FLOATS or kv_dtype not in (q_dtype, E4M3):
        raise Refused("dtypes without a kernel")
    return dims


def _cache(d: Draw, model: Model, shape: Shape, dim_kpe: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ckv and kpe, of rows that only hold numbers where the plan says so."""
    whole_rows = Shape((1, 1), shape.head_dim + dim_kpe, torch.float32, torch.float32)
    drawn = planned.draw_cache(d, model, whole_rows)
    rows = (drawn[:, 0] if isinstance(drawn, torch.Tensor) else drawn[0])[:, :, 0].to(shape.kv_dtype)
    ckv, kpe = rows[..., : shape.head_dim], rows[..., shape.head_dim :]
    if d.chance(0.5):
        return d.place(ckv.clone(memory_format=torch.contiguous_format), 0), d.place(kpe.contiguous(), 0)
    placed = d.place(rows.contiguous(), 0)
    return placed[..., : shape.head_dim], placed[..., shape.head_dim :]


def _attend(plan: Plan, q: tuple[Any, Any], caches: tuple[Any, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Of queries and rows in two parts."""
    if any(x.dim() != 3 for x in (*q, *caches)) or q[0].shape[:2] != q[1].shape[:2] or q[0].dtype != q[1].dtype:
        raise Refused("parts of queries that do not fit")
    if q[0].dtype != plan.q_dtype or any(cache.dtype != plan.kv_dtype for cache in caches):
        raise Refused("another dtype than planned")
    if caches[0].shape[:2] != caches[1].shape[:2]:
        raise Refused("parts of rows that do not fit")
    if caches[0].shape[1] != plan.page_size:
        raise Refused("pages of another size than planned")
    ckv, kpe = (cache.float() for cache in caches)
    if (ckv.shape[-1], kpe.shape[-1]) != (plan.head_dims[1], plan.head_dims[0] - plan.head_dims[1]):
        raise Refused("rows of other dimensions than planned")
    if (q[0].shape[-1], q[1].shape[-1]) != (ckv.shape[-1], kpe.shape[-1]):
        raise Refused("queries of other dimensions than planned")
    halves = torch.cat([ckv, kpe], dim=-1)[:, :, None], ckv[:, :, None]
    return planned.attend(plan, torch.cat(q, dim=-1), halves, options, plan.causal)


# -------------------------------------------------------------------------------------------------------------- planned


def _read_pages(indptr: Any, indices: Any, lengths: Any, page_size: Any) -> tuple[list[list[int]], list[int], int]:
    """The pages that the requests' tokens are in, lengths, and the page size."""
    page_size, numbers = planned.read_count("page_size", page_size), integers("kv_indices", indices)
    starts = offsets("kv_indptr", indptr)
    if len(starts) > 1 and starts[-1] > len(numbers):
        raise Refused(f"kv_indptr ends at {starts[-1]}, past {len(numbers)} page numbers")
    lens = integers("kv_len_arr", lengths, len(starts) - 1)
    pages = [numbers[begin:end] for begin, end in itertools.pairwise(starts)]
    if any(not 0 <= length <= len(listed) * page_size for listed, length in zip(pages, lens)):
        raise Refused("more tokens than the pages hold")
    if any(len(listed) * page_size >= LARGEST for listed in pages):
        raise Refused("more rows than int32 counts")
    return [listed[: -(-length // page_size)] for listed, length in zip(pages, lens)], lens, page_size


def _plan(d: Draw, model: Model, shape: Shape, dim_kpe: int) -> Call:
    kv_lens = planned.draw_lengths(d, model)
    qo_lens = [d.random.randint(0, 3) for _ in kv_lens]
    page_size, is_graph = d.choice((1, 4, 5)), model.batch_size is not None
    indptr, indices, _ = planned.draw_page_table(d, kv_lens, page_size, is_exact=is_graph)
    arguments = {
        "qo_indptr": d.index([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)], d.choice((I32, I32, torch.int64))),
        "kv_indptr": indptr, "kv_indices": indices, "kv_len_arr": d.index(kv_lens, d.choice((I32, torch.int64))),
        "num_heads": shape.heads[0], "head_dim_ckv": shape.head_dim, "head_dim_kpe": dim_kpe, "page_size": page_size,
        "causal": d.chance(0.6), "sm_scale": d.choice((0.07, 0.2)),
        "q_data_type": planned.draw_dtype(d, shape.dtype), "kv_data_type": planned.draw_dtype(d, shape.kv_dtype),
    }  # fmt: skip

    def describe(
        qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, num_heads: Any, head_dim_ckv: Any,
        head_dim_kpe: Any, page_size: Any, causal: Any, sm_scale: Any, q_data_type: Any, kv_data_type: Any,
    ) -> Plan:  # fmt: skip
        pages, lens, page_size = _read_pages(kv_indptr, kv_indices, kv_len_arr, page_size)
        rows = offsets("qo_indptr", qo_indptr, len(pages) + 1)
        if causal not in (True, False):
            raise Refused("causal is neither True nor False")
        q_dtype, kv_dtype = planned.read_dtype(q_data_type), planned.read_dtype(kv_data_type)
        dims = _require_kernel(head_dim_ckv, head_dim_kpe, q_dtype, kv_dtype)
        heads = planned.read_count("num_heads", num_heads)
        options = {"sm_scale": unplanned.read_options(sm_scale=sm_scale)["sm_scale"]}
        if options["sm_scale"] is None:
            raise Refused("no scale")
        return Plan(
            pages, lens, rows, heads, 1, (sum(dims), dims[0]), page_size, q_dtype, kv_dtype, q_dtype, options,
            bool(causal),
        )  # fmt: skip

    function = model.wrapper.begin_forward if d.chance(0.2) else model.wrapper.plan
    return planned.planned(model, "wrapper.plan", function, arguments, describe)


def _run(d: Draw, model: Model, shape: Shape, dim_kpe: int) -> Call:
    plan = model.plan
    rows = (plan.qo_indptr[-1] if plan and plan.qo_indptr[-1] < 1000 else 3) + d.choice((0, 0, 2))
    ckv, kpe = _cache(d, model, shape, dim_kpe)
    arguments: dict[str, Any] = {
        "q_nope": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
        "q_pe": d.normal(rows, shape.heads[0], dim_kpe, dtype=shape.dtype, groups=0),
        "ckv_cache": ckv, "kpe_cache": kpe, **planned.draw_outputs(d, rows, shape), "ckv_scale": d.choice((None, 0.5)),
    }  # fmt: skip

    def expect(
        q_nope: Any, q_pe: Any, ckv_cache: Any, kpe_cache: Any, out: Any, lse: Any, return_lse: Any, ckv_scale: Any
    ) -> Mapping[str, Check]:
        plan = model.planned()
        scales = unplanned.read_scales(None, ckv_scale, ckv_scale)
        state = _attend(plan, (q_nope, q_pe), (ckv_cache, kpe_cache), {**plan.options, **scales})
        return planned.results(plan, q_nope, state, out, lse, return_lse, SCALE)

    return Call("wrapper.run", model.wrapper.run, arguments, expect, ("out", "lse"))


def _wrapper(d: Draw) -> Iterator[Any]:
    shape, dim_kpe = _draw_shape(d)
    model, is_graph = Model("NHD"), d.chance(0.25)
    arguments: dict[str, Any] = {
        "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8),
        "use_cuda_graph": is_graph,
    }
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    if is_graph:
        arguments.update(planned.draw_buffers(d, model, names))

    def expect(float_workspace_buffer: Any, use_cuda_graph: Any, **given: Any) -> Mapping[str, Check]:
        planned.require_workspace(float_workspace_buffer)
        planned.require_buffers(model, use_cuda_graph, {f"{name}_buf": given.get(name) for name in names}, "NHD")
        return {}

    def made() -> Call:
        call = planned.made(
            model, "BatchMLAPagedAttentionWrapper", flashinfer.BatchMLAPagedAttentionWrapper, arguments, expect
        )
        settle = call.settle

        def note_buffers(call: Call, raised: BaseException | None, result: Any) -> None:
            settle(call, raised, result)
            model.buffers = tuple(x for name in names if isinstance(x := call.arguments.get(name), torch.Tensor))

        call.settle = note_buffers
        return call

    yield from planned.life(
        d, model, made, lambda: _plan(d, model, shape, dim_kpe), lambda: _run(d, model, shape, dim_kpe),
        _planned_by_engine,
    )  # fmt: skip


def _planned_by_engine(d: Draw, model: Model) -> Call:
    plan, wrapper = model.plan, model.wrapper
    assert plan is not None
    kv_lens = planned.draw_lengths(d, model)
    indptr, indices, _ = planned.draw_page_table(d, kv_lens, plan.page_size, is_exact=True)
    table, shape = (indptr, indices, d.index(kv_lens, I32)), (plan.num_qo_heads, plan.head_dims[1], plan.causal)
    qo_indptr, kv_indptr, _, lengths = model.buffers  # filled here, which an engine does with copies on the host
    return planned.planned_by_engine(
        d, model, table, _read_pages,
        lambda: wrapper._cached_module.plan(*[None] * 3, qo_indptr, kv_indptr, lengths, *shape),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- decode that rotates


def _decode_plan(d: Draw, model: Model, shape: Shape) -> Call:
    page_size = d.choice((1, 4, 5))
    table = planned.draw_page_table(d, planned.draw_lengths(d, model), page_size, is_exact=model.batch_size is not None)
    last = table[2].to(table[0].dtype)
    arguments = {
        "indptr": table[0], "indices": table[1], "last_page_len": d.dense(last), "num_qo_heads": shape.heads[0],
        "head_dim_compressed_kv": shape.head_dim, "page_size": page_size, "sm_scale": d.choice((0.07, 0.2)),
        "data_type": planned.draw_dtype(d, shape.kv_dtype), "q_data_type": planned.draw_dtype(d, shape.dtype),
        "rope_scale": d.choice((None, 2.0)), "rope_theta": d.choice((None, 5e5)),
    }  # fmt: skip

    def describe(
        indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: Any, head_dim_compressed_kv: Any, page_size: Any,
        sm_scale: Any, data_type: Any, q_data_type: Any, rope_scale: Any, rope_theta: Any,
    ) -> Plan:  # fmt: skip
        pages, lens, page_size = planned.read_page_table(indptr, indices, last_page_len, page_size)
        kv_dtype = planned.read_dtype(data_type)
        q_dtype = kv_dtype if q_data_type is None else planned.read_dtype(q_data_type)
        dims = _require_kernel(head_dim_compressed_kv, 64, q_dtype, kv_dtype)
        heads = planned.read_count("num_qo_heads", num_qo_heads)
        options = unplanned.read_options("ROPE_LLAMA", sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta)
        if options["sm_scale"] is None:
            raise Refused("no scale")
        kept = {name: options[name] for name in ("sm_scale", "rope_scale", "rope_theta")}
        rows = list(range(len(pages) + 1))
        return Plan(pages, lens, rows, heads, 1, (sum(dims), dims[0]), page_size, q_dtype, kv_dtype, q_dtype, kept)

    return planned.planned(model, "wrapper.plan", model.wrapper.plan, arguments, describe)


def _decode_run(d: Draw, model: Model, shape: Shape) -> Call:
    rows = len(model.plan.pages) if model.plan else 2
    ckv, kpe = _cache(d, model, shape, 64)
    arguments: dict[str, Any] = {
        "q_nope": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
        "q_pe": d.normal(rows, shape.heads[0], 64, dtype=shape.dtype),
        "paged_ckv_cache": ckv, "paged_kpe_cache": kpe, **planned.draw_scales(d),
        **planned.draw_outputs(d, rows, shape),
    }  # fmt: skip

    def expect(
        q_nope: Any, q_pe: Any, paged_ckv_cache: Any, paged_kpe_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any,
        out: Any, lse: Any, return_lse: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        plan = model.planned()
        if q_pe.dim() != 3 or q_pe.shape != (len(plan.pages), plan.num_qo_heads, 64):
            raise Refused("q_pe of another shape than planned")
        options = dict(plan.options)
        radians = rope.frequencies(64, options.pop("rope_scale") or 1.0, options.pop("rope_theta") or 1e4)
        turned = rope.rotate(q_pe, rope.angles_of(torch.tensor(plan.kv_lens) - 1, radians), interleave=True)
        scales = unplanned.read_scales(q_scale, k_scale, v_scale)
        caches = paged_ckv_cache, paged_kpe_cache
        state = _attend(plan, (q_nope, turned.to(q_pe.dtype)), caches, {**options, **scales})
        return planned.results(plan, q_nope, state, out, lse, return_lse, SCALE)

    return Call("wrapper.run", model.wrapper.run, arguments, expect, ("out", "lse"))


def _decode_wrapper(d: Draw) -> Iterator[Any]:
    shape, _ = _draw_shape(d, dims=d.kernel((512, 64), (256, 64)))
    model, is_graph = Model("NHD"), d.chance(0.25)
    arguments: dict[str, Any] = {
        "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8),
        "use_cuda_graph": is_graph,
    }
    if is_graph:
        names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
        arguments.update(planned.draw_buffers(d, model, names))

    def expect(float_workspace_buffer: Any, use_cuda_graph: Any, **given: Any) -> Mapping[str, Check]:
        planned.require_workspace(float_workspace_buffer)
        planned.require_buffers(model, use_cuda_graph, given, "NHD")
        return {}

    name, function = "BatchDecodeMlaWithPagedKVCacheWrapper", BatchDecodeMlaWithPagedKVCacheWrapper
    yield from planned.life(
        d, model, lambda: planned.made(model, name, function, arguments, expect),
        lambda: _decode_plan(d, model, shape), lambda: _decode_run(d, model, shape), lambda d, model: [],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- lists of rows


def _sparse(is_batch: bool, d: Draw) -> Iterator[Call]:
    shape, dim_kpe = _draw_shape(d)
    leading = (d.size(3), d.random.randint(1, 2)) if is_batch else (d.size(5),)
    num_tokens, top_k, page_size = math.prod(leading), d.size(9), d.choice((1, 4))
    num_rows = 4 * d.random.randint(1, 4)
    rows = torch.randn(num_rows, shape.head_dim + dim_kpe, generator=d.torch).to(shape.kv_dtype)
    if is_batch:
        rows = rows.view(num_rows // page_size, page_size, -1)
    names = [[d.choice((-1, -7, *range(num_rows))) for _ in range(top_k)] for _ in range(num_tokens)]
    lists = torch.tensor(names, dtype=I32).view(*leading, top_k)
    outputs = planned.draw_outputs(d, num_tokens, shape)
    for name, tail in (("out", (shape.heads[0], shape.head_dim)), ("lse", (shape.heads[0],))):
        if outputs[name] is not None:
            outputs[name] = d.dense(torch.full((*leading, *tail), math.nan).to(outputs[name].dtype))
    arguments = {
        "q": d.normal(*leading, shape.heads[0], shape.head_dim + dim_kpe, dtype=shape.dtype, groups=0),
        "kv_cache" if is_batch else "kv": d.place(rows), "indices": d.dense(lists), "sm_scale": d.choice((0.07, 0.2)),
        "head_dim_ckv": shape.head_dim, "kv_scale": d.choice((None, 0.5)), **outputs,
    }  # fmt: skip

    def expect(
        q: Any, indices: Any, sm_scale: Any, head_dim_ckv: Any, kv_scale: Any, out: Any, lse: Any, return_lse: Any,
        kv: Any = None, kv_cache: Any = None,
    ) -> Mapping[str, Check]:  # fmt: skip
        given = kv_cache if is_batch else kv
        rank = 3 if is_batch else 2
        if given.dim() == rank + 1 and given.shape[-2] == 1:
            given = given.squeeze(-2)
        if indices.dim() == rank + 1 and indices.shape[-2] == 1:
            indices = indices.squeeze(-2)
        if q.dim() != rank + 1 or given.dim() != rank or indices.shape[:-1] != q.shape[:-2] or indices.dim() != rank:
            raise Refused("shapes that do not fit")
        if indices.dtype != I32:
            raise Refused("indices of another type")
        rows = given.flatten(0, 1) if is_batch else given
        dim_ckv = whole("head_dim_ckv", head_dim_ckv)
        dims = _require_kernel(dim_ckv, rows.shape[-1] - dim_ckv, q.dtype, rows.dtype)
        if q.shape[-1] != sum(dims):
            raise Refused("rows of other dimensions")
        if indices.numel() and int(indices.max()) >= len(rows):
            raise Refused("an index past the rows")
        scale = unplanned.read_scales(None, kv_scale, kv_scale)
        options = unplanned.read_options(sm_scale=sm_scale)
        if options["sm_scale"] is None:
            raise Refused("no scale")
        flat, states = q.flatten(0, 1) if is_batch else q, []
        for token, chosen in zip(flat, (indices.flatten(0, 1) if is_batch else indices).long()):
            k = rows.float()[chosen[chosen >= 0]][:, None]
            unplanned.require_finite(token, k)
            states.append(attention(token[None], k, k[..., : dims[0]], sm_scale=options["sm_scale"], **scale))
        shape = (*q.shape[:-1], dims[0])
        if out is not None and (out.shape != shape or out.dtype != q.dtype):
            raise Refused("out does not fit")
        if lse is not None and (lse.shape != shape[:-1] or lse.dtype != torch.float32):
            raise Refused("lse does not fit")
        empty = torch.zeros(0, q.shape[-2], dims[0]).double(), torch.zeros(0, q.shape[-2]).double()
        outs, lses = (torch.cat(parts) for parts in zip(empty, *states))
        state = outs.view(shape), lses.view(shape[:-1])
        check = unplanned.state(*state, q.dtype, return_lse, SCALE)
        expected: dict[str, Check] = {"return": check}
        if out is not None:
            expected["out"] = unplanned.state(*state, q.dtype, False, SCALE)
        if lse is not None and return_lse:
            expected["lse"] = unplanned.near_lse(state[1], SCALE)
        return expected

    name = "sparse_mla_decode" if is_batch else "sparse_mla_prefill"
    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, ("out", "lse")))


# ----------------------------------------------------------------------------------------------------------------- keys


def _concat(d: Draw) -> Iterator[Call]:
    tokens, heads, dtype = d.size(4), d.size(5), d.kernel(*FLOATS, *FP8)
    nope, rotary = d.kernel(128, 16, 24), d.kernel(64, 8)
    arguments = {
        "k": d.blank(tokens, heads, nope + rotary, dtype=dtype, groups=0),
        "k_nope": d.normal(tokens, heads, nope, dtype=dtype, groups=0),
        "k_rope": d.normal(tokens, 1, rotary, dtype=dtype, groups=0),
    }

    def expect(k: Any, k_nope: Any, k_rope: Any) -> Mapping[str, Check]:
        if any(x.dim() != 3 or x.dtype != k.dtype for x in (k, k_nope, k_rope)) or k.dtype not in (*FLOATS, *FP8):
            raise Refused("tensors that do not fit, or of a dtype without a kernel")
        tokens, heads, nope = k_nope.shape
        if k_rope.shape[:2] != (tokens, 1) or k.shape != (tokens, heads, nope + k_rope.shape[2]):
            raise Refused("shapes that do not fit")
        if not (0 < nope <= 512 and 0 < k_rope.shape[2] <= 512):
            raise Refused("no part, or a part too large")
        size = (torch.uint8, torch.int16, None, torch.int32)[k.element_size() - 1]
        assert size is not None
        parts = k_nope.view(size), k_rope.view(size).expand(tokens, heads, -1)
        return {"return": nothing, "k": equal(torch.cat(parts, dim=-1).view(k.dtype))}

    yield from d.maybe_hostile(Call("concat_mla_k", flashinfer.concat_mla_k, arguments, expect, ("k",)))


CASES: dict[str, Case] = {
    "BatchMLAPagedAttentionWrapper": _wrapper,
    "BatchDecodeMlaWithPagedKVCacheWrapper": _decode_wrapper,
    "sparse_mla_prefill": functools.partial(_sparse, False),
    "sparse_mla_decode": functools.partial(_sparse, True),
    "concat_mla_k": _concat,
}
