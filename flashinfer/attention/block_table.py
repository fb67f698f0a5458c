"""Attention over a block table: a row of page numbers for each request, and its length, both on the device. Nothing is
planned by the caller: every call launches the planner of its kernel ahead of it, without waiting for the device.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention import workspace
from flashinfer.attention.compat import causal_by_window, check_later_arguments
from flashinfer.attention.decode.plan import DecodePlan
from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Shape, dtype_of
from flashinfer.attention.planned import DataType, Result
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.attention.variant import DeviceScale, Scales, Variant, read_scales, require_positive
from flashinfer.host import checks, indices, memo, paged_cache, traced
from flashinfer.host.checks import LOWEST_ADDRESS
from flashinfer.host.paged_cache import PagedCache, PagedKv

Scale = Union[float, torch.Tensor]


def xqa_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: Scale = 1.0,
    bmm2_scale: Scale = 1.0,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_layout: str = "NHD",
    enable_pdl: Optional[bool] = None,
    q_len_per_req: Optional[int] = 1,
    o_scale: Optional[float] = 1.0,
    mask: Optional[torch.Tensor] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    q_cu_seq_lens: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`trtllm_batch_decode_with_kv_cache` under another name, for layout NHD unless it is told otherwise.

    Args:
        q_cu_seq_lens: cum_seq_lens_q there.
        query, …: as there.
    """
    op = "xqa_batch_decode"
    check_later_arguments(op, {"kv_cache_sf": kv_cache_sf})
    _require_scale(op, "o_scale", o_scale)
    q_len = 1 if q_len_per_req is None else q_len_per_req
    options = _Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, q_len)
    result = _call(
        op,
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        q_cu_seq_lens,
        mask,
        sinks,
        out,
        None,
        False,
        options,
    )
    assert isinstance(result, torch.Tensor)
    return result


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: Scale = 1.0,
    bmm2_scale: Scale = 1.0,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[DataType] = None,
    o_sf_scale: Optional[float] = None,
    o_sf_vec_size: Optional[int] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_layout: str = "HND",
    enable_pdl: Optional[bool] = None,
    backend: str = "auto",
    q_len_per_req: Optional[int] = 1,
    o_scale: Optional[float] = 1.0,
    mask: Optional[torch.Tensor] = None,
    max_q_len: Optional[int] = None,
    cum_seq_lens_q: Optional[torch.Tensor] = None,
    skip_softmax_threshold_scale_factor: Optional[float] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
    **later: Any,
) -> Result:
    """Attention of the last tokens of every request over a paged cache, whose pages are in a block table.

    Query i of a request stands at position `seq_len - q_len + i` and sees keys up to its own position. Needs no plan
    and does not wait for the device: a call may be captured in a CUDA graph, and replayed for other lengths and pages.

    Args:
        query: `[num_tokens, num_qo_heads, head_dim]`, the queries of a request side by side: fp16 or bf16 (fp32 on the
            CPU), or fp8 e4m3 over a cache of it.
        kv_cache: a pair of tensors `[num_pages, num_kv_heads, page_size, head_dim]` (HND; NHD has page_size before the
            heads), or one with K and V on an axis of 2 behind the first; an axis of 1 is both. Any page size, any
            strides over whole rows; dtype of query, or fp8 e4m3 or e5m2.
        workspace_buffer: scratch memory on the device, of any contents; 128 MB suffice for every common shape. Calls on
            one stream may share it. On the CPU any tensor will do.
        block_tables: int32 `[batch_size, max_pages]`, of the pages of each request; those beyond its length may be
            anything.
        seq_lens: int32 or uint32 `[batch_size]`, keys of each request, its queries' own included; 0 for padding.
        bmm1_scale: factor of q·k: that of the softmax times those of quantized query and keys. A number, or one float32
            in a tensor on the device, which only the kernel reads.
        bmm2_scale: factor of the output: that of quantized values. As bmm1_scale.
        window_left: keys seen before the query's own position; -1 for all.
        out, out_dtype: `[num_tokens, num_qo_heads, head_dim_vo]` or its dtype, that of query by default; of 16 bits.
        sinks: fp32 `[num_qo_heads]`, one more logit of every head without a value (GPT-OSS).
        q_len_per_req: queries of every request, unless cum_seq_lens_q is given.
        cum_seq_lens_q: int32 `[batch_size + 1]`; request i owns tokens `[cum_seq_lens_q[i], cum_seq_lens_q[i + 1])`.
        mask: None, and queries of a request see each other causally; or, for a tree of drafts, integers of which each
            token has a row of `ceil(q_len / 32)` words of 32 bits, little-endian: bit j is whether it sees query j of
            its request. q_len is q_len_per_req or, with cum_seq_lens_q, max_q_len.
        lse: fp32 `[num_tokens, num_qo_heads]`; allocated when None and return_lse.
        return_lse: also return the base-2 logarithm of the sum of exponentials.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
        max_q_len: the most queries of a request; needed with both cum_seq_lens_q and mask.
        max_seq_len, backend, o_scale: accepted for compatibility; o_scale of a 16-bit output cancels out.
        o_sf_scale, …, later: what asks for nothing that is not here (compat.py).

    Returns:
        out, or (out, lse). A query that sees no key gives zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or the workspace is too small.
        IndexError: on the CPU, a page number past the cache; a GPU reads where it points to.
        UnsupportedConfig: no kernel for these arguments.
    """
    op = "trtllm_batch_decode"
    asked = {
        "o_sf_scale": o_sf_scale, "o_sf_vec_size": o_sf_vec_size,
        "skip_softmax_threshold_scale_factor": skip_softmax_threshold_scale_factor, "kv_cache_sf": kv_cache_sf,
        "uses_shared_paged_kv_idx": uses_shared_paged_kv_idx,
    }  # fmt: skip
    if later:
        asked.update(later)
        cp_world, _ = asked.pop("cp_world", 1), asked.pop("cp_rank", 0)  # looked at with causal_seqlens_kv_global alone
        checks.integer(op, "cp_world", cp_world, 1)
    check_later_arguments(op, asked)
    _require_scale(op, "o_scale", o_scale)
    q_len = 1 if q_len_per_req is None else q_len_per_req
    if cum_seq_lens_q is not None and max_q_len is not None:
        q_len = max_q_len
    options = _Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, q_len, out_dtype=out_dtype)
    return _call(
        op, query, kv_cache, workspace_buffer, block_tables, seq_lens, cum_seq_lens_q, mask, sinks, out, lse,
        return_lse, options,
    )  # fmt: skip


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: Scale,
    bmm2_scale: Scale,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[DataType] = None,
    o_sf_scale: Optional[float] = None,
    o_sf_vec_size: Optional[int] = None,
    kv_layout: str = "HND",
    enable_pdl: Optional[bool] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    skip_softmax_threshold_scale_factor: Optional[float] = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: Optional[torch.Tensor] = None,
    use_fp16_softmax: Optional[bool] = None,
    uses_spcompress: Optional[bool] = None,
    backend: str = "trtllm-gen",
    window_right: int = -1,
    **later: Any,
) -> Result:
    """Prefill, chunked prefill or append over a paged cache, whose pages are in a block table. As
    `trtllm_batch_decode_with_kv_cache`, but for:

    Args:
        batch_size: rows of block_tables.
        causal: query i sees keys up to its own position; else all in the window.
        window_right: -1, or with causal any, or without 0, which is causal.
        cum_seq_lens_kv, max_q_len, max_kv_len, multi_ctas_kv_counter_buffer: accepted for compatibility.
    """
    op = "trtllm_batch_context"
    asked = {
        "o_sf_scale": o_sf_scale, "o_sf_vec_size": o_sf_vec_size, "kv_cache_sf": kv_cache_sf,
        "skip_softmax_threshold_scale_factor": skip_softmax_threshold_scale_factor,
        "uses_shared_paged_kv_idx": uses_shared_paged_kv_idx, "use_fp16_softmax": use_fp16_softmax,
        "uses_spcompress": uses_spcompress,
    }  # fmt: skip
    if later:
        asked.update(later)
    check_later_arguments(op, asked)
    is_causal = causal_by_window(op, {"window_right": window_right}, checks.boolean(op, "causal", causal))
    if not isinstance(cum_seq_lens_q, torch.Tensor):
        raise checks.not_tensors(op, cum_seq_lens_q=cum_seq_lens_q)
    if isinstance(block_tables, torch.Tensor) and block_tables.dim() > 0:
        checks.require(
            len(block_tables) == batch_size, op,
            f"block_tables has shape {list(block_tables.shape)}; expected {batch_size} rows, batch_size",
        )  # fmt: skip
    kind = "causal" if is_causal else "none"
    options = _Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, 1, kind, out_dtype)
    return _call(
        op, query, kv_cache, workspace_buffer, block_tables, seq_lens, cum_seq_lens_q, None, sinks, out, lse,
        return_lse, options,
    )  # fmt: skip


class _Options(NamedTuple):
    """Of one call."""

    bmm1_scale: Any
    bmm2_scale: Any
    window_left: int
    kv_layout: str
    pdl: Optional[bool]
    q_len: int  # of every request where there are no offsets of queries, else the longest that has a mask
    mask_kind: str = "causal"  # where there is no mask
    out_dtype: Optional[DataType] = None


def _require_scale(op: str, name: str, scale: object) -> None:
    if scale is not None:
        require_positive(op, name, scale)


# ---------------------------------------------------------------------------------------------------------------- calls


def _call(
    op: str,
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    qo_indptr: Optional[torch.Tensor],
    mask: Optional[torch.Tensor],
    sinks: Optional[torch.Tensor],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
    options: _Options,
) -> Result:
    if not traced.is_dynamo_compiling():
        return _run(
            op, query, kv_cache, workspace_buffer, block_tables, seq_lens, qo_indptr, mask, sinks, out, lse, return_lse,
            options,
        )  # fmt: skip
    if out is None:
        head_dim = (kv_cache if isinstance(kv_cache, torch.Tensor) else kv_cache[1]).shape[-1]
        dtype = query.dtype if options.out_dtype is None else dtype_of(op, "out_dtype", options.out_dtype)
        out = query.new_empty((*query.shape[:-1], head_dim), dtype=dtype)
    if return_lse and lse is None:
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _door(
        op, query, kv_cache, workspace_buffer, block_tables, seq_lens, qo_indptr, mask, sinks, out, lse, *options[:-1]
    )
    return (out, lse) if return_lse and lse is not None else out


def _run(
    op: str,
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    qo_indptr: Optional[torch.Tensor],
    mask: Optional[torch.Tensor],
    sinks: Optional[torch.Tensor],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
    options: _Options,
) -> Result:
    try:
        if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 5 and kv_cache.shape[1] == 1:
            kv_cache = (kv_cache[:, 0], kv_cache[:, 0])
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
        _require_tensors(
            op, _Given(query, kv_cache, workspace_buffer, block_tables, seq_lens, qo_indptr, mask, sinks, out, lse)
        )
        raise
    given = _Given(query, kv_cache, workspace_buffer, block_tables, seq_lens, qo_indptr, mask, sinks, out, lse)
    if lowest < LOWEST_ADDRESS:
        _require_tensors(op, given)
    bound = _bounds.get(key)
    if bound is None:
        bound = _bounds.remember(key, _bind(op, given, options))
    if bound.may_see_indices:
        _check_indices(op, given, bound)
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


class _Given(NamedTuple):
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
    lse: Optional[torch.Tensor]


class _Bound(NamedTuple):
    """One signature of a call: checked, laid out but for the addresses."""

    planner: BoundLaunch
    run: BoundRun
    has_rows: bool  # planner and run take the address of the queries' offsets first
    page_size: int
    may_see_indices: bool


_bounds: memo.Memo[_Bound] = memo.Memo()
# A kernel follows its planner at once: on a stream that threads share, another plan would come between.
_planning = threading.Lock()


def _require_tensors(op: str, given: _Given) -> None:
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


def _bind(op: str, given: _Given, options: _Options) -> _Bound:
    query, cache, device = given.query, given.kv_cache, given.query.device
    _require_tensors(op, given)
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
        kv = PagedKv(options.kv_layout, page_size, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo, k.dtype)
        lengths = (q_len, table_len)
        plan = PrefillPlan(
            op, device, shape, types, kind, variant, kv, regions, split_kv=True, lengths=lengths,
        )  # fmt: skip
    short = plan.is_short(num_tokens)
    v_scale = options.bmm2_scale
    if not isinstance(v_scale, DeviceScale):
        v_scale = checks.real(op, "bmm2_scale", v_scale)
    scales: Scales = (None, k_scale, v_scale)
    call = Call(query, cache, given.out, given.lse, scales, options.pdl, None, sinks=given.sinks)
    run = plan.bind(call, short)
    sees = indices.may_be_visible(given.block_tables, given.seq_lens, given.cum_seq_lens_q)
    return _Bound(plan.tile(short)[1], run, not is_decode, page_size, sees)


def _require_table(op: str, given: _Given) -> int:
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


def _check_indices(op: str, given: _Given, bound: _Bound) -> None:
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


_door = traced.door(
    "block_table_attention",
    lambda op, query, cache, memory, tables, lens, offsets, mask, sinks, out, lse, *options: _run(
        op, query, cache, memory, tables, lens, offsets, mask, sinks, out, lse, False,
        _Options._make((*options, out.dtype)),
    ),
    {
        "op": "str", "query": "Tensor", "kv_cache": traced.TENSORS, "workspace_buffer": "Tensor",
        "block_tables": "Tensor", "seq_lens": "Tensor",
        **dict.fromkeys(("cum_seq_lens_q", "mask", "sinks"), "Tensor?"),
        "out": "Tensor(!)", "lse": "Tensor(!)?", "bmm1_scale": traced.REAL, "bmm2_scale": traced.REAL,
        "window_left": "int", "kv_layout": "str", "pdl": "bool?", "q_len": "int", "mask_kind": "str",
    },
)  # fmt: skip
