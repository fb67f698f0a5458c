# SPDX-License-Identifier: Apache-2.0
"""What plans over slices are given: checked, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.parallel.slices import ContiguousSlices, Cut, InterleavedPages, PageTable, Slices, cut

if TYPE_CHECKING:
    from flashinfer.parallel.context import ContextParallel

OP = "context_parallel"
PLACEMENTS = ("interleaved", "contiguous")
Lengths = Union[torch.Tensor, list[int]]

# Options of plan() that depend on where a key is in its request, which a rank's wrapper cannot know.
_BY_POSITION = {"pos_encoding_mode": "NONE", "window_left": -1, "window_right": -1, "q_len_per_req": 1}


def refuse_positions(options: dict[str, Any], others: tuple[str, ...] = ()) -> None:
    for name, neutral in {**_BY_POSITION, **dict.fromkeys(others)}.items():
        value = options.get(name, neutral)
        if value is not None and (isinstance(value, torch.Tensor) or value != neutral):
            got = "a tensor" if isinstance(value, torch.Tensor) else f"{value!r:.60}"
            raise UnsupportedConfig(
                f"{OP}: {name} is {got}; expected {neutral!r}, as a rank's wrapper does not know where in its request "
                "a key stands. Next step: rotate q and k before; several queries a request are ContextParallel.append()"
            )


def host_lens(name: str, given: Optional[Lengths], count: Optional[int] = None) -> torch.Tensor:
    """int64 `[batch_size]`, on the host."""
    checks.require(given is not None, OP, f"{name} is None; expected the lengths of whole requests, one each")
    if isinstance(given, torch.Tensor):
        checks.require(given.is_cpu, OP, f"{name} is on {given.device}; expected the CPU, where slices are cut")
    lens = torch.as_tensor(given, device="cpu")
    checks.require(
        lens.dim() == 1 and not lens.is_floating_point() and (count is None or len(lens) == count), OP,
        f"{name} is {lens.dtype} {list(lens.shape)}; expected integers [{'batch_size' if count is None else count}]",
    )  # fmt: skip
    return lens.long()


def page_table(tensors: dict[str, torch.Tensor], page_size: int, whole_lengths: bool) -> tuple[torch.Tensor, PageTable]:
    """Lengths of the queries, and the pages of this rank, of index tensors that must be on the host."""
    checks.require_tensors(OP, **tensors)
    for name, tensor in tensors.items():
        checks.require(
            tensor.is_cpu and tensor.dim() == 1 and not tensor.is_floating_point(), OP,
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected integers of one dimension on "
            "the CPU, where causal plans are cut",
        )  # fmt: skip
    qo_indptr, indptr, indices, last = (tensor.long() for tensor in tensors.values())
    names = list(tensors)
    checks.require(
        len(qo_indptr) == len(indptr) == len(last) + 1, OP,
        f"{names[0]}, {names[1]} and {names[3]} have {len(qo_indptr)}, {len(indptr)} and {len(last)} entries; expected "
        "one more of the first two than of the last",
    )  # fmt: skip
    for name, offsets in ((names[0], qo_indptr), (names[1], indptr)):
        checks.require(
            int(offsets[0]) >= 0 and bool((offsets.diff() >= 0).all()), OP,
            f"{name} must start at 0 or above and never descend",
        )  # fmt: skip
    if int(indptr[-1]) > len(indices):
        raise IndexError(f"{OP}: {names[1]} ends at {int(indptr[-1])}; expected at most {len(indices)} pages")
    num_pages = indptr.diff()
    lens = last if whole_lengths else torch.where(num_pages > 0, (num_pages - 1) * page_size + last, 0)
    least = torch.where(num_pages > 0, (num_pages - 1) * page_size + 1, 0) if not whole_lengths else 0
    fits = (lens >= least) & (lens <= num_pages * page_size)
    if not fits.all():
        i = int((~fits).nonzero()[0])
        raise ValueError(f"{OP}: {names[3]}[{i}] is {int(last[i])}; it does not fit {int(num_pages[i])} pages")
    return qo_indptr.diff(), PageTable(indptr, indices, lens, page_size)


def cut_batch(
    parallel: ContextParallel,
    qo_lens: torch.Tensor,
    table: PageTable,
    kv_lens: Optional[Lengths],
    kv_starts: Optional[Lengths],
    always_split: bool,
) -> Cut:
    whole = host_lens("kv_lens", kv_lens, len(qo_lens))
    wrong = qo_lens > whole
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{OP}: request {i} has {int(qo_lens[i])} queries and {int(whole[i])} keys; expected the keys of its "
            "queries among them, as they are causal"
        )
    return cut(qo_lens, table, whole, _slices(parallel, table, whole, kv_starts), always_split)


def _slices(parallel: ContextParallel, table: PageTable, kv_lens: torch.Tensor, kv_starts: Optional[Lengths]) -> Slices:
    """Of a plan with queries that see each other causally. Raises ValueError where the pages are not as placed."""
    if parallel.placement == "contiguous":
        checks.require(kv_starts is not None, OP, "kv_starts is None; expected where in its request each slice begins")
        starts = host_lens("kv_starts", kv_starts, len(kv_lens))
        wrong = (table.lens > 0) & ((starts < 0) | (starts + table.lens > kv_lens))
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"{OP}: request {i} has {int(kv_lens[i])} keys, of which rank {parallel.rank} has "
                f"{int(table.lens[i])} from {int(starts[i])} on; expected a slice of them"
            )
        return ContiguousSlices(starts, table.lens)
    checks.require(kv_starts is None, OP, "kv_starts is given; expected None of interleaved pages")
    slices = InterleavedPages(table.page_size, parallel.world_size, parallel.rank)
    expected = slices.count(kv_lens)
    wrong = expected != table.lens
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{OP}: rank {parallel.rank} has {int(table.lens[i])} keys of request {i}; expected {int(expected[i])} of "
            f"{int(kv_lens[i])}, as page p is on rank p mod {parallel.world_size}"
        )
    return slices
