"""The paged KV cache as callers hand it over: its geometry, what a plan fixed of it, the tensors that place rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.layout import DTYPES, FP8_DTYPES
from flashinfer.host import checks, memo, quant_scale
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import require_rows

PagedCache = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
LAYOUTS = ("NHD", "HND")


def require_layout(op: str, kv_layout: str) -> None:
    checks.require(kv_layout in LAYOUTS, op, f"kv_layout is {kv_layout!r}; expected 'NHD' or 'HND'")


def cache_signature(cache: PagedCache) -> tuple[object, ...]:
    if isinstance(cache, torch.Tensor):
        return memo.signature(cache)
    return (*memo.signature(cache[0]), *memo.signature(cache[1]))


def cache_addresses(cache: PagedCache) -> tuple[int, int]:
    """Of K and of V, without making views."""
    if isinstance(cache, torch.Tensor):
        address = cache.data_ptr()
        return address, address + cache.stride(1) * cache.element_size()
    return cache[0].data_ptr(), cache[1].data_ptr()


def split_cache(op: str, cache: PagedCache, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as `[num_pages, page_size, num_kv_heads, head_dim]` views, whatever the layout."""
    checks.require(kv_layout in ("NHD", "HND"), op, f"kv_layout is {kv_layout!r}; expected 'NHD' or 'HND'")
    if isinstance(cache, torch.Tensor):
        checks.require(
            cache.dim() == 5 and cache.shape[1] == 2,
            op,
            f"paged_kv_cache has shape {list(cache.shape)}; expected 5 dimensions, K and V on dim 1, or a (k, v) pair",
        )
        k_cache, v_cache = cache.unbind(1)
    else:
        k_cache, v_cache = cache
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.require(
            tensor.dim() == 4, op, f"{name} has shape {list(tensor.shape)}; expected 4 dimensions ({kv_layout})"
        )
        checks.require_unit_stride(op, name, tensor)
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache


def check_scales(op: str, k_scale: Scale, v_scale: Scale, rows: torch.Tensor, cache: torch.Tensor) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        checks.require(
            rows.dtype != cache.dtype,
            op,
            f"{name} is given, but rows and cache are both {cache.dtype} and nothing is converted; leave it out",
        )
        quant_scale.check(op, name, scale, rows, "the rows")


def check_slots(
    op: str,
    rows: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> dict[str, str]:
    """Check the tensors that place rows in a cache; the spec axes that follow from them."""
    checks.check_index(op, "batch_indices", batch_indices, rows.shape[0])
    checks.check_index(op, "positions", positions, rows.shape[0])
    checks.check_index(op, "kv_indices", kv_indices)
    checks.check_index(op, "kv_indptr", kv_indptr)
    checks.require(kv_indptr.shape[0] >= 1, op, "kv_indptr is empty; expected [batch_size + 1]")
    checks.require_dtype_device(op, "positions", positions, batch_indices, "batch_indices")
    checks.require_dtype_device(op, "kv_indptr", kv_indptr, kv_indices, "kv_indices")
    checks.require_device(op, "batch_indices", batch_indices, rows, "the rows")
    checks.require_device(op, "kv_indices", kv_indices, rows, "the rows")
    return {"token_index": str(batch_indices.dtype)[6:], "page_index": str(kv_indices.dtype)[6:]}


def cache_strides(field: str, cache: Optional[torch.Tensor]) -> dict[str, int]:
    """A field of CacheStrides (csrc/page/params.h): of a `[num_pages, page_size, num_heads, head_dim]` view."""
    page, slot, head = (0, 0, 0) if cache is None else cache.stride()[:3]
    return {f"{field}.page": page, f"{field}.slot": slot, f"{field}.head": head}


def head_strides(field: str, rows: torch.Tensor) -> dict[str, int]:
    """A field of HeadStrides (csrc/page/params.h): of a `[num_tokens, num_heads, head_dim]` view."""
    return {f"{field}.token": rows.stride(0), f"{field}.head": rows.stride(1)}


def check_cache(op: str, name: str, rows: torch.Tensor, cache: torch.Tensor, first: torch.Tensor) -> None:
    num_pages, page_size = first.shape[:2]
    expected = (num_pages, page_size, *rows.shape[1:])
    checks.require(
        cache.shape == expected,
        op,
        f"the {name} cache is {list(cache.shape)} [pages, page_size, heads, head_dim]; expected {list(expected)}",
    )
    checks.require_dtype_device(op, f"the {name} cache", cache, first, "the other cache")
    checks.require_device(op, f"the {name} cache", cache, rows, "the rows")
    checks.require_unit_stride(op, f"the {name} cache", cache)


def check_conversion(op: str, dtype: str, cache_dtype: str) -> None:
    if dtype != cache_dtype and not (dtype in DTYPES and cache_dtype in FP8_DTYPES):
        raise UnsupportedConfig(
            f"{op}: rows are {dtype} and the cache is {cache_dtype}; expected the same dtype, "
            "or fp16, bf16 or fp32 rows and an fp8 cache"
        )


@dataclass(frozen=True)
class KvStrides:
    """Elements between pages, entries of a page, and heads, in K and in V."""

    k_page: int
    k_entry: int
    k_head: int
    v_page: int
    v_entry: int
    v_head: int

    @property
    def values(self) -> dict[str, int]:
        """The fields of AttentionParams."""
        return {f"kv.{name}_stride": stride for name, stride in vars(self).items()}


@dataclass(frozen=True)
class PagedKv:
    """What a plan fixed about a paged cache. NHD: `[pages, page_size, num_kv_heads, head_dim]`; HND: heads first."""

    layout: str
    page_size: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: torch.dtype

    def strides_of(self, op: str, cache: PagedCache, device: torch.device) -> KvStrides:
        """Check a cache against the plan. Raises ValueError saying which dimension, dtype, stride or device is off."""
        if isinstance(cache, torch.Tensor):
            order = "[pages, 2, page_size, num_kv_heads, head_dim]"
            if self.layout == "HND":
                order = "[pages, 2, num_kv_heads, page_size, head_dim]"
            shape = list(cache.shape)
            checks.require(
                cache.dim() == 5 and cache.shape[1] == 2,
                op,
                f"paged_kv_cache has shape {shape}; expected {order} or a tuple (k, v) without the axis of 2",
            )
            halves = (cache[:, 0], cache[:, 1])
            self._check(op, "paged_kv_cache", halves[0], self.head_dim_qk, device, skipped_axes=1)
            self._check(op, "paged_kv_cache", halves[1], self.head_dim_vo, device, skipped_axes=1)
        else:
            checks.require(len(cache) == 2, op, f"paged_kv_cache is a tuple of {len(cache)}; expected (k, v)")
            halves = (cache[0], cache[1])
            self._check(op, "the k cache", halves[0], self.head_dim_qk, device)
            self._check(op, "the v cache", halves[1], self.head_dim_vo, device)
        entry, head = (1, 2) if self.layout == "NHD" else (2, 1)
        return KvStrides(*(half.stride(axis) for half in halves for axis in (0, entry, head)))

    def _check(
        self, op: str, name: str, half: torch.Tensor, head_dim: int, device: torch.device, skipped_axes: int = 0
    ) -> None:
        checks.require(half.dim() == 4, op, f"{name} has {half.dim()} dimensions; expected 4")
        names = ("pages", "page_size", "num_kv_heads", "head_dim")
        expected = (half.shape[0], self.page_size, self.num_kv_heads, head_dim)
        if self.layout == "HND":
            names, expected = (
                (names[0], names[2], names[1], names[3]),
                (expected[0], expected[2], expected[1], expected[3]),
            )
        for axis, (axis_name, size) in enumerate(zip(names, expected)):
            if half.shape[axis] != size:
                shown = axis if axis == 0 else axis + skipped_axes
                owner = "q has" if axis_name == "head_dim" else "the plan says"
                raise ValueError(
                    f"{op}: {name} dim {shown} ({axis_name}) is {half.shape[axis]}, {owner} {size}; "
                    f"pass a cache in layout {self.layout} that matches the plan, or plan again"
                )
        checks.require(half.dtype == self.dtype, op, f"{name} is {half.dtype}; planned with kv_data_type {self.dtype}")
        checks.require(half.device == device, op, f"{name} is on {half.device}, q on {device}; move them to one device")
        require_rows(op, name, half)


def require_heads(op: str, num_qo_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads <= 0 or num_qo_heads <= 0 or num_qo_heads % num_kv_heads:
        raise UnsupportedConfig(
            f"{op}: num_qo_heads is {num_qo_heads}, num_kv_heads {num_kv_heads}; expected a positive multiple of it"
        )
