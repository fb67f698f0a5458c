# SPDX-License-Identifier: Apache-2.0
"""Appending rows to a paged cache: check once per signature, then pack and launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import page as families
from flashinfer.families.layout import vec_size
from flashinfer.host import appending, checks, indices, memo, paged_cache, quant_scale, traced
from flashinfer.host.appending import Slots
from flashinfer.host.memo import no_launch
from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import alignment_of, require_distinct
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch


class _Append(NamedTuple):
    launch: PreparedLaunch
    v_offset: int  # bytes from the address of the cache's second tensor
    converts: bool  # and so takes scales
    check: Optional[Callable[[Slots], None]]  # of the values of index tensors, where they may be visible


_appends: memo.Memo[_Append] = memo.Memo()
_mla_appends: memo.Memo[_Append] = memo.Memo()
Rows = tuple[torch.Tensor, torch.Tensor]  # of keys and values


def run_paged(
    rows: Rows,
    slots: Slots,
    paged_kv_cache: PagedCache,
    kv_layout: str,
    k_scale: Scale,
    v_scale: Scale,
    pdl: Optional[bool],
) -> None:
    op = "append_paged_kv_cache"
    key_rows, value_rows = rows
    try:
        key_ptr = key_rows.data_ptr() or checks.no_address(op, "append_key", key_rows)
        value_ptr = value_rows.data_ptr() or checks.no_address(op, "append_value", value_rows)
        k_cache_ptr, v_cache_ptr = paged_cache.addresses(paged_kv_cache)
        if not (k_cache_ptr and v_cache_ptr):
            appending.require_cache(op, paged_kv_cache)
        slot_ptrs, slots_like = appending.identify(op, slots)
        key = (
            kv_layout,
            pdl,
            (key_ptr | value_ptr | k_cache_ptr | v_cache_ptr) & 15,
            *(key_rows.dtype, key_rows.shape, key_rows.stride(), key_rows.device),
            *(value_rows.dtype, value_rows.shape, value_rows.stride(), value_rows.device),
            paged_cache.signature(paged_kv_cache),
            slots_like,
            quant_scale.signature(k_scale),
            quant_scale.signature(v_scale),
        )
        prepared = _appends.get(key)
    except (AttributeError, TypeError, ValueError):
        _prepare_paged(rows, slots, paged_kv_cache, kv_layout, k_scale, v_scale, pdl)  # says what is wrong
        raise
    if prepared is None:
        prepared = _prepare_paged(rows, slots, paged_kv_cache, kv_layout, k_scale, v_scale, pdl)
        _appends.remember(key, prepared)
    addresses = key_ptr, value_ptr, k_cache_ptr, v_cache_ptr + prepared.v_offset, *slot_ptrs
    if prepared.check is not None:
        prepared.check(slots)
    if prepared.converts:
        k_values, v_values = quant_scale.values(k_scale, op, "k_scale"), quant_scale.values(v_scale, op, "v_scale")
        prepared.launch(*addresses, *k_values, *v_values)
    else:
        prepared.launch(*addresses)


def _prepare_paged(
    rows: Rows,
    slots: Slots,
    paged_kv_cache: PagedCache,
    kv_layout: str,
    k_scale: Scale,
    v_scale: Scale,
    pdl: Optional[bool],
) -> _Append:
    op = "append_paged_kv_cache"
    checks.require_flag(op, "enable_pdl", pdl)
    checks.require_tensors(op, append_key=rows[0], append_value=rows[1])
    for name, tensor in zip(("append_key", "append_value"), rows):
        checks.require(
            tensor.dim() == 3,
            op,
            f"{name} has shape {list(tensor.shape)}; expected [nnz, num_kv_heads, head_dim]",
        )
    k_sizes, v_sizes = (
        {"num_kv_heads": (x.shape[1], "the rows have"), "head_dim": (x.shape[2], "the rows have")} for x in rows
    )
    caches = paged_cache.halves(op, paged_kv_cache, kv_layout, k_sizes, v_sizes)
    for tensor in paged_cache.tensors(paged_kv_cache):
        require_distinct(op, "paged_kv_cache", tensor)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _prepare_append(op, rows, caches, slots, scales, paged_cache.v_offset(paged_kv_cache), pdl)


def run_mla(rows: Rows, slots: Slots, ckv_cache: Optional[torch.Tensor], kpe_cache: Optional[torch.Tensor]) -> None:
    op = "append_paged_mla_kv_cache"
    ckv, kpe = rows
    try:
        ckv_ptr = ckv.data_ptr() or checks.no_address(op, "append_ckv", ckv)
        kpe_ptr = kpe.data_ptr() or checks.no_address(op, "append_kpe", kpe)
        device = ckv.device
        ckv_cache_ptr = kpe_cache_ptr = 0
        ckv_cache_like = kpe_cache_like = None
        if ckv_cache is not None:
            ckv_cache_ptr = ckv_cache.data_ptr() or checks.no_address(op, "ckv_cache", ckv_cache)
            ckv_cache_like = ckv_cache.dtype, ckv_cache.shape, ckv_cache.stride(), ckv_cache.device == device
        if kpe_cache is not None:
            kpe_cache_ptr = kpe_cache.data_ptr() or checks.no_address(op, "kpe_cache", kpe_cache)
            kpe_cache_like = kpe_cache.dtype, kpe_cache.shape, kpe_cache.stride(), kpe_cache.device == device
        slot_ptrs, slots_like = appending.identify(op, slots)
        key = (
            (ckv_ptr | kpe_ptr | ckv_cache_ptr | kpe_cache_ptr) & 15,
            *(ckv.dtype, ckv.shape, ckv.stride(), device),
            *(kpe.dtype, kpe.shape, kpe.stride(), kpe.device == device),
            ckv_cache_like,
            kpe_cache_like,
            slots_like,
        )
        prepared = _mla_appends.get(key)
    except (AttributeError, TypeError):
        _prepare_mla(rows, slots, ckv_cache, kpe_cache)  # says what is wrong
        raise
    if prepared is None:
        prepared = _mla_appends.remember(key, _prepare_mla(rows, slots, ckv_cache, kpe_cache))
    if prepared.check is not None:
        prepared.check(slots)
    prepared.launch(ckv_ptr, kpe_ptr, ckv_cache_ptr, kpe_cache_ptr, *slot_ptrs)


def _prepare_mla(
    rows: Rows, slots: Slots, ckv_cache: Optional[torch.Tensor], kpe_cache: Optional[torch.Tensor]
) -> _Append:
    op = "append_paged_mla_kv_cache"
    checks.require_tensors(op, append_ckv=rows[0], append_kpe=rows[1])
    checks.require(
        ckv_cache is not None or kpe_cache is not None, op, "ckv_cache and kpe_cache are both None; pass at least one"
    )
    caches: list[Optional[torch.Tensor]] = []
    first: dict[str, tuple[int, str]] = {}
    for name, tensor, cache in (("ckv", rows[0], ckv_cache), ("kpe", rows[1], kpe_cache)):
        checks.require(
            tensor.dim() == 2, op, f"append_{name} has shape {list(tensor.shape)}; expected [nnz, {name}_dim]"
        )
        if cache is None:
            caches.append(None)
            continue
        checks.require_tensors(op, **{f"{name}_cache": cache})
        axes, sizes = ("pages", "page_size", f"{name}_dim"), {f"{name}_dim": (tensor.shape[1], "the rows have")}
        paged_cache.require_sizes(op, f"{name}_cache", cache, axes, {**first, **sizes}, "pass a cache for these rows")
        checks.require(
            cache.shape[1] > 0, op, f"{name}_cache has pages of no entries; expected a page_size of at least 1"
        )
        checks.require_unit_stride(op, f"{name}_cache", cache)
        require_distinct(op, f"{name}_cache", cache)
        first = {axis: (size, "ckv_cache has") for axis, size in zip(axes[:2], cache.shape)}
        caches.append(cache.unsqueeze(2))
    ckv, kpe = (tensor.unsqueeze(1) for tensor in rows)
    return _prepare_append(op, (ckv, kpe), (caches[0], caches[1]), slots, {}, 0, None)


def _prepare_append(
    op: str,
    rows: Rows,
    both_caches: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    slots: Slots,
    scales: dict[str, Scale],
    v_offset: int,
    pdl: Optional[bool],
) -> _Append:
    """Rows `[nnz, num_heads, dim]` of keys and values to caches `[num_pages, page_size, num_heads, dim]`."""
    key, value = rows
    checks.require_dtype_device(op, "the values", value, key, "the keys")
    checks.require(
        value.shape[:2] == key.shape[:2],
        op,
        f"keys and values have shapes {list(key.shape)} and {list(value.shape)}; expected the same rows and heads",
    )
    slot_axes = appending.check(op, slots, key)
    caches = [cache for cache in both_caches if cache is not None]
    for cache in caches:
        checks.require_dtype_device(op, "the cache", cache, caches[0], "the other cache")
    for tensor in rows:
        checks.require_unit_stride(op, "the rows", tensor)
    converts = appending.check_types(op, key, caches[0], scales)
    (num_tokens, num_heads), (num_pages, page_size) = key.shape[:2], caches[0].shape[:2]
    check = functools.partial(appending.require_slots, op, num_pages=num_pages, page_size=page_size)
    prepared = _Append(
        launch=no_launch,
        v_offset=v_offset,
        converts=converts,
        check=check if indices.may_be_visible(*slots) else None,
    )
    if num_tokens * caches[0].numel() * (slots[3].shape[0] - 1) == 0:
        return prepared

    device_index = key.get_device()
    key_dim, value_dim = key.shape[2], value.shape[2]
    dtype, cache_dtype = dtypes.short_name(key.dtype), dtypes.short_name(caches[0].dtype)
    # A vector is read in one type and written in another: each side must be aligned for its own.
    length = math.gcd(key_dim, value_dim)
    vec = min(vec_size(dtype, length, alignment_of(key, value)), vec_size(cache_dtype, length, alignment_of(*caches)))
    if device_index >= 0 and (key_dim + value_dim) // vec > 1024:
        raise UnsupportedConfig(
            f"{op}: {key_dim} + {value_dim} elements in vectors of {vec} need more than 1024 threads; align the rows"
        )
    heads_per_thread = families.heads_per_thread(num_heads)
    spec = families.APPEND_PAGED_KV.spec(
        target.of_device(key.device),
        dtype=dtype,
        cache_dtype=cache_dtype,
        key_dim=key_dim,
        value_dim=value_dim,
        vec_size=vec if device_index >= 0 else 1,
        heads_per_thread=heads_per_thread if device_index >= 0 else 1,
        **slot_axes,
    )
    launcher = default_resolver().load(spec).on(device_index, pdl=pdl)
    groups_per_block = launcher.config.launch.units_per_block
    num_groups = num_tokens * -(-num_heads // heads_per_thread)
    scale_values, scale_fields = appending.scales(converts and bool(scales))
    launch = launcher.prepare(
        (-(-num_groups // groups_per_block), 1, 1),
        {
            **scale_values,
            **appending.bounds(slots, num_pages, page_size),
            **families.strides("key_strides", key.stride()),
            **families.strides("value_strides", value.stride()),
            **families.strides("key_cache_strides", (0,) * 4 if both_caches[0] is None else both_caches[0].stride()),
            **families.strides("value_cache_strides", (0,) * 4 if both_caches[1] is None else both_caches[1].stride()),
            "num_tokens": num_tokens,
            "num_heads": num_heads,
        },
        varying=("key", "value", "key_cache", "value_cache", *appending.FIELDS, *scale_fields),
    )
    return prepared._replace(launch=launch)


paged_door = traced.door(
    "append_paged_kv",
    run_paged,
    {
        **{"rows": traced.together("Tensor key", "Tensor value"), "slots": appending.BUNDLE},
        **{"cache": traced.TENSORS.written(), "kv_layout": "str"},
        **{"k_scale": traced.REAL, "v_scale": traced.REAL, "pdl": "bool?"},
    },
)
mla_door = traced.door(
    "append_paged_mla_kv",
    run_mla,
    {
        **{"rows": traced.together("Tensor ckv", "Tensor kpe"), "slots": appending.BUNDLE},
        **{"ckv_cache": "Tensor(!)?", "kpe_cache": "Tensor(!)?"},
    },
)
