# SPDX-License-Identifier: Apache-2.0
"""Appending rows to a paged cache: where they go (the host's side of csrc/page/token_slots.cuh), and as what type."""

from __future__ import annotations

import torch

from flashinfer import dtypes
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.layout import DTYPES, FP8_DTYPES
from flashinfer.families.page import TOKEN_SLOTS
from flashinfer.host import checks, indices, quant_scale, traced
from flashinfer.host.paged_cache import PagedCache, tensors
from flashinfer.host.quant_scale import Scale

# batch_indices, positions, kv_indices, kv_indptr. Row i belongs to request b = batch_indices[i], which has positions[i]
# rows before it and the pages kv_indices[kv_indptr[b]:kv_indptr[b + 1]]. A negative number among the first three marks
# that there is nothing: a row of padding, a page that is not there.
Slots = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

NAMES = ("batch_indices", "positions", "kv_indices", "kv_indptr")
FIELDS = tuple(f"slots.{field[0]}" for field in TOKEN_SLOTS)
BUNDLE = traced.together(*(f"Tensor {name}" for name in NAMES))


def identify(op: str, slots: Slots) -> tuple[tuple[int, int, int, int], tuple[object, ...]]:
    """Addresses, the fields of `TokenSlots`, and what a prepared launch depends on."""
    batch_indices, positions, kv_indices, kv_indptr = slots
    device = batch_indices.device  # of all of them, or the call is refused
    return (
        batch_indices.data_ptr() or checks.no_address(op, "batch_indices", batch_indices),
        positions.data_ptr() or checks.no_address(op, "positions", positions),
        kv_indices.data_ptr() or checks.no_address(op, "kv_indices", kv_indices),
        kv_indptr.data_ptr() or checks.no_address(op, "kv_indptr", kv_indptr),
    ), (
        batch_indices.dtype, batch_indices.shape, batch_indices.stride(), device,
        positions.dtype, positions.shape, positions.stride(), positions.device == device,
        kv_indices.dtype, kv_indices.shape, kv_indices.stride(), kv_indices.device == device,
        kv_indptr.dtype, kv_indptr.shape, kv_indptr.stride(), kv_indptr.device == device,
    )  # fmt: skip


def require_cache(op: str, cache: PagedCache) -> None:
    """For a cache of which an address is 0: raises UnsupportedConfig unless that is of an empty tensor."""
    for tensor in tensors(cache):
        checks.require_addresses(op, paged_kv_cache=tensor)


def check(op: str, slots: Slots, rows: torch.Tensor) -> dict[str, str]:
    """Check all but the values; the spec axes that follow."""
    checks.require_tensors(op, **dict(zip(NAMES, slots)))
    batch_indices, positions, kv_indices, kv_indptr = slots
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


def check_types(op: str, rows: torch.Tensor, cache: torch.Tensor, scales: dict[str, Scale]) -> bool:
    """Check the dtype of a cache, and scales, against rows; whether rows are converted."""
    dtype, cache_dtype = dtypes.short_name(rows.dtype), dtypes.short_name(cache.dtype)
    if dtype != cache_dtype and not (dtype in DTYPES and cache_dtype in FP8_DTYPES):
        raise UnsupportedConfig(
            f"{op}: rows are {dtype} and the cache is {cache_dtype}; expected the same dtype, "
            "or fp16, bf16 or fp32 rows and an fp8 cache"
        )
    checks.require_device(op, "the cache", cache, rows, "the rows")
    for name, scale in scales.items():
        checks.require(
            scale is None or dtype != cache_dtype,
            op,
            f"{name} is given, but rows and cache are both {cache.dtype} and nothing is converted; leave it out",
        )
        quant_scale.check(op, name, scale, rows.device, "the rows")
    return dtype != cache_dtype


def scales(converts: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    """The fields key_scale and value_scale: values where nothing is converted and no kernel reads them, else names of
    what varies from call to call."""
    fields = ("key_scale", "value_scale")
    if converts:
        return {}, tuple(name for field in fields for name in quant_scale.names(field))
    return {name: value for field in fields for name, value in quant_scale.constants(field).items()}, ()


def bounds(slots: Slots, num_pages: int, page_size: int) -> dict[str, int]:
    """The fields of SlotBounds (csrc/page/params.h)."""
    return {
        "bounds.batch_size": slots[3].shape[0] - 1,
        "bounds.num_page_indices": slots[2].shape[0],
        "bounds.num_pages": num_pages,
        "bounds.page_size": page_size,
    }


def are_filled(slots: Slots) -> torch.Tensor:
    """Which rows are no padding."""
    return (slots[0] >= 0) & (slots[1] >= 0)


def require_slots(op: str, slots: Slots, num_pages: int, page_size: int) -> None:
    """Check the values: every row that is no padding has a slot. Raises IndexError or ValueError.

    Over lists: at a hundred rows that is some ten times faster than the two dozen tensor operations it would take, and
    from a GPU four copies.
    """
    if not indices.are_visible(*slots):
        return
    batch_indices, positions, kv_indices, kv_indptr = slots
    indices.require_offsets(op, "kv_indptr", kv_indptr, kv_indices.shape[0], "the length of kv_indices")
    batch_size, indptr = kv_indptr.shape[0] - 1, kv_indptr.tolist()
    # Page tables may be far longer than what a call follows of them: entry by entry only where one of them is wrong.
    are_pages = kv_indices.numel() == 0 or kv_indices.max().item() < num_pages
    pages = [] if are_pages else kv_indices.tolist()
    for row, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist())):
        if request < 0 or position < 0:
            continue
        if request >= batch_size:
            raise IndexError(
                f"{op}: batch_indices[{row}] is {request}; expected below {batch_size}, the requests of kv_indptr, or "
                "-1 for a row of padding"
            )
        entry = indptr[request] + position // page_size
        if entry >= indptr[request + 1]:
            count = indptr[request + 1] - indptr[request]
            raise IndexError(
                f"{op}: positions[{row}] is {position}; expected below {count * page_size}: request {request} has "
                f"{count} pages of {page_size}"
            )
        if pages and pages[entry] >= num_pages:
            raise IndexError(
                f"{op}: kv_indices[{entry}] is {pages[entry]}; expected below {num_pages}, the pages of the cache "
                f"(position {position} of request {request})"
            )
