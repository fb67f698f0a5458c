# SPDX-License-Identifier: Apache-2.0
"""Partial attention states of all ranks become the result: what is sent, and which way.

A rank's state S is its outputs and LSE, num_tokens * num_heads * (head_dim * itemsize + 4) bytes. Of W ranks

| wanted    | exchange                    | a rank receives | collectives |
|-----------|-----------------------------|-----------------|-------------|
| all heads | all-gather                  | (W - 1) S       | 1           |
| all heads | all-to-all, then all-gather | 2 (W - 1) / W S | 2           |
| own heads | all-to-all                  | (W - 1) / W S   | 1           |

An all-to-all sends every rank the heads that it merges, the first half of a reduce-scatter whose sum is the merge
kernel; the all-gather behind it sends what was merged. For all heads the two ways cost the same where the bytes that
the first has more, (W - 1)(W - 2) / W S, take as long as the collective that the second has more. Between two ranks
there are none, and the all-gather is the shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.distributed as dist

from flashinfer.attention.merge import merge_list, merge_states
from flashinfer.host import checks
from flashinfer.parallel.ranks import Ranks, all_gather

State = tuple[torch.Tensor, torch.Tensor]  # outputs, LSE
Result = Union[torch.Tensor, State]

# Of H200s over NVLink (docs/notes/2026-11-context-parallel.md): a further collective between two ranks, with the copies
# and the merge around it; what a rank more adds, a step of NCCL's ring; and the rate of messages of a few megabytes.
COLLECTIVE_US, STEP_US, BYTES_PER_US = 15.0, 1.9, 175e3
HEADS = ("all", "own")
_ALIGNMENT = 16


def gather_limit(num_ranks: int) -> float:
    """The largest state, in bytes, that is gathered where all heads are wanted."""
    further_bytes = (num_ranks - 1) * (num_ranks - 2) / num_ranks
    further_us = COLLECTIVE_US + (num_ranks - 2) * STEP_US
    return further_us * BYTES_PER_US / further_bytes if further_bytes else math.inf


@dataclass(frozen=True)
class StateBlock:
    """The layout of a state in bytes: outputs `[num_tokens, num_heads, head_dim]`, then LSE `[num_tokens, num_heads]`,
    each from a multiple of 16 bytes on."""

    num_tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def lse_start(self) -> int:
        return _aligned(self.num_tokens * self.num_heads * self.head_dim * self.dtype.itemsize)

    @property
    def num_bytes(self) -> int:
        return max(self.lse_start + _aligned(self.num_tokens * self.num_heads * 4), _ALIGNMENT)

    def new(self, num_ranks: int, device: torch.device) -> torch.Tensor:
        """uint8 `[num_ranks, num_bytes]`."""
        return torch.empty((num_ranks, self.num_bytes), dtype=torch.uint8, device=device)

    def by_rank(self, blocks: torch.Tensor) -> State:
        """`[num_ranks, num_tokens, num_heads, head_dim]` and `[num_ranks, num_tokens, num_heads]`."""
        values, lse = blocks.view(self.dtype), blocks.view(torch.float32)
        shape = (len(blocks), self.num_tokens, self.num_heads, self.head_dim)
        row = self.num_heads * self.head_dim
        return (
            values.as_strided(shape, (values.stride(0), row, self.head_dim, 1)),
            lse.as_strided(
                shape[:3], (lse.stride(0), self.num_heads, 1), lse.storage_offset() + self.lse_start // 4
            ),
        )  # fmt: skip

    def states(self, blocks: torch.Tensor) -> State:
        """The same as `merge_states` takes them, without a copy."""
        values, lse = self.by_rank(blocks)
        return values.transpose(0, 1), lse.transpose(0, 1)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class Pending:
    """A result whose exchange may still be under way.

    On GPUs nothing here waits on the host: `wait` has the current stream wait for the exchange, and merges. What was
    launched between the call and `wait` runs beside the exchange.
    """

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Optional[Callable[[], Result]] = finish
        self._result: Any = None

    def wait(self) -> Result:
        """The result, as the call without async_op returns it. Raises ExchangeFailed."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None  # and what it holds
        return self._result


def exchange(
    ranks: Ranks,
    block: StateBlock,
    device: torch.device,
    attend: Callable[[torch.Tensor, torch.Tensor], None],
    heads: str,
    return_lse: bool,
    async_op: bool,
) -> Union[Result, Pending]:
    """Have this rank's state written by `attend(out, lse)`, and merge it with those of the others."""
    size = ranks.size
    checks.require(heads in HEADS, ranks.op, f"heads is {heads!r:.60}; expected 'all' or 'own'")
    divides = block.num_heads % size == 0
    checks.require(
        heads == "all" or divides, ranks.op,
        f"heads='own' needs a multiple of {size} heads, one share a rank; got {block.num_heads}",
    )  # fmt: skip
    if size == 1 or block.num_tokens == 0:
        out, lse = (one[0] for one in block.by_rank(block.new(1, device)))
        attend(out, lse)
        if heads == "own":
            out, lse = out[:, : block.num_heads // size], lse[:, : block.num_heads // size]
        return _returned(lambda: (out, lse) if return_lse else out, async_op)

    if heads == "all" and (not divides or block.num_bytes <= gather_limit(size)):
        start = _gather(ranks, block, device, attend, async_op)
    else:
        start = _scatter(ranks, block, device, attend, heads, async_op)

    def finish() -> Result:
        out, lse = start()
        return (out, lse) if return_lse else out

    return _returned(finish, async_op)


def _returned(finish: Callable[[], Result], async_op: bool) -> Union[Result, Pending]:
    return Pending(finish) if async_op else finish()


def _wait(ranks: Ranks, name: str, work: Optional[dist.Work]) -> None:
    if work is not None:
        with ranks.telling(name):
            work.wait()


def _gather(
    ranks: Ranks, block: StateBlock, device: torch.device, attend: Callable[..., None], async_op: bool
) -> Callable[[], State]:
    blocks = block.new(ranks.size, device)
    own = blocks[ranks.rank : ranks.rank + 1]
    out, lse = block.by_rank(own)
    attend(out[0], lse[0])  # where the others will have it
    work = ranks.run("all-gather", all_gather, blocks.view(-1), own.view(-1), async_op=async_op)

    def finish() -> State:
        _wait(ranks, "all-gather", work)
        return merge_states(*block.states(blocks))

    return finish


def _scatter(
    ranks: Ranks, block: StateBlock, device: torch.device, attend: Callable[..., None], heads: str, async_op: bool
) -> Callable[[], State]:
    size = ranks.size
    part = StateBlock(block.num_tokens, block.num_heads // size, block.head_dim, block.dtype)
    out, lse = (one[0] for one in block.by_rank(block.new(1, device)))
    attend(out, lse)
    send, receive = part.new(size, device), part.new(size, device)
    for place, given in zip(part.states(send), (out, lse)):
        place.copy_(given.view(place.shape))
    work = ranks.run(
        "all-to-all", dist.all_to_all_single, receive.view(-1), send.view(-1), async_op=async_op
    )  # fmt: skip

    def finish() -> State:
        _wait(ranks, "all-to-all", work)
        states = part.states(receive)
        if heads == "own":
            return merge_states(*states)
        own = send[ranks.rank : ranks.rank + 1]  # which has been sent
        own_out, own_lse = part.by_rank(own)
        merge_list(ranks.op, *states, None, (own_out[0], own_lse[0]))
        ranks.run("all-gather", all_gather, send.view(-1), own.view(-1))
        merged, merged_lse = part.states(send)
        return merged.reshape(out.shape), merged_lse.reshape(lse.shape)

    return finish
