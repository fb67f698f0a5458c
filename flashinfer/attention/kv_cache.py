"""The paged KV cache as callers hand it over, and what a kernel needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch

from flashinfer import _op
from flashinfer.errors import UnsupportedConfig

PagedCache = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
LAYOUTS = ("NHD", "HND")


def require_layout(op: str, kv_layout: str) -> None:
    _op.require(kv_layout in LAYOUTS, op, f"kv_layout is {kv_layout!r}; expected 'NHD' or 'HND'")


@dataclass(frozen=True)
class KvStrides:
    """Elements between pages, entries of a page, and heads, in K and in V: the stride fields of AttentionParams."""

    k_page: int
    k_entry: int
    k_head: int
    v_page: int
    v_entry: int
    v_head: int

    @property
    def values(self) -> tuple[int, ...]:
        return (self.k_page, self.k_entry, self.k_head, self.v_page, self.v_entry, self.v_head)


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
            _op.require(
                cache.dim() == 5 and cache.shape[1] == 2,
                op,
                f"paged_kv_cache has shape {shape}; expected {order} or a tuple (k, v) without the axis of 2",
            )
            halves = (cache[:, 0], cache[:, 1])
            self._check(op, "paged_kv_cache", halves[0], self.head_dim_qk, device, skipped_axes=1)
            self._check(op, "paged_kv_cache", halves[1], self.head_dim_vo, device, skipped_axes=1)
        else:
            _op.require(len(cache) == 2, op, f"paged_kv_cache is a tuple of {len(cache)}; expected (k, v)")
            halves = (cache[0], cache[1])
            self._check(op, "the k cache", halves[0], self.head_dim_qk, device)
            self._check(op, "the v cache", halves[1], self.head_dim_vo, device)
        entry, head = (1, 2) if self.layout == "NHD" else (2, 1)
        return KvStrides(*(half.stride(axis) for half in halves for axis in (0, entry, head)))

    def _check(
        self, op: str, name: str, half: torch.Tensor, head_dim: int, device: torch.device, skipped_axes: int = 0
    ) -> None:
        _op.require(half.dim() == 4, op, f"{name} has {half.dim()} dimensions; expected 4")
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
        _op.require(half.dtype == self.dtype, op, f"{name} is {half.dtype}; planned with kv_data_type {self.dtype}")
        _op.require(half.device == device, op, f"{name} is on {half.device}, q on {device}; move them to one device")
        require_rows(op, name, half)


def require_heads(op: str, num_qo_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads <= 0 or num_qo_heads <= 0 or num_qo_heads % num_kv_heads:
        raise UnsupportedConfig(
            f"{op}: num_qo_heads is {num_qo_heads}, num_kv_heads {num_kv_heads}; expected a positive multiple of it"
        )


def require_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    """Dense rows. CUDA kernels copy 16 bytes at a time: there every row must start at a multiple of 16 bytes."""
    _op.require_unit_stride(op, name, tensor)
    if tensor.device.type != "cuda" or tensor.numel() == 0:
        return
    itemsize = tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]) if size > 1]
    if tensor.data_ptr() % 16 or any(stride * itemsize % 16 for stride in strides):
        raise ValueError(
            f"{op}: rows of {name} do not start at multiples of 16 bytes (address % 16 = {tensor.data_ptr() % 16}, "
            f"strides {list(tensor.stride())} elements of {itemsize} bytes); call .contiguous()"
        )
