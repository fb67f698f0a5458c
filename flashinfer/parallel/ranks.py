# SPDX-License-Identifier: Apache-2.0
"""The ranks of a group, and collectives that say what to do when they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.distributed as dist

from flashinfer.errors import ExchangeFailed

# Which torch 2.13 renamed.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """A process group as this rank sees it.

    Raises ValueError where torch.distributed is not initialized or this process is not of the group.
    """

    def __init__(self, op: str, group: Optional[dist.ProcessGroup]) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{op}: torch.distributed is not initialized; call init_process_group() first")
        self.op = op
        found = dist.group.WORLD if group is None else group
        if not isinstance(found, dist.ProcessGroup):
            raise ValueError(
                f"{op}: group is {type(group).__name__} on rank {dist.get_rank()}; expected a process group that this "
                "rank is of"
            )
        self.group = found
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def run(self, name: str, collective: Callable[..., Any], *tensors: torch.Tensor, async_op: bool = False) -> Any:
        """A collective of torch.distributed; the handle of one that is asynchronous."""
        with self.telling(name):
            return collective(*tensors, group=self.group, async_op=async_op)

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        """Turn what a collective raises into ExchangeFailed."""
        try:
            yield
        except RuntimeError as error:  # of every backend
            raise ExchangeFailed(
                f"{self.op}: the {name} of {self.size} ranks failed on rank {self.rank}: {str(error).strip():.300}. "
                "Expected every rank to take part with the same shapes; one raised or died before it, or was later "
                "than the timeout of the group. Next step: the first error in the logs of the other ranks; "
                "ContextParallel(check=True) has them compare what they exchange"
            ) from error

    def agree(self, what: str, device: torch.device, error: Optional[BaseException], facts: Mapping[str, int]) -> None:
        """Tell the others whether this rank failed, and compare facts: one small all-gather that the host waits for.

        Raises the error of this rank, or ExchangeFailed where another one failed or the facts differ.
        """
        mine = torch.tensor([error is not None, *facts.values()], dtype=torch.int64, device=device)
        every = torch.empty(self.size * len(mine), dtype=torch.int64, device=device)
        try:
            self.run("comparison", all_gather, every, mine)
        except ExchangeFailed:
            if error is None:
                raise
        if error is not None:
            raise error
        rows = every.view(self.size, -1).tolist()
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if failed:
            raise ExchangeFailed(
                f"{self.op}: {what} failed on rank {', '.join(map(str, failed))} of {self.size}; this is rank "
                f"{self.rank}. Next step: the error there"
            )
        for i, name in enumerate(facts, 1):
            found = [row[i] for row in rows]
            if len(set(found)) > 1:
                raise ExchangeFailed(f"{self.op}: {what}: ranks 0 to {self.size - 1} have {name} {found}; expected one")
