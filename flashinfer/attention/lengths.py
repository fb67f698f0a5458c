# SPDX-License-Identifier: Apache-2.0
"""The index tensors of a planned batch: where each request's queries, keys and values are.

A plan owns what it was given once it returned, but for index tensors that lie on the device already: those are used in
place. Nothing here waits for the device, unless FLASHINFER_CHECK_INDICES asks for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Optional

import torch

from flashinfer.host import checks, indices
from flashinfer.host.checks import LOWEST_ADDRESS, require

_INT32 = torch.int32
_DENSE = (1,)  # the strides of one dimension without gaps
_STAGED_ALIGNMENT = 4  # int32 entries: every staged tensor starts at a multiple of 16 bytes


class Lengths:
    """The index tensors that kernels read, and what the host knows of their values.

    A tensor that the storage or the operator does not have is None.
    """

    num_tokens = num_kv_rows = -1  # that q, and the KV in rows or pages, must have; -1 where unknown
    mask: Optional[torch.Tensor] = None
    mask_indptr: Optional[torch.Tensor] = None
    sizes: tuple[int, ...]  # of the index tensors that the batch size gives one
    are_in_place: bool  # kernels can read all of them where they are: the common case on a GPU
    # Addresses in the order of PrefillRows, none for decode, whose request i is token i, and behind them a place for
    # what a run may bring besides q; in that of KvIndex; and what planners take.
    row_addresses: tuple[int, ...] = (0,)
    kv_addresses: tuple[int, int, int]
    planner_addresses: tuple[int, ...]

    def __init__(self, held: tuple[torch.Tensor, ...], device_index: int) -> None:
        """held: [qo_indptr,] kv_indptr [, kv_indices, last_page_len]. On the way of every plan, so without loops.
        device_index: as `get_device()` tells it of a tensor on the device that is planned for.

        Raises AttributeError or RuntimeError for something else than dense tensors.
        """
        self.held, num_held = held, len(held)
        if num_held == 2:
            kv_indptr = held[1]
            kv, page, last = kv_indptr.data_ptr(), 0, 0
            sizes: tuple[int, ...] = (kv_indptr.numel(),)
            are_in_place = (
                kv >= LOWEST_ADDRESS
                and kv_indptr.dtype is _INT32
                and kv_indptr.stride() == _DENSE
                and kv_indptr.get_device() == device_index
            )
        else:
            if num_held == 3:
                kv_indptr, pages, last_page_len = held
            else:
                _, kv_indptr, pages, last_page_len = held
            kv, page, last = kv_indptr.data_ptr(), pages.data_ptr(), last_page_len.data_ptr()
            sizes = (kv_indptr.numel(), last_page_len.numel())
            are_in_place = (
                kv >= LOWEST_ADDRESS
                and page >= LOWEST_ADDRESS
                and last >= LOWEST_ADDRESS
                and _INT32 is kv_indptr.dtype is pages.dtype is last_page_len.dtype
                and _DENSE == kv_indptr.stride() == pages.stride() == last_page_len.stride()
                and device_index == kv_indptr.get_device() == pages.get_device() == last_page_len.get_device()
            )
        self.kv_addresses = (kv, last, page)
        if num_held == 3:
            self.planner_addresses, self.sizes, self.are_in_place = (kv, last), sizes, are_in_place
        else:
            qo_indptr = held[0]
            qo = qo_indptr.data_ptr()
            self.row_addresses, self.planner_addresses = (qo, 0, 0, 0), (qo, kv, last)
            self.sizes = (qo_indptr.numel(), *sizes)
            self.are_in_place = (
                are_in_place
                and qo >= LOWEST_ADDRESS
                and qo_indptr.dtype is _INT32
                and qo_indptr.stride() == _DENSE
                and qo_indptr.get_device() == device_index
            )

    @property
    def qo_indptr(self) -> Optional[torch.Tensor]:
        return None if len(self.held) == 3 else self.held[0]

    @property
    def kv_indptr(self) -> torch.Tensor:
        return self.held[1] if len(self.held) == 2 else self.held[-3]

    @property
    def kv_indices(self) -> Optional[torch.Tensor]:
        return None if len(self.held) == 2 else self.held[-2]

    @property
    def last_page_len(self) -> Optional[torch.Tensor]:
        return None if len(self.held) == 2 else self.held[-1]

    def kv_lens(self, page_size: int) -> torch.Tensor:
        """int32 `[batch_size]`, where the index tensors are."""
        num_rows = self.kv_indptr[1:] - self.kv_indptr[:-1]
        if self.last_page_len is None:
            return num_rows
        return torch.where(num_rows > 0, (num_rows - 1) * page_size + self.last_page_len, 0)

    def take_mask(self, op: str, mask: torch.Tensor, mask_indptr: torch.Tensor, page_size: int) -> None:
        """Take note of a custom mask: packed bits, and int32 `[batch_size + 1]` bytes where each request's start."""
        assert self.qo_indptr is not None
        if indices.are_visible(mask, mask_indptr, self.qo_indptr, self.kv_indptr, self.last_page_len):
            num_bits = (self.qo_indptr[1:] - self.qo_indptr[:-1]).long() * self.kv_lens(page_size).long()
            ends = mask_indptr[: len(num_bits)] + (num_bits + 7) // 8
            needed = int(ends.max()) if len(ends) else 0
            if needed > mask.numel():
                raise ValueError(
                    f"{op}: the custom mask ends after {mask.numel()} bytes; the lengths of the plan take {needed}"
                )
            if mask.is_cpu:
                mask, mask_indptr = mask.clone(), mask_indptr.clone()  # the caller may go on to change them
        self.note_mask(mask, mask_indptr)

    def like(self, other: Lengths) -> Lengths:
        """These index tensors, with what is known of others, and the mask of those."""
        self.num_tokens, self.num_kv_rows = other.num_tokens, other.num_kv_rows
        self.keep_mask(other)
        return self

    def keep_mask(self, other: Lengths) -> None:
        if other.mask is not None and other.mask_indptr is not None:
            self.note_mask(other.mask, other.mask_indptr)

    def note_mask(self, mask: torch.Tensor, mask_indptr: torch.Tensor) -> None:
        self.mask, self.mask_indptr = mask, mask_indptr
        self.row_addresses = (self.row_addresses[0], mask.data_ptr(), mask_indptr.data_ptr(), 0)

    def out_of_reach(self, op: str, num_tokens: int, num_kv_rows: int) -> IndexError:
        """The error of a run whose tensors end before the planned index tensors do."""
        if self.num_tokens > num_tokens:
            return IndexError(f"{op}: q has {num_tokens} tokens; the planned qo_indptr ends at {self.num_tokens}")
        if self.kv_indices is None:
            return IndexError(f"{op}: k has {num_kv_rows} rows; the planned kv_indptr ends at {self.num_kv_rows}")
        return IndexError(
            f"{op}: the cache has {num_kv_rows} pages; the planned page numbers go up to {self.num_kv_rows - 1}"
        )


def side_by_side(*lists: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each list of index tensors as one tensor, all copied by one launch."""
    sizes = [sum([part.numel() for part in parts]) for parts in lists]
    return torch.cat([part for parts in lists for part in parts]).split_with_sizes(sizes)


def _check(
    op: str, names: Sequence[str], given: Sequence[torch.Tensor], page_size: int, whole_lengths: bool = False
) -> tuple[int, int]:
    """Check index tensors as far as the host can look at them.

    given, names: [qo_indptr,] kv_indptr [, kv_indices, last_page_len]. whole_lengths: the last are those of requests.

    Returns:
        How many tokens and how many KV rows (ragged) or pages (paged) they reach; -1 where the host does not know.

    Raises:
        TypeError, ValueError, IndexError: saying which entry is off.
    """
    offsets: list[Optional[list[int]]] = []
    for name, tensor in zip(names, given):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected an int32 tensor")
        if tensor.dim() != 1:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected one dimension")
        if tensor.dtype is not torch.int32 and tensor.dtype is not torch.int64:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected int32")
        if name.endswith("indptr"):
            offsets.append(_offsets(op, name, tensor))
    is_paged = len(given) > len(offsets)
    kv_offsets = offsets[-1]
    num_tokens = offsets[0][-1] if len(offsets) == 2 and offsets[0] else -1
    if kv_offsets is None:
        return num_tokens, -1
    if not is_paged:
        return num_tokens, kv_offsets[-1]
    return num_tokens, _check_pages(op, names[-3:], given[-2:], kv_offsets, page_size, whole_lengths)


def _offsets(op: str, name: str, indptr: torch.Tensor) -> Optional[list[int]]:
    """Its values, if the host can look at them; they start at 0 or above and never descend."""
    if not indices.are_visible(indptr) or indptr.numel() == 0:
        return None
    offsets: list[int] = indptr.tolist()
    if offsets[0] < 0 or sorted(offsets) != offsets:
        raise ValueError(f"{op}: {name} must start at 0 or above and never descend; got {offsets[:8]}…")
    if offsets[-1] >= 1 << 31:
        raise ValueError(f"{op}: {name} ends at {offsets[-1]}; expected below 2^31")
    return offsets


def _check_pages(
    op: str,
    names: Sequence[str],
    given: Sequence[torch.Tensor],
    offsets: list[int],
    page_size: int,
    whole_lengths: bool,
) -> int:
    """The pages that a cache must have; -1 where unknown."""
    pages, last = given
    begin, end = offsets[0], offsets[-1]
    if end > pages.shape[0]:
        raise IndexError(
            f"{op}: {names[0]} ends at {end}; expected at most {pages.shape[0]}, the number of entries of {names[1]}"
        )
    if (end - begin) * page_size >= 1 << 31:
        longest = max(after - before for before, after in itertools.pairwise(offsets))
        require(
            longest * page_size < 1 << 31, op, f"a request has {longest} pages of {page_size}; expected below 2^31 rows"
        )
    named, sees_pages = pages[begin:end], indices.are_visible(pages)
    if indices.are_visible(last) and last.shape[0] == len(offsets) - 1:
        lengths: list[int] = last.tolist()
        if whole_lengths:
            for i, (length, before, after) in enumerate(zip(lengths, offsets, offsets[1:])):
                most = (after - before) * page_size
                require(
                    0 <= length <= most, op, f"{names[2]}[{i}] is {length}; expected 0 to {most}, what its pages hold"
                )
            if sees_pages:  # those beyond may be any number
                counts = [-(-length // page_size) for length in lengths]
                named = torch.cat([pages[:0], *(pages[at : at + count] for at, count in zip(offsets, counts))])
        elif lengths and not (min(lengths) >= 1 and max(lengths) <= page_size):
            for i, (length, before, after) in enumerate(zip(lengths, offsets, offsets[1:])):
                if after > before and not 1 <= length <= page_size:
                    raise ValueError(f"{op}: {names[2]}[{i}] is {length}; expected 1 to {page_size}, the page size")
    elif whole_lengths:
        return -1
    if named.numel() == 0:
        return 0
    if not sees_pages:
        return -1
    indices.require_within(op, names[1], named, 0, 1 << 31, "a page number")
    return int(named.max()) + 1


def take(
    op: str,
    names: Sequence[str],
    given: tuple[torch.Tensor, ...],
    device: torch.device,
    page_size: int,
    whole_lengths: bool = False,
    goes_on: bool = False,
) -> Lengths:
    """Index tensors that are checked first, as far as the host can look at them: as contiguous int32 on the device,
    themselves where they are that, else copies of our own. goes_on: to `FixedBuffers.fill`, for which the copies may
    be in pinned memory. Raises what `_check` does."""
    num_tokens, num_kv_rows = _check(op, names, given, page_size, whole_lengths)
    taken = _on_device(op, names, given, device, goes_on)
    found = Lengths(taken, -1 if device.index is None else device.index)
    found.num_tokens, found.num_kv_rows = num_tokens, num_kv_rows
    return found


def _on_device(
    op: str, names: Sequence[str], given: tuple[torch.Tensor, ...], device: torch.device, goes_on: bool
) -> tuple[torch.Tensor, ...]:
    if device.type == "cpu":
        for name, tensor in zip(names, given):
            _require_readable(op, name, tensor, device)
        return tuple(tensor.to(torch.int32, copy=True).contiguous() for tensor in given)
    taken = list(given)
    staged = []
    for i, tensor in enumerate(given):
        if tensor.device == device:
            taken[i] = tensor.to(torch.int32).contiguous()
        else:
            _require_readable(op, names[i], tensor, device)
            staged.append(i)
    if staged:
        pinned, places = _pin([given[i] for i in staged])
        copies = pinned if goes_on else pinned.to(device, non_blocking=True)
        for i, (begin, end) in zip(staged, places):
            taken[i] = copies[begin:end]
    return tuple(taken)


def _require_readable(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device and tensor.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {tensor.device}; expected {device} or the CPU")


def _pin(given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Host tensors side by side, for one copy to the device, and where each of them is."""
    places, end = [], 0
    for tensor in given:
        places.append((end, end + tensor.numel()))
        end += -(-tensor.numel() // _STAGED_ALIGNMENT) * _STAGED_ALIGNMENT
    pinned = torch.empty(end, dtype=torch.int32, device="cpu", pin_memory=True)  # ours: see host/uploads.py
    for tensor, (begin, stop) in zip(given, places):
        pinned[begin:stop].copy_(tensor)
    return pinned, places


class FixedBuffers:
    """The caller's index buffers of a wrapper for CUDA graphs: a plan copies into them, a replay reads them."""

    def __init__(self, op: str, device: torch.device, buffers: Mapping[str, Optional[torch.Tensor]]) -> None:
        self._op, self._device = op, device
        self._buffers: dict[str, torch.Tensor] = {}
        for name, buffer in buffers.items():
            if buffer is None:
                raise ValueError(f"{op}: use_cuda_graph=True needs {name}; the graph reads it at every replay")
            if not isinstance(buffer, torch.Tensor):
                raise TypeError(f"{op}: {name} is {type(buffer).__name__}; expected a tensor")
            fits = buffer.dtype == torch.int32 and buffer.device == device
            if not fits or buffer.dim() != 1 or not buffer.is_contiguous():
                raise ValueError(
                    f"{op}: {name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device}; expected contiguous "
                    f"int32 of one dimension on {device}"
                )
            checks.require_addresses(op, **{name: buffer})
            if "indptr" in name and buffer.numel() == 0:
                raise ValueError(f"{op}: {name} is empty; expected batch_size + 1 entries")
            self._buffers[name] = buffer

    def require_room(self, names: Sequence[str], given: Sequence[torch.Tensor]) -> None:
        """Offsets and lengths fix the batch size, page numbers may be fewer than the buffer holds."""
        for name, tensor, (buffer_name, buffer) in zip(names, given, self._buffers.items()):
            if buffer.data_ptr() < LOWEST_ADDRESS:
                checks.require_addresses(self._op, **{buffer_name: buffer})
            if "indices" in name:
                if tensor.numel() > buffer.numel():
                    raise ValueError(
                        f"{self._op}: {buffer_name} holds {buffer.numel()} entries, the plan brings {tensor.numel()}; "
                        "make the buffer as large as the largest plan"
                    )
            elif tensor.numel() != buffer.numel():
                extra = 1 if name.endswith("indptr") else 0
                raise ValueError(
                    f"{self._op}: this wrapper was made for CUDA graphs of batch size {buffer.numel() - extra}, "
                    f"{name} is for {tensor.numel() - extra}; pad with requests that have no tokens and no pages"
                )

    def fill(self, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Copy into the front of the buffers, in stream order, but for values that are the buffer already. Returns what
        kernels read: the buffers, or on the CPU, which has no graphs, the copies, which nobody changes."""
        for buffer, values in zip(self._buffers.values(), given):
            if values.data_ptr() != buffer.data_ptr():
                front = buffer if buffer.numel() == values.numel() else buffer[: values.numel()]
                front.copy_(values, non_blocking=True)
        return tuple(given if self._device.type == "cpu" else self._buffers.values())
