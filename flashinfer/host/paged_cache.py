# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache as callers hand it over, for every operator that fills or reads one.

It is one tensor with K and V on axis 1, or a pair of tensors; in layout NHD a page is `[page_size, num_kv_heads,
head_dim]`, in HND the first two axes are swapped. Kernels know two addresses and six strides. What lies between is here
and nowhere else: what a memo's key holds (`signature`, `addresses`), where V begins (`v_offset`), and the check of a
cache against what the rows to append, or a plan, say of it (`halves`, `PagedKv`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Union

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, memo
from flashinfer.host.rows import require_rows

PagedCache = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
LAYOUTS = {
    "NHD": ("pages", "page_size", "num_kv_heads", "head_dim"),
    "HND": ("pages", "num_kv_heads", "page_size", "head_dim"),
}
Sizes = Mapping[str, tuple[int, str]]  # axis -> its size and who says so: "the plan says", "q has"


def require_layout(op: str, kv_layout: str) -> None:
    known = isinstance(kv_layout, str) and kv_layout in LAYOUTS
    checks.require(known, op, f"kv_layout is {kv_layout!r:.60}; expected 'NHD' or 'HND'")


def require_heads(op: str, num_qo_heads: int, num_kv_heads: int) -> None:
    checks.integer(op, "num_qo_heads", num_qo_heads)
    checks.integer(op, "num_kv_heads", num_kv_heads)
    if num_kv_heads <= 0 or num_qo_heads <= 0 or num_qo_heads % num_kv_heads:
        raise UnsupportedConfig(
            f"{op}: num_qo_heads is {num_qo_heads}, num_kv_heads {num_kv_heads}; expected a positive multiple of it"
        )


def signature(cache: PagedCache) -> tuple[object, ...]:
    """What a prepared launch depends on, but for the addresses."""
    if isinstance(cache, torch.Tensor):
        return memo.signature(cache)
    k, v = cache
    return (*memo.signature(k), *memo.signature(v))


def addresses(cache: PagedCache) -> tuple[int, int]:
    """Of the tensors that hold K and V. If they are one, V lies `v_offset` behind, which its signature settles."""
    if isinstance(cache, torch.Tensor):
        address = cache.data_ptr()
        return address, address
    k, v = cache
    return k.data_ptr(), v.data_ptr()


def tensors(cache: PagedCache) -> tuple[torch.Tensor, ...]:
    return (cache,) if isinstance(cache, torch.Tensor) else tuple(cache)


def v_offset(cache: PagedCache) -> int:
    """Bytes from the address of the tensor that holds V to V."""
    return cache.stride(1) * cache.element_size() if isinstance(cache, torch.Tensor) else 0


def halves(
    op: str, cache: PagedCache, kv_layout: str, k_sizes: Sizes, v_sizes: Sizes, hint: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as `[num_pages, page_size, num_kv_heads, head_dim]` views, whatever the layout.

    Raises TypeError or ValueError, saying which dimension, dtype, device or stride is off; `hint` ends what it says of
    a size.
    """
    require_layout(op, kv_layout)
    axes = LAYOUTS[kv_layout]
    hint = f"pass a cache in layout {kv_layout}{hint}"
    if isinstance(cache, torch.Tensor):
        checks.require_tensors(op, paged_kv_cache=cache)
        checks.require(
            cache.dim() == 5 and cache.shape[1] == 2,
            op,
            f"paged_kv_cache has shape {list(cache.shape)}; expected [pages, 2, {', '.join(axes[1:])}], K and V on "
            "dim 1, or a pair (k, v) of tensors without it",
        )
        own_axes = (axes[0], "K and V", *axes[1:])
        for sizes in (k_sizes, v_sizes):
            require_sizes(op, "paged_kv_cache", cache, own_axes, sizes, hint)
        k, v = cache.unbind(1)
        checks.require_unit_stride(op, "paged_kv_cache", k)
    else:
        is_pair = isinstance(cache, (tuple, list)) and len(cache) == 2
        given = f"a {type(cache).__name__}{f' of {len(cache)}' if isinstance(cache, (tuple, list)) else ''}"
        if not is_pair:
            raise TypeError(f"{op}: paged_kv_cache is {given}; expected a tensor or a pair (k, v) of tensors")
        k, v = cache
        checks.require_tensors(op, k_cache=k, v_cache=v)
        require_sizes(op, "the k cache", k, axes, k_sizes, hint)
        of_k = dict(zip(axes, k.shape))
        as_k = {axis: (of_k[axis], "the k cache has") for axis in ("pages", "page_size")}
        require_sizes(op, "the v cache", v, axes, {**as_k, **v_sizes}, hint)
        checks.require_dtype_device(op, "the v cache", v, k, "the k cache")
        checks.require_unit_stride(op, "the k cache", k)
        checks.require_unit_stride(op, "the v cache", v)
    if kv_layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    checks.require(
        k.shape[1] > 0, op, "the pages of paged_kv_cache have no entries; expected a page_size of at least 1"
    )
    return k, v


def require_sizes(op: str, name: str, tensor: torch.Tensor, axes: tuple[str, ...], sizes: Sizes, hint: str) -> None:
    """The axes of a tensor, by name, have the sizes that are given for them."""
    checks.require(
        tensor.dim() == len(axes), op, f"{name} has shape {list(tensor.shape)}; expected [{', '.join(axes)}]"
    )
    for dim, (axis, size) in enumerate(zip(axes, tensor.shape)):
        expected, owner = sizes.get(axis, (size, ""))
        checks.require(size == expected, op, f"{name} dim {dim} ({axis}) is {size}, {owner} {expected}; {hint}")


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
    """What a plan fixed about a paged cache."""

    layout: str
    page_size: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: torch.dtype

    def strides_of(self, op: str, cache: PagedCache, device: torch.device) -> KvStrides:
        """Check a cache against the plan. Raises TypeError or ValueError saying which dimension, dtype, stride or
        device is off."""
        planned: Sizes = {
            "page_size": (self.page_size, "the plan says"),
            "num_kv_heads": (self.num_kv_heads, "the plan says"),
        }
        k_sizes, v_sizes = (
            {**planned, "head_dim": (head_dim, "q has")} for head_dim in (self.head_dim_qk, self.head_dim_vo)
        )
        k, v = halves(op, cache, self.layout, k_sizes, v_sizes, " that matches the plan, or plan again")
        names = ("paged_kv_cache",) * 2 if isinstance(cache, torch.Tensor) else ("the k cache", "the v cache")
        for name, half in zip(names, (k, v)):
            checks.require(
                half.dtype == self.dtype, op, f"{name} is {half.dtype}; planned with kv_data_type {self.dtype}"
            )
            checks.require(
                half.device == device, op, f"{name} is on {half.device}, q on {device}; move them to one device"
            )
            require_rows(op, name, half)
        return KvStrides(*k.stride()[:3], *v.stride()[:3])
