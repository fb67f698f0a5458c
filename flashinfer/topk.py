# SPDX-License-Identifier: Apache-2.0
"""The largest elements of each row, and where they are.

By PyTorch's selection, which sorts nothing but what it found: no kernel of this library.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Optional

import torch

from flashinfer.host import checks, indices
from flashinfer.host.traced import is_dynamo_compiling

__all__ = ["TopKTieBreak", "top_k", "top_k_page_table_transform", "top_k_ragged_transform"]


class TopKTieBreak(IntEnum):
    """Which of equal elements are taken where not all can be."""

    NONE = 0  # any
    SMALL = 1  # those of smaller index
    LARGE = 2  # those of larger index


def top_k(
    input: torch.Tensor,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[num_rows, k]`, of the input's dtype, and indices `[num_rows, k]`, int64, of each row's k largest.

    Args:
        input: `[num_rows, num_columns]` of fp32, fp16 or bf16, any strides. NaN is larger than everything.
        k: from 1 to num_columns.
        sorted: descending; in any order otherwise.
        deterministic, dsa_graph_safe: change nothing. Equal inputs give equal results on equal devices, and no call
            waits for the device.
        tie_break: of `TopKTieBreak`. SMALL and LARGE select among keys of 64 bits, which costs a pass over such.

    Raises TypeError or ValueError, UnsupportedConfig for another dtype.
    """
    if not is_dynamo_compiling():  # which has tensors without memory
        flags = {"sorted": sorted, "deterministic": deterministic, "dsa_graph_safe": dsa_graph_safe}
        k, tie_break = _checked("top_k", input, k, tie_break, flags)
    input = input.detach()
    if tie_break == TopKTieBreak.NONE:
        values, chosen = torch.topk(input, k, dim=-1, sorted=bool(sorted))
        return values, chosen
    chosen = torch.topk(_keys(input, tie_break), k, dim=-1, sorted=bool(sorted)).indices
    return input.gather(-1, chosen), chosen


def top_k_page_table_transform(
    input: torch.Tensor,
    src_page_table: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    row_to_batch: Optional[torch.Tensor] = None,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Optional[torch.Tensor] = None,
    page_table_row_starts: Optional[torch.Tensor] = None,
    *,
    page_size: int = 1,
    out: Optional[torch.Tensor] = None,
    out_raw_indices: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Where in a paged cache each row's k largest scores lie: lists for sparse attention (`sparse_mla_prefill`).

    Args:
        input: `[num_rows, num_columns]` of fp32, fp16 or bf16: scores of a row's keys. NaN is larger than everything.
        src_page_table: int32 `[batch_size, max_pages]`, the pages of each request.
        lengths: int32 `[num_rows]`; row i has scores in columns `[row_starts[i], row_starts[i] + lengths[i])`.
        k: how many to choose; may be more than there are.
        row_to_batch: int32 `[num_rows]`, the request of each row; by default row i is of request i.
        row_starts: int32 `[num_rows]`; by default 0.
        page_table_row_starts: int32 `[num_rows]`, entries of a row of the page table ahead of its first score; by
            default row_starts, which only pages of one entry allow.
        page_size: scores of a page.
        tie_break: as in `top_k`.
        out, out_raw_indices: int32 `[num_rows, k]`: the result, and the columns chosen, counted from row_starts.
        deterministic, dsa_graph_safe: as in `top_k`.

    Returns:
        int32 `[num_rows, k]`, page * page_size + entry of each score, the largest first; -1 behind the last. out, if it
        is given.

    Raises:
        TypeError or ValueError: a shape, dtype or device does not fit.
        IndexError: on the CPU, a window past the columns, or a score without an entry in the page table; a GPU sees
            what there is, and takes some entry of it.
        UnsupportedConfig: another dtype of input.
    """
    op = "top_k_page_table_transform"
    starts, table_starts = row_starts, row_starts if page_table_row_starts is None else page_table_row_starts
    if not is_dynamo_compiling():
        checks.integer(op, "page_size", page_size, 1, 1 << 30)
        _check_windows(op, input, k, tie_break, (deterministic, dsa_graph_safe), lengths=lengths, row_starts=row_starts,
                       page_table_row_starts=page_table_row_starts, row_to_batch=row_to_batch)  # fmt: skip
        checks.require_tensors(op, src_page_table=src_page_table)
        checks.require_device(op, "src_page_table", src_page_table, input)
        is_table = src_page_table.dim() == 2 and src_page_table.dtype == torch.int32
        checks.require(
            is_table and (row_to_batch is not None or len(src_page_table) >= len(input)), op,
            f"src_page_table is {src_page_table.dtype} {list(src_page_table.shape)}; expected int32 "
            f"[batch_size, max_pages] for {len(input)} rows",
        )  # fmt: skip
        checks.require(
            page_size == 1 or starts is None or page_table_row_starts is not None, op,
            "row_starts counts scores; expected page_table_row_starts, which counts pages, beside it",
        )  # fmt: skip
        for name, given in (("out", out), ("out_raw_indices", out_raw_indices)):
            _check_output(op, name, given, input, k)
        _check_ends(op, input, lengths, starts)
    local, is_chosen = _choose(input, lengths, starts, int(k), tie_break)
    rows = torch.arange(len(input), device=input.device) if row_to_batch is None else row_to_batch.long()
    entries = torch.div(local, page_size, rounding_mode="floor")
    if table_starts is not None:
        entries = entries + table_starts.long()[:, None]
    if not is_dynamo_compiling() and indices.are_visible(src_page_table, lengths, row_starts, table_starts, rows):
        num_requests, width = src_page_table.shape
        indices.require_within(op, "row_to_batch", rows, 0, num_requests, f"the page table's {num_requests} rows")
        used = entries[is_chosen]
        indices.require_within(op, "entries of the page table", used, 0, width, f"the {width} of a row")
    if src_page_table.numel() == 0:
        pages = torch.full_like(local, -1)
        is_chosen = torch.zeros_like(is_chosen)
    else:
        rows = rows.clamp(0, len(src_page_table) - 1)
        pages = src_page_table[rows[:, None], entries.clamp(0, src_page_table.shape[1] - 1)].long()
    result = torch.where(is_chosen, pages * page_size + local % page_size, -1).int()
    if out_raw_indices is not None:
        out_raw_indices.copy_(torch.where(is_chosen, local, -1))
    return result if out is None else out.copy_(result)


def top_k_ragged_transform(
    input: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Where in ragged KV each row's k largest scores lie: `top_k_page_table_transform` without pages.

    Args:
        offsets: int32 `[num_rows]`, the KV row of a row's first score.
        input, lengths, k, tie_break, row_starts, deterministic, dsa_graph_safe: as there.

    Returns:
        int32 `[num_rows, k]`, offset + column of each score, counted from row_starts, the largest first; -1 behind the
        last.

    Raises:
        TypeError or ValueError: a shape, dtype or device does not fit.
        IndexError: on the CPU, a window past the columns.
        UnsupportedConfig: another dtype of input.
    """
    op = "top_k_ragged_transform"
    if not is_dynamo_compiling():
        _check_windows(op, input, k, tie_break, (deterministic, dsa_graph_safe), lengths=lengths, offsets=offsets,
                       row_starts=row_starts)  # fmt: skip
        _check_ends(op, input, lengths, row_starts)
    local, is_chosen = _choose(input, lengths, row_starts, int(k), tie_break)
    return torch.where(is_chosen, local + offsets.long()[:, None], -1).int()


def _choose(
    input: torch.Tensor, lengths: torch.Tensor, starts: Optional[torch.Tensor], k: int, tie_break: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row's window: columns of the k largest, counted from its start, and whether there are so many."""
    input = input.detach()
    num_columns = input.shape[1]
    columns = torch.arange(num_columns, dtype=torch.int64, device=input.device)
    first = torch.zeros_like(lengths).long() if starts is None else starts.long()
    end = first + lengths.long()
    is_seen = (columns >= first[:, None]) & (columns < end[:, None])
    keys = _ordered(input) if tie_break == TopKTieBreak.NONE else _keys(input, tie_break)
    keys = torch.where(is_seen, keys, torch.iinfo(keys.dtype).min)  # below that of any element
    chosen = torch.topk(keys, min(k, num_columns), dim=-1, sorted=True).indices
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]))
    is_chosen = torch.arange(k, device=input.device) < is_seen.sum(dim=-1, keepdim=True)
    return chosen - first[:, None], is_chosen


def _check_windows(
    op: str, input: torch.Tensor, k: int, tie_break: int, flags: tuple[bool, bool], **vectors: Optional[torch.Tensor]
) -> None:
    checks.require_tensors(op, input=input)
    checks.require_supported(op, "input", input, ("fp32", "fp16", "bf16"))
    checks.require(input.dim() == 2, op, f"input is {list(input.shape)}; expected [num_rows, num_columns]")
    for name, flag in zip(("deterministic", "dsa_graph_safe"), flags):
        checks.boolean(op, name, flag)
    checks.integer(op, "k", k, 1)
    checks.integer(op, "tie_break", tie_break, TopKTieBreak.NONE, TopKTieBreak.LARGE)
    for name, vector in vectors.items():
        if vector is None and name in ("row_starts", "page_table_row_starts", "row_to_batch"):
            continue
        if not isinstance(vector, torch.Tensor):
            raise checks.not_tensors(op, **{name: vector})
        checks.require_tensors(op, **{name: vector})
        checks.require(
            vector.dtype == torch.int32 and vector.shape == input.shape[:1], op,
            f"{name} is {vector.dtype} {list(vector.shape)}; expected int32 [{len(input)}], an entry for each row",
        )  # fmt: skip
        checks.require_device(op, name, vector, input)


def _check_ends(op: str, input: torch.Tensor, lengths: torch.Tensor, starts: Optional[torch.Tensor]) -> None:
    """Windows lie within the columns, where the host looks at them."""
    if indices.are_visible(lengths, starts):
        width, ends = input.shape[1], lengths.long()
        if starts is not None:
            starts = torch.where(lengths > 0, starts.long(), 0)
            indices.require_within(op, "row_starts", starts, 0, max(width, 1), f"a column of {width}")
            ends = starts + ends
        name = "lengths" if starts is None else "row_starts + lengths"
        indices.require_within(op, name, ends, -(1 << 31), width + 1, f"the input has {width} columns")


def _check_output(op: str, name: str, tensor: Optional[torch.Tensor], input: torch.Tensor, k: int) -> None:
    if tensor is None:
        return
    checks.require_tensors(op, **{name: tensor})
    checks.require(
        tensor.dtype == torch.int32 and tensor.shape == (len(input), k) and tensor.is_contiguous(), op,
        f"{name} is {tensor.dtype} {list(tensor.shape)}; expected contiguous int32 {[len(input), k]}",
    )  # fmt: skip
    checks.require_device(op, name, tensor, input)


def _checked(op: str, input: torch.Tensor, k: int, tie_break: int, flags: dict[str, bool]) -> tuple[int, int]:
    checks.require_tensors(op, input=input)
    checks.require_supported(op, "input", input, ("fp32", "fp16", "bf16"))
    checks.require(input.dim() == 2, op, f"input is {list(input.shape)}; expected [num_rows, num_columns]")
    for name, flag in flags.items():
        checks.boolean(op, name, flag)
    k = checks.integer(op, "k", k, 1, input.shape[1])
    return k, checks.integer(op, "tie_break", tie_break, TopKTieBreak.NONE, TopKTieBreak.LARGE)


def _ordered(input: torch.Tensor) -> torch.Tensor:
    """Integers of 32 bits in the order of the elements, none of them the least there is."""
    scores = input.float()
    scores = torch.where(scores.isnan(), torch.nan, scores)  # one NaN, above infinity
    bits = scores.view(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # -0 is 0


def _keys(input: torch.Tensor, tie_break: int) -> torch.Tensor:
    """Integers in the order of the elements, equal ones in that of preference; no two alike."""
    ordered = _ordered(input).long()
    columns = torch.arange(input.shape[1], dtype=torch.int64, device=input.device)
    preference = columns if tie_break == TopKTieBreak.LARGE else input.shape[1] - 1 - columns
    return (ordered << 31) | preference
