# SPDX-License-Identifier: Apache-2.0
"""Positions of ragged rows, and lengths of the requests of a paged cache: one thread an entry."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import target
from flashinfer.families import page as families
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.memo import Allocate, no_launch
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.jit.spec import Family

_LARGEST = (1 << 31) - 1  # of a length


class _Index(NamedTuple):
    launch: PreparedLaunch
    reads_values: bool  # on the host
    new: Allocate  # an output


_index_launches: memo.Memo[_Index] = memo.Memo()


def trace_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor],
    positions: Optional[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    if batch_indices is None:
        batch_indices = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
    if positions is None:
        positions = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
    _positions_door(append_indptr, seq_lens, nnz, batch_indices, positions)
    return batch_indices, positions


def run_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor],
    positions: Optional[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "get_batch_indices_positions"
    try:
        indptr_ptr = append_indptr.data_ptr() or checks.no_address(op, "append_indptr", append_indptr)
        lens_ptr = seq_lens.data_ptr() or checks.no_address(op, "seq_lens", seq_lens)
        if append_indptr.dtype is not seq_lens.dtype:
            append_indptr, seq_lens = _of_one_type(append_indptr, seq_lens)
            indptr_ptr, lens_ptr = append_indptr.data_ptr(), seq_lens.data_ptr()
        batch_ptr = positions_ptr = 0
        if batch_indices is not None:
            batch_ptr = batch_indices.data_ptr() or checks.no_address(op, "batch_indices", batch_indices)
        if positions is not None:
            positions_ptr = positions.data_ptr() or checks.no_address(op, "positions", positions)
        key = (
            op,
            nnz,
            memo.signature(append_indptr),
            memo.signature(seq_lens),
            None if batch_indices is None else memo.signature(batch_indices),
            None if positions is None else memo.signature(positions),
        )
        prepared = _index_launches.get(key)
    except (AttributeError, TypeError):
        _prepare_positions(op, append_indptr, seq_lens, nnz, batch_indices, positions)  # says what is wrong
        raise
    if prepared is None:
        prepared = _prepare_positions(op, append_indptr, seq_lens, nnz, batch_indices, positions)
        _index_launches.remember(key, prepared)
    launch, reads_values, new = prepared
    if batch_indices is None:
        batch_indices = new()
        batch_ptr = batch_indices.data_ptr()
    if positions is None:
        positions = new()
        positions_ptr = positions.data_ptr()
    if reads_values:
        _require_lengths(op, append_indptr, seq_lens, nnz)
    launch(indptr_ptr, lens_ptr, batch_ptr, positions_ptr)
    return batch_indices, positions


def _prepare_positions(
    op: str,
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor],
    positions: Optional[torch.Tensor],
) -> _Index:
    _check_lengths(op, append_indptr=append_indptr, seq_lens=seq_lens)
    nnz = checks.integer(op, "nnz", nnz, 0)
    for name, output in (("batch_indices", batch_indices), ("positions", positions)):
        if output is not None:
            checks.require_tensors(op, **{name: output})
            checks.check_index(op, name, output, nnz)
            checks.require(output.dtype == torch.int32, op, f"{name} is {output.dtype}; expected torch.int32")
            checks.require_device(op, name, output, append_indptr, "append_indptr")
    counts = {"num_tokens": nnz, "batch_size": seq_lens.shape[0]}
    return _prepare_index(families.TOKEN_POSITIONS, append_indptr, nnz, counts)


def _require_lengths(op: str, append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int) -> None:
    if not indices.are_visible(append_indptr, seq_lens):
        return
    indices.require_offsets(op, "append_indptr", append_indptr, nnz, "nnz")
    ends = append_indptr.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        count = ends[request + 1] - ends[request]
        if not count <= length <= _LARGEST:
            raise ValueError(
                f"{op}: seq_lens[{request}] is {length}; expected {count}, the rows that append_indptr gives request "
                f"{request}, to {_LARGEST}"
            )


def trace_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    out = torch.empty(kv_last_page_len.shape, dtype=torch.int32, device=kv_indptr.device)
    _seq_lens_door(kv_indptr, kv_last_page_len, page_size, out)
    return out


def run_seq_lens(
    kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int, seq_lens: Optional[torch.Tensor] = None
) -> torch.Tensor:
    op = "get_seq_lens"
    try:
        indptr_ptr = kv_indptr.data_ptr() or checks.no_address(op, "kv_indptr", kv_indptr)
        last_ptr = kv_last_page_len.data_ptr() or checks.no_address(op, "kv_last_page_len", kv_last_page_len)
        if kv_indptr.dtype is not kv_last_page_len.dtype:
            kv_indptr, kv_last_page_len = _of_one_type(kv_indptr, kv_last_page_len)
            indptr_ptr, last_ptr = kv_indptr.data_ptr(), kv_last_page_len.data_ptr()
        key = (op, memo.signature(kv_indptr), memo.signature(kv_last_page_len), page_size)
        prepared = _index_launches.get(key)
    except (AttributeError, TypeError):
        _prepare_seq_lens(op, kv_indptr, kv_last_page_len, page_size)  # says what is wrong
        raise
    if prepared is None:
        prepared = _prepare_seq_lens(op, kv_indptr, kv_last_page_len, page_size)
        _index_launches.remember(key, prepared)
    launch, reads_values, new = prepared
    if seq_lens is None:
        seq_lens = new()
    if reads_values:
        _require_pages(op, kv_indptr, kv_last_page_len, page_size)
    launch(indptr_ptr, last_ptr, seq_lens.data_ptr())
    return seq_lens


def _prepare_seq_lens(op: str, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> _Index:
    _check_lengths(op, kv_indptr=kv_indptr, kv_last_page_len=kv_last_page_len)
    counts = {"batch_size": kv_last_page_len.shape[0], "page_size": checks.integer(op, "page_size", page_size, 1)}
    return _prepare_index(families.SEQ_LENS, kv_indptr, counts["batch_size"], counts)


def _require_pages(op: str, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> None:
    if not indices.are_visible(kv_indptr, kv_last_page_len):
        return
    indices.require_offsets(op, "kv_indptr", kv_indptr)
    ends = kv_indptr.tolist()
    for request, last in enumerate(kv_last_page_len.tolist()):
        count = ends[request + 1] - ends[request]
        if count > 0 and not 0 <= last <= page_size:
            raise ValueError(
                f"{op}: kv_last_page_len[{request}] is {last}; expected at most the page_size, {page_size}"
            )
        if count * page_size > _LARGEST:
            raise ValueError(
                f"{op}: request {request} has {count} pages of {page_size}; expected at most {_LARGEST} entries"
            )


def _of_one_type(offsets: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The wider, so that no value is cut, where one is int32 and one int64; whatever else they are is for checks."""
    are_indices = {offsets.dtype, lengths.dtype} == {torch.int32, torch.int64}
    return (offsets.long(), lengths.long()) if are_indices else (offsets, lengths)


def _check_lengths(op: str, **tensors: torch.Tensor) -> None:
    """Offsets `[batch_size + 1]` and lengths `[batch_size]`."""
    checks.require_tensors(op, **tensors)
    (offsets_name, offsets), (lengths_name, lengths) = tensors.items()
    checks.check_index(op, lengths_name, lengths)
    checks.check_index(op, offsets_name, offsets, lengths.shape[0] + 1)
    checks.require_dtype_device(op, lengths_name, lengths, offsets, offsets_name)


def _prepare_index(family: Family, reference: torch.Tensor, num_threads: int, counts: dict[str, int]) -> _Index:
    """A launch of one thread per entry of an output, whose parameters are addresses and then `counts`."""
    launch: PreparedLaunch = no_launch
    if num_threads > 0:
        device_index = reference.get_device()
        spec = family.spec(target.of_device(reference.device), index=str(reference.dtype)[6:])
        launcher = default_resolver().load(spec).on(device_index)
        grid = (-(-num_threads // launcher.config.launch.num_threads), 1, 1)
        addresses = [field[0] for field in launcher.params._fields_ if field[0] not in counts]
        launch = launcher.prepare(grid, counts, varying=addresses)
    new = memo.allocator((num_threads,), torch.int32, reference.device)
    return _Index(launch, indices.may_be_visible(reference), new)


_positions_door = traced.door(
    "batch_indices_positions",
    run_positions,
    {
        **{"append_indptr": "Tensor", "seq_lens": "Tensor", "nnz": "int"},
        **{"batch_indices": "Tensor(!)", "positions": "Tensor(!)"},
    },
)
_seq_lens_door = traced.door(
    "seq_lens",
    run_seq_lens,
    {"kv_indptr": "Tensor", "kv_last_page_len": "Tensor", "page_size": "int", "seq_lens": "Tensor(!)"},
)
