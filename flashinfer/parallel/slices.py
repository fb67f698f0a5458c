# SPDX-License-Identifier: Apache-2.0
"""Which keys of a request a rank has, and what its queries may see of them.

A rank's wrapper numbers the keys that it has from 0, so that neither the end of its keys nor a causal mask over them is
where the request's are. `cut` says what to do about that: a plan without a mask where all queries see all local keys, a
causal one where the hidden keys are the last of the request, else two: over the pages that all queries see whole, and
over the few behind them, whose visible keys are counted query by query.

Everything here is on the host, in int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch

from flashinfer.host.uploads import upload


@dataclass(frozen=True)
class InterleavedPages:
    """Page p of every request is on rank p mod num_ranks."""

    page_size: int
    num_ranks: int
    rank: int

    def count(self, lens: torch.Tensor) -> torch.Tensor:
        """How many of the first `lens` keys of a request are here."""
        turn = self.page_size * self.num_ranks
        return lens // turn * self.page_size + (lens % turn - self.rank * self.page_size).clamp(0, self.page_size)


@dataclass(frozen=True)
class ContiguousSlices:
    """Keys [starts, starts + lens) of each request are here. int64 `[batch_size]`, or with one column a request."""

    starts: torch.Tensor
    lens: torch.Tensor

    def count(self, lens: torch.Tensor) -> torch.Tensor:
        return torch.minimum((lens - self.starts).clamp(min=0), self.lens)

    def of(self, requests: torch.Tensor) -> ContiguousSlices:
        return ContiguousSlices(self.starts[requests], self.lens[requests])


Slices = Union[InterleavedPages, ContiguousSlices]


@dataclass(frozen=True)
class PageTable:
    """Of a rank: int64, on the host."""

    indptr: torch.Tensor  # [batch_size + 1]
    indices: torch.Tensor
    lens: torch.Tensor  # [batch_size], keys
    page_size: int

    @property
    def num_pages(self) -> torch.Tensor:
        return self.indptr.diff()

    @property
    def last_page_len(self) -> torch.Tensor:
        return (self.lens - 1) % self.page_size + 1

    def pages(self, requests: torch.Tensor, first: torch.Tensor, lens: torch.Tensor) -> PageTable:
        """The table of a batch whose entry i has `lens[i]` keys of request `requests[i]`, from page `first[i]` on."""
        counts = -(-lens // self.page_size)
        indptr = offsets(counts)
        places = torch.repeat_interleave(self.indptr[requests] + first - indptr[:-1], counts)
        return PageTable(indptr, self.indices[places + torch.arange(len(places))], lens, self.page_size)


def offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


@dataclass(frozen=True)
class Cut:
    """What a rank plans for queries that see each other causally."""

    mask: str  # of all local keys: "none" or "causal"; "split": the two tables below
    old: Optional[PageTable] = None  # seen whole by all queries of their request
    recent: Optional[PageTable] = None  # the rest
    counts: Optional[torch.Tensor] = None  # [num_tokens] of them, how many each query sees: the first so many
    requests: Optional[torch.Tensor] = None  # [num_tokens] whose query it is
    is_aligned: bool = False  # a causal mask over the recent keys hides what it should


def cut(qo_lens: torch.Tensor, table: PageTable, kv_lens: torch.Tensor, slices: Slices, always_split: bool) -> Cut:
    """qo_lens, kv_lens: `[batch_size]` of whole requests, the queries being the last tokens of each. always_split: for
    plans that a captured graph follows, whose launches are then the same for all lengths."""
    local, page_size = table.lens, table.page_size
    seen_by_first = torch.where(qo_lens > 0, slices.count((kv_lens - qo_lens + 1).clamp(min=0)), local)
    hidden = local - seen_by_first
    is_whole = hidden == 0
    # Local keys that are the last of their request, or of which the first query sees none.
    is_aligned = (hidden == qo_lens - 1) | ((seen_by_first == 0) & (slices.count(kv_lens - local) == 0))
    if not always_split:
        if is_whole.all():
            return Cut("none")
        if is_aligned.all():
            return Cut("causal")
    old_lens = torch.where(is_whole, local, seen_by_first // page_size * page_size)
    everyone, first = torch.arange(len(local)), torch.zeros_like(local)
    requests = torch.repeat_interleave(everyone, qo_lens)
    positions = torch.arange(len(requests)) + (kv_lens - offsets(qo_lens)[1:])[requests]
    by_token = slices.of(requests) if isinstance(slices, ContiguousSlices) else slices
    counts = torch.where(is_whole[requests], 0, by_token.count(positions + 1) - old_lens[requests])
    return Cut(
        "split",
        table.pages(everyone, first, old_lens),
        table.pages(everyone, old_lens // page_size, torch.where(is_whole, 0, local - old_lens)),
        counts,
        requests,
        bool((is_aligned | is_whole).all()) and not always_split,
    )


def mask_of(counts: torch.Tensor, widths: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A custom mask of queries that see the first `counts` of `widths` keys each, flattened: bool, on the device."""
    runs = upload(torch.stack([counts, widths - counts], dim=1).view(-1), device)
    is_seen = torch.arange(len(runs), device=device) % 2 == 0
    return torch.repeat_interleave(is_seen, runs, output_size=int(widths.sum()))
