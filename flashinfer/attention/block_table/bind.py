# SPDX-License-Identifier: Apache-2.0
"""The first call of a signature: checks, and the launches of its planner and its kernel."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention import workspace
from flashinfer.attention.decode.plan import DecodePlan
from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Shape, dtype_of
from flashinfer.attention.planned import DataType
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.attention.variant import DeviceScale, Scales, Variant, require_positive
from flashinfer.host import checks, indices, paged_cache
from flashinfer.host.paged_cache import PagedCache


class Given(NamedTuple):
    """The tensors of a call."""

    query: torch.Tensor
    kv_cache: PagedCache
    workspace_buffer: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    cum_seq_lens_q: Optional[torch.Tensor]
    mask: Optional[torch.Tensor]
    sinks: Optional[torch.Tensor]
    out: Optional[torch.Tensor]
    lse: Optional[torch.Tensor] = None


class Options(NamedTuple):
    """Of one call."""

    bmm1_scale: Any
    bmm2_scale: Any
    window_left: int
    kv_layout: str
    pdl: Optional[bool]
    q_len: int  # of every request where there are no offsets of queries, else the longest that has a mask
    mask_kind: str = "causal"  # where there is no mask
    out_dtype: Optional[DataType] = None


class Bound(NamedTuple):
    """One signature of a call: checked, laid out but for the addresses."""

    planner: BoundLaunch
    run: BoundRun
    has_rows: bool  # planner and run take the address of the queries' offsets first
    page_size: int
    may_see_indices: bool


def require_scale(op: str, name: str, scale: object) -> None:
    if scale is not None:
        require_positive(op, name, scale)


def require_tensors(op: str, given: Given) -> None:
    """Every argument is what it should be, and in memory."""
    cache = given.kv_cache
    if not isinstance(cache, torch.Tensor) and not (isinstance(cache, (tuple, list)) and len(cache) == 2):
        raise TypeError(f"{op}: kv_cache is a {type(cache).__name__}; expected a tensor or a pair (k, v) of tensors")
    named = {**given._asdict(), **dict(zip(("kv_cache", "the V cache"), paged_cache.tensors(cache)))}
    for name, value in named.items():
        if value is None and name in ("cum_seq_lens_q", "mask", "sinks", "out", "lse"):
            continue
        if not isinstance(value, torch.Tensor):
            raise checks.not_tensors(op, **{name: value})
        checks.low_address(op, name, value)


def bind(op: str, given: Given, options: Options) -> Bound:
    query, cache, device = given.query, given.kv_cache, given.query.device
    require_tensors(op, given)
    workspace.require_workspace(op, given.workspace_buffer)
    paged_cache.require_layout(op, options.kv_layout)
    checks.require(query.dim() == 3, op, f"query has shape {list(query.shape)}; expected [num_tokens, heads, head_dim]")
    table_len = _require_table(op, given)
    batch_size, num_tokens = len(given.block_tables), len(query)
    q_len = checks.integer(op, "q_len_per_req", options.q_len, 0 if batch_size == 0 else 1)
    if given.cum_seq_lens_q is None:
        checks.require(
            num_tokens == batch_size * q_len, op,
            f"query has {num_tokens} tokens; expected {batch_size * q_len}, q_len_per_req {q_len} for each of the "
            f"{batch_size} rows of block_tables",
        )  # fmt: skip
    k, v = (cache, cache) if isinstance(cache, torch.Tensor) else cache
    rank = 5 if isinstance(cache, torch.Tensor) else 4
    checks.require(
        k.dim() == v.dim() == rank, op,
        f"kv_cache has shape {list(k.shape)}; expected [num_pages, 2, …] or a pair of [num_pages, …]",
    )  # fmt: skip
    heads_at, page_at = (-2, -3) if options.kv_layout == "NHD" else (-3, -2)
    page_size = k.shape[page_at]
    shape = Shape.of(op, batch_size, query.shape[1], k.shape[heads_at], page_size, query.shape[2], v.shape[-1])
    o_dtype = query.dtype if options.out_dtype is None else dtype_of(op, "out_dtype", options.out_dtype)
    if given.out is not None:
        o_dtype = given.out.dtype
    types = (query.dtype, k.dtype, o_dtype)
    k_scale, sm_scale = None, 1.0
    if isinstance(options.bmm1_scale, DeviceScale):
        k_scale = options.bmm1_scale
    else:
        sm_scale = require_positive(op, "bmm1_scale", options.bmm1_scale)
    has_sinks = given.sinks is not None
    variant = Variant.of(op, shape.head_dim_qk, window_left=options.window_left, sm_scale=sm_scale, has_sinks=has_sinks)
    regions = workspace.halves(given.workspace_buffer)
    kind = options.mask_kind
    if given.mask is not None:
        kind = "draft"
        _require_mask(op, given.mask, num_tokens, q_len)
    is_decode = given.cum_seq_lens_q is None and q_len == 1 and kind == "causal"
    plan: Union[DecodePlan, PrefillPlan]
    if is_decode:
        plan = DecodePlan(op, device, shape, types, variant, options.kv_layout, regions, table_len)
    else:
        kv = shape.pages(options.kv_layout, k.dtype)
        lengths = (q_len, table_len)
        plan = PrefillPlan(
            op, device, shape, types, kind, variant, kv, regions, split_kv=True, lengths=lengths,
        )  # fmt: skip
    queries = plan.queries_of(num_tokens)
    v_scale = options.bmm2_scale
    if not isinstance(v_scale, DeviceScale):
        v_scale = checks.real(op, "bmm2_scale", v_scale)
    scales: Scales = (None, k_scale, v_scale)
    call = Call(query, cache, given.out, given.lse, scales, options.pdl, None, sinks=given.sinks)
    run = plan.bind(call, queries)
    sees = indices.may_be_visible(given.block_tables, given.seq_lens, given.cum_seq_lens_q)
    return Bound(plan.tile(queries)[1], run, not is_decode, page_size, sees)


def _require_table(op: str, given: Given) -> int:
    """Entries from one row of the block table to the next."""
    tables, lens, offsets = given.block_tables, given.seq_lens, given.cum_seq_lens_q
    checks.require(tables.dim() == 2, op, f"block_tables has shape {list(tables.shape)}; expected [batch_size, pages]")
    batch_size, width = tables.shape
    row = tables.stride(0) if batch_size > 1 else width
    checks.require(
        tables.dtype == torch.int32 and (width <= 1 or tables.stride(1) == 1) and row >= width, op,
        f"block_tables is {tables.dtype} with strides {list(tables.stride())}; expected int32, dense rows of {width}",
    )  # fmt: skip
    checks.require(batch_size * row < 1 << 31, op, f"block_tables has {batch_size * row} entries; expected 32 bits")
    expected = {"seq_lens": (lens, batch_size), "cum_seq_lens_q": (offsets, batch_size + 1)}
    for name, (tensor, length) in expected.items():
        if tensor is None:
            continue
        kinds = (torch.int32, torch.uint32) if name == "seq_lens" else (torch.int32,)
        checks.require(
            tensor.dtype in kinds and tensor.shape == (length,) and tensor.is_contiguous(), op,
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected contiguous int32 [{length}] beside block_tables "
            f"of shape {list(tables.shape)}",
        )  # fmt: skip
    for name, tensor in given._asdict().items():
        if name != "kv_cache" and tensor is not None:
            checks.require_device(op, name, tensor, given.query, "query")
    return row


def _require_mask(op: str, mask: torch.Tensor, num_tokens: int, q_len: int) -> None:
    needed = num_tokens * 4 * -(-q_len // 32)
    is_integral = not mask.dtype.is_floating_point and not mask.dtype.is_complex and mask.dtype != torch.bool
    checks.require(
        is_integral and mask.is_contiguous() and mask.numel() * mask.element_size() >= needed, op,
        f"mask is {mask.dtype} of shape {list(mask.shape)}; expected contiguous integers of {needed} bytes, a row of "
        f"{-(-q_len // 32)} words of 32 bits for each of the {num_tokens} tokens",
    )  # fmt: skip


def check_indices(op: str, given: Given, bound: Bound) -> None:
    """Values of index tensors, where the host looks at them."""
    tables, offsets = given.block_tables, given.cum_seq_lens_q
    if not indices.are_visible(tables, given.seq_lens, offsets):
        return
    if offsets is not None:
        indices.require_offsets(op, "cum_seq_lens_q", offsets, len(given.query), "the tokens of query")
    lens, most = given.seq_lens.view(torch.int32), tables.shape[1] * bound.page_size
    indices.require_within(op, "seq_lens", lens, 0, most + 1, "what a row of block_tables holds")

    def is_used() -> torch.Tensor:
        firsts = torch.arange(tables.shape[1], device=tables.device) * bound.page_size
        return firsts < lens[:, None]

    num_pages = bound.run.num_kv_rows
    indices.require_within(op, "block_tables", tables, 0, num_pages, f"the cache's {num_pages} pages", is_used)
