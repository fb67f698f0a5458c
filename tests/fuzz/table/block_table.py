# SPDX-License-Identifier: Apache-2.0
"""Attention over block tables, which plans by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flashinfer import decode, prefill
from tests.fuzz.call import Call, Check, Refused, Unspecified
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import integers, offsets, whole
from tests.fuzz.table.planned import I32, Model, Plan

FUNCTIONS = {
    "xqa_batch_decode_with_kv_cache": decode.xqa_batch_decode_with_kv_cache,
    "trtllm_batch_decode_with_kv_cache": decode.trtllm_batch_decode_with_kv_cache,
    "trtllm_batch_context_with_kv_cache": prefill.trtllm_batch_context_with_kv_cache,
}


def _scale(name: str, given: Any) -> float:
    if isinstance(given, torch.Tensor) and (given.numel() != 1 or given.is_complex()):
        raise Refused(f"{name} is no scale")
    return unplanned.read_scales(**{name: given})[name]


def _rows(tables: Any, lens: Any, page_size: int) -> tuple[list[list[int]], list[int]]:
    """Pages and lengths of the requests."""
    if tables.dim() != 2 or tables.dtype != I32:
        raise Refused("no table of int32")
    if lens.dtype == torch.uint32:
        lens = lens.view(I32)
    lengths = integers("seq_lens", lens, len(tables))
    if lens.dtype != I32 or any(not 0 <= length <= tables.shape[1] * page_size for length in lengths):
        raise Refused("lengths beyond the table, or of another type")
    counts = [-(-length // page_size) for length in lengths]
    return [row[:count] for row, count in zip(tables.tolist(), counts)], lengths


def _masks(mask: Any, starts: list[int], kv_lens: list[int], q_len: int) -> list[torch.Tensor]:
    """`[qo_len, kv_len]` of each request: the keys ahead of its queries, and of theirs what the bits say."""
    if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool or not mask.is_contiguous():
        raise Refused("a mask of no integers")
    num_tokens, width = starts[-1], -(-q_len // 32) * 4
    if mask.numel() * mask.element_size() < num_tokens * width:
        raise Refused("a mask of too few rows")
    rows = mask.flatten().view(torch.uint8)[: num_tokens * width].view(num_tokens, width)
    bits = (rows[:, :, None] >> torch.arange(8) & 1).flatten(1).bool()
    masks = []
    for begin, end, kv_len in zip(starts, starts[1:], kv_lens):
        qo_len = end - begin
        among = torch.arange(kv_len) - (kv_len - qo_len)
        seen = bits[begin:end][:, among.clamp(0, 8 * width - 1)] if width else bits[begin:end]
        masks.append(torch.where(among < 0, True, seen & (among < 8 * width)))
    return masks


def _case(name: str, d: Draw) -> Iterator[Call]:
    shape, is_context = planned.draw_shape(d), "context" in name
    model, page_size = Model(d.choice(("NHD", "HND"))), d.choice((1, 4, 5))
    kv_lens = planned.draw_lengths(d, model)
    batch_size = len(kv_lens)
    q_len = d.choice((1, 1, 2, 3))
    is_ragged = is_context or d.chance(0.3)
    qo_lens = [d.random.randint(0, 4) if is_ragged else q_len for _ in kv_lens]
    counts = [-(-length // page_size) for length in kv_lens]
    width, order = max(counts, default=0) + d.random.randint(0, 2), list(range(sum(counts) + 2))
    d.random.shuffle(order)
    tables = torch.full((batch_size, width), d.choice((-1, 1 << 30)), dtype=I32)
    for i, count in enumerate(counts):
        tables[i, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=I32)
    pages = [row[:count] for row, count in zip(tables.tolist(), counts)]
    model.plan = Plan(
        pages, kv_lens, [sum(qo_lens[:i]) for i in range(batch_size + 1)], *shape.heads, (shape.head_dim,) * 2,
        page_size, shape.dtype, shape.kv_dtype, shape.dtype, {},
    )  # fmt: skip
    rows = sum(qo_lens)
    starts = d.index(model.plan.qo_indptr, I32) if is_ragged else None
    arguments: dict[str, Any] = {
        "query": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
        "kv_cache": planned.draw_cache(d, model, shape),
        "workspace_buffer": torch.zeros(d.choice((1, 16)), dtype=torch.uint8),
        "block_tables": d.dense(tables), "seq_lens": d.index(kv_lens, I32),
        "bmm1_scale": d.choice((0.2, 1.0, torch.tensor([0.3]))),
        "bmm2_scale": d.choice((0.25, 1.0, torch.tensor(0.7))),
        "window_left": d.kernel(-1, d.choice((0, 3, 100))), "kv_layout": model.layout,
    }  # fmt: skip
    outputs = planned.draw_outputs(d, rows, shape)
    if "xqa" in name:
        arguments.update(out=outputs["out"], max_seq_len=16, q_cu_seq_lens=starts)
    else:
        arguments.update(outputs)
    if is_context:
        arguments.update(
            cum_seq_lens_q=starts, cum_seq_lens_kv=None, max_q_len=4, max_kv_len=16, batch_size=batch_size,
            causal=d.kernel(True, False),
        )  # fmt: skip
    elif "xqa" not in name:
        arguments.update(cum_seq_lens_q=starts, max_seq_len=16)
    if not is_context:
        arguments["q_len_per_req"] = q_len
        arguments["mask"] = None
        if not is_ragged and d.chance(0.3):
            seen = torch.rand(rows, q_len, generator=d.torch) < 0.6
            arguments["mask"] = d.dense((seen.int() << torch.arange(q_len)).sum(1, dtype=torch.int32))

    def expect(
        query: Any, kv_cache: Any, workspace_buffer: Any, block_tables: Any, seq_lens: Any, bmm1_scale: Any,
        bmm2_scale: Any, window_left: Any, kv_layout: Any, out: Any = None, lse: Any = None, return_lse: Any = False,
        q_cu_seq_lens: Any = None, cum_seq_lens_q: Any = None, q_len_per_req: Any = 1, causal: Any = True,
        batch_size: Any = None, mask: Any = None, **hints: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        planned.require_workspace(workspace_buffer)
        if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 5 and kv_cache.shape[1] == 1:
            raise Unspecified
        halves = planned.cache_halves(kv_cache, kv_layout)
        page_size = halves[0].shape[1]
        pages, lens = _rows(block_tables, seq_lens, page_size)
        starts = q_cu_seq_lens if q_cu_seq_lens is not None else cum_seq_lens_q
        if starts is None:
            if is_context:
                raise Refused("no offsets of queries")
            q_len = 1 if q_len_per_req is None else whole("q_len_per_req", q_len_per_req)
            if len(query) != len(pages) * q_len or q_len < 0:
                raise Refused("another number of queries")
            rows = [i * q_len for i in range(len(pages) + 1)]
        else:
            if starts.dtype != I32:
                raise Refused("offsets of another type")
            rows = offsets("offsets", starts, len(pages) + 1, len(query))
        if batch_size is not None and batch_size != len(pages):
            raise Refused("another batch size")
        if causal not in (True, False):
            raise Refused("causal is neither True nor False")
        if query.dim() != 3:
            raise Refused("no queries")
        heads = query.shape[1], halves[0].shape[2]
        unplanned.require_heads(*heads)
        unplanned.require_dtypes(query.dtype, halves[0].dtype)
        dims = query.shape[2], halves[1].shape[3]
        if dims[0] not in unplanned.HEAD_DIMS or dims[1] not in unplanned.HEAD_DIMS:
            raise Refused("head dimensions without a kernel")
        masks = None if mask is None else _masks(mask, rows, lens, 1 if q_len_per_req is None else int(q_len_per_req))
        plan = Plan(pages, lens, rows, *heads, dims, page_size, query.dtype, halves[0].dtype, query.dtype, {},
                    masks=masks)  # fmt: skip
        options = unplanned.read_options(window_left=window_left, sm_scale=_scale("q_scale", bmm1_scale))
        scales = {"v_scale": _scale("v_scale", bmm2_scale)}
        if options["sm_scale"] is None:
            raise Refused("no scale")
        # One query sees the same with a causal mask as without.
        state = planned.attend(plan, query, halves, {**options, **scales}, causal and masks is None)
        return planned.results(plan, query, state, out, lse, return_lse)

    written = ("out",) if "xqa" in name else ("out", "lse")
    yield from d.maybe_hostile(Call(name, FUNCTIONS[name], arguments, expect, written))


CASES: dict[str, Case] = {name: functools.partial(_case, name) for name in FUNCTIONS}
