# SPDX-License-Identifier: Apache-2.0
"""Rotation fused with an append to a paged cache: check once per signature, then pack and launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer import dtypes, target
from flashinfer.families import rope as families
from flashinfer.families.layout import vec_size
from flashinfer.families.page import strides
from flashinfer.host import appending, checks, indices, memo, paged_cache, quant_scale, traced
from flashinfer.host.appending import Slots
from flashinfer.host.memo import Allocate, no_launch
from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import alignment_of, require_distinct
from flashinfer.host.traced import Bundle, is_dynamo_compiling
from flashinfer.jit import ArgValue, default_resolver
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.rope import rotation as rotary
from flashinfer.rope.launch import grid
from flashinfer.rope.rotation import Rotation


class _Append(NamedTuple):
    launch: PreparedLaunch
    v_offset: int  # bytes from the address of the cache's second tensor
    converts: bool  # and so takes scales
    check: Optional[Callable[[Slots, Rotation], None]]  # of the values of index tensors, where they may be visible
    new_q_out: Allocate


_OP = "rope_append_paged_kv_cache"
_appends: memo.Memo[_Append] = memo.Memo()
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]  # q, k, v, q_out (None: allocated)


def append(
    heads: Heads,
    slots: Slots,
    cache: PagedCache,
    kv_layout: str,
    k_scale: Scale,
    v_scale: Scale,
    rotation: Rotation,
    pdl: Optional[bool],
) -> torch.Tensor:
    """Returns q_out."""
    if is_dynamo_compiling():
        return _trace_append(heads, slots, cache, kv_layout, k_scale, v_scale, rotation, pdl)
    q, k, v, q_out = heads
    try:
        q_ptr = q.data_ptr() or checks.no_address(_OP, "q", q)
        k_ptr = k.data_ptr() or checks.no_address(_OP, "k", k)
        v_ptr = v.data_ptr() or checks.no_address(_OP, "v", v)
        q_out_ptr, out = 0, None
        if q_out is not None:
            q_out_ptr = q_out.data_ptr() or checks.no_address(_OP, "q_out", q_out)
            out = q_out is q or memo.signature(q_out)
        k_cache_ptr, v_cache_ptr = paged_cache.addresses(cache)
        if not (k_cache_ptr and v_cache_ptr):
            appending.require_cache(_OP, cache)
        slot_ptrs, slots_like = appending.identify(_OP, slots)
        where, how = rotation.identify(_OP)
        key = (
            kv_layout,
            pdl,
            (q_ptr | k_ptr | v_ptr | q_out_ptr | k_cache_ptr | v_cache_ptr) & 15,
            memo.signature(q),
            memo.signature(k),
            memo.signature(v),
            out,
            slots_like,
            paged_cache.signature(cache),
            quant_scale.signature(k_scale),
            quant_scale.signature(v_scale),
            how,
        )
        prepared = _appends.get(key)
    except (AttributeError, TypeError, ValueError):
        _prepare_append(heads, slots, cache, kv_layout, k_scale, v_scale, rotation, pdl)  # says what is wrong
        raise
    if prepared is None:
        prepared = _prepare_append(heads, slots, cache, kv_layout, k_scale, v_scale, rotation, pdl)
        _appends.remember(key, prepared)
    if q_out is None:
        q_out = prepared.new_q_out()
        q_out_ptr = q_out.data_ptr()
    addresses = q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr + prepared.v_offset, *slot_ptrs, *where
    if prepared.check is not None:
        prepared.check(slots, rotation)
    if prepared.converts:
        k_values, v_values = quant_scale.values(k_scale, _OP, "k_scale"), quant_scale.values(v_scale, _OP, "v_scale")
        prepared.launch(*addresses, *k_values, *v_values)
    else:
        prepared.launch(*addresses)
    return q_out


def _trace_append(heads: Heads, *others: Any) -> torch.Tensor:
    q, k, v, q_out = heads
    if q_out is q:
        _append_inplace_door((q, k, v), *others)
        return q
    if q_out is None:
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _append_door((q, k, v, q_out), *others)
    return q_out


def _prepare_append(
    heads: Heads,
    slots: Slots,
    cache: PagedCache,
    kv_layout: str,
    k_scale: Scale,
    v_scale: Scale,
    rotation: Rotation,
    pdl: Optional[bool],
) -> _Append:
    op = _OP
    checks.require_flag(op, "enable_pdl", pdl)
    q, k, v, q_out = heads
    checks.require_tensors(op, q=q, k=k, v=v)
    new_q_out = memo.allocator(q.shape, q.dtype, q.device)
    q_out = new_q_out() if q_out is None else q_out
    geometry = rotary.check(op, rotation, {"q": q, "k": k, "v": v, "q_out": q_out})
    checks.require_like(op, "v", v, k, "k")
    checks.require_like(op, "q_out", q_out, q, "q")
    of_rows = {axis: (size, "the rows have") for axis, size in zip(("num_kv_heads", "head_dim"), k.shape[1:])}
    k_cache, v_cache = paged_cache.halves(op, cache, kv_layout, of_rows, of_rows)
    converts = appending.check_types(op, k, k_cache, {"k_scale": k_scale, "v_scale": v_scale})
    cache_dtype = dtypes.short_name(k_cache.dtype)
    axes: dict[str, ArgValue] = {**geometry.axes, **appending.check(op, slots, k), "cache_dtype": cache_dtype}
    require_distinct(op, "q_out", q_out)
    for tensor in paged_cache.tensors(cache):
        require_distinct(op, "paged_kv_cache", tensor)
    if q.is_cuda:
        vec = min(int(axes["vec_size"]), vec_size(cache_dtype, k.shape[2] // 2, alignment_of(k_cache, v_cache)))
        axes["vec_size"] = vec
        checks.require(
            not rotation.interleave or vec >= 2,
            op,
            "the cache has an odd stride, which interleave=True does not allow",
        )
    num_heads = {"num_qo_heads": q.shape[1], "num_kv_heads": k.shape[1]}
    num_tokens, (num_pages, page_size) = q.shape[0], k_cache.shape[:2]
    launch: PreparedLaunch = no_launch
    if q.numel() + k.numel() > 0:
        spec = families.ROPE_APPEND.spec(target.of_device(q.device), **axes)
        launcher = default_resolver().load(spec).on(q.get_device(), pdl=pdl)
        scales, scale_fields = appending.scales(converts)
        launch = launcher.prepare(
            grid(launcher, num_tokens, *num_heads.values(), k.shape[1]),
            {
                **geometry.constants,
                **num_heads,
                **appending.bounds(slots, num_pages, page_size),
                **strides("key_cache_strides", k_cache.stride()),
                **strides("value_cache_strides", v_cache.stride()),
                **scales,
            },
            varying=(
                *("q", "k", "v", "q_out", "key_cache", "value_cache", *appending.FIELDS, *rotary.FIELDS),
                *scale_fields,
            ),
        )

    reads_values = geometry.reads_values  # a memo that kept `geometry` would keep its tensors

    def check(slots: Slots, rotation: Rotation) -> None:
        appending.require_slots(op, slots, num_pages, page_size)
        if reads_values:
            rotary.require_positions(op, rotation, num_tokens, lambda: appending.are_filled(slots))

    return _Append(
        launch,
        paged_cache.v_offset(cache),
        converts,
        check if indices.may_be_visible(*slots) else None,
        new_q_out,
    )


_APPEND_ARGUMENTS: dict[str, Union[str, Bundle]] = {
    **{"slots": appending.BUNDLE, "cache": traced.TENSORS.written(), "kv_layout": "str"},
    **{"k_scale": traced.REAL, "v_scale": traced.REAL, "rotation": rotary.BUNDLE, "pdl": "bool?"},
}
_append_door = traced.door(
    "rope_append",
    append,
    {"heads": traced.together("Tensor q", "Tensor k", "Tensor v", "Tensor(!) q_out"), **_APPEND_ARGUMENTS},
)
_append_inplace_door = traced.door(
    "rope_append_inplace",
    lambda heads, *others: append((*heads, heads[0]), *others),
    {"heads": traced.together("Tensor(!) q", "Tensor k", "Tensor v"), **_APPEND_ARGUMENTS},
)
