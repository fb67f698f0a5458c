"""What the operators on paged caches share: geometry of a cache, checks of the tensors that place rows in it,
scales."""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer import _op, _scale
from flashinfer._scale import Scale
from flashinfer.errors import UnsupportedConfig
from flashinfer.kernels._params import DTYPES, FP8_DTYPES

PagedCache = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


def cache_signature(cache: PagedCache) -> tuple[object, ...]:
    if isinstance(cache, torch.Tensor):
        return _op.signature(cache)
    return (*_op.signature(cache[0]), *_op.signature(cache[1]))


def cache_addresses(cache: PagedCache) -> tuple[int, int]:
    """Of K and of V, without making views."""
    if isinstance(cache, torch.Tensor):
        address = cache.data_ptr()
        return address, address + cache.stride(1) * cache.element_size()
    return cache[0].data_ptr(), cache[1].data_ptr()


def split_cache(op: str, cache: PagedCache, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as `[num_pages, page_size, num_kv_heads, head_dim]` views, whatever the layout."""
    _op.require(kv_layout in ("NHD", "HND"), op, f"kv_layout is {kv_layout!r}; expected 'NHD' or 'HND'")
    if isinstance(cache, torch.Tensor):
        _op.require(
            cache.dim() == 5 and cache.shape[1] == 2,
            op,
            f"paged_kv_cache has shape {list(cache.shape)}; expected 5 dimensions, K and V on dim 1, or a (k, v) pair",
        )
        k_cache, v_cache = cache.unbind(1)
    else:
        k_cache, v_cache = cache
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        _op.require(
            tensor.dim() == 4, op, f"{name} has shape {list(tensor.shape)}; expected 4 dimensions ({kv_layout})"
        )
        _op.require_unit_stride(op, name, tensor)
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache


def check_scales(op: str, k_scale: Scale, v_scale: Scale, rows: torch.Tensor, cache: torch.Tensor) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        _op.require(
            rows.dtype != cache.dtype,
            op,
            f"{name} is given, but rows and cache are both {cache.dtype} and nothing is converted; leave it out",
        )
        _scale.check(op, name, scale, rows, "the rows")


def check_index(op: str, name: str, tensor: torch.Tensor, length: Optional[int] = None) -> None:
    """A dense vector of int32 or int64, of the given length."""
    _op.require(
        tensor.dim() == 1 and (length is None or tensor.shape[0] == length),
        op,
        f"{name} has shape {list(tensor.shape)}; expected [{'n' if length is None else length}]",
    )
    _op.require(
        tensor.dtype in (torch.int32, torch.int64), op, f"{name} is {tensor.dtype}; expected torch.int32 or torch.int64"
    )
    _op.require(
        tensor.shape[0] <= 1 or tensor.stride(0) == 1,
        op,
        f"{name} has stride {tensor.stride(0)}; expected 1, call .contiguous()",
    )


def check_slots(
    op: str,
    rows: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> dict[str, str]:
    """Check the tensors that place rows in a cache; the spec axes that follow from them."""
    check_index(op, "batch_indices", batch_indices, rows.shape[0])
    check_index(op, "positions", positions, rows.shape[0])
    check_index(op, "kv_indices", kv_indices)
    check_index(op, "kv_indptr", kv_indptr)
    _op.require(kv_indptr.shape[0] >= 1, op, "kv_indptr is empty; expected [batch_size + 1]")
    _op.require_dtype_device(op, "positions", positions, batch_indices, "batch_indices")
    _op.require_dtype_device(op, "kv_indptr", kv_indptr, kv_indices, "kv_indices")
    _op.require_device(op, "batch_indices", batch_indices, rows, "the rows")
    _op.require_device(op, "kv_indices", kv_indices, rows, "the rows")
    return {"token_index": str(batch_indices.dtype)[6:], "page_index": str(kv_indices.dtype)[6:]}


def cache_strides(cache: Optional[torch.Tensor]) -> tuple[int, int, int]:
    """Strides of pages, slots and heads of a `[num_pages, page_size, num_heads, head_dim]` view."""
    return (0, 0, 0) if cache is None else (cache.stride(0), cache.stride(1), cache.stride(2))


def head_strides(rows: torch.Tensor) -> tuple[int, int]:
    """Strides of tokens and heads of a `[num_tokens, num_heads, head_dim]` view."""
    return rows.stride(0), rows.stride(1)


def alignment_of(*tensors: torch.Tensor) -> int:
    """The bitwise or of the addresses and the strides in bytes, last axes apart: what a vector access must divide."""
    alignment = 0
    for tensor in tensors:
        alignment |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
            alignment |= stride * tensor.element_size() if size > 1 else 0
    return alignment & 15


def check_cache(op: str, name: str, rows: torch.Tensor, cache: torch.Tensor, first: torch.Tensor) -> None:
    num_pages, page_size = first.shape[:2]
    expected = (num_pages, page_size, *rows.shape[1:])
    _op.require(
        cache.shape == expected,
        op,
        f"the {name} cache is {list(cache.shape)} [pages, page_size, heads, head_dim]; expected {list(expected)}",
    )
    _op.require_dtype_device(op, f"the {name} cache", cache, first, "the other cache")
    _op.require_device(op, f"the {name} cache", cache, rows, "the rows")
    _op.require_unit_stride(op, f"the {name} cache", cache)


def check_conversion(op: str, dtype: str, cache_dtype: str) -> None:
    if dtype != cache_dtype and not (dtype in DTYPES and cache_dtype in FP8_DTYPES):
        raise UnsupportedConfig(
            f"{op}: rows are {dtype} and the cache is {cache_dtype}; expected the same dtype, "
            "or fp16, bf16 or fp32 rows and an fp8 cache"
        )
