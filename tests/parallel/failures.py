# SPDX-License-Identifier: Apache-2.0
"""Ranks that are left alone: without check the others raise, at the latest when the timeout of the group is over."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from flashinfer.errors import ExchangeFailed
from flashinfer.parallel import ContextParallel, all_to_all_heads, ring_prefill
from tests.kit import PATIENCE_SECONDS
from tests.parallel.kit import Case, Rank


def _left_alone(on: Rank, dies: bool) -> None:
    parallel = ContextParallel(check=False)
    out, lse = on.draw(3, 4, 32), torch.zeros(3, 4, device=on.device)
    parallel.merge(out, lse)  # so that all are there, which may take longer than the timeout from here on
    distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    store = distributed_c10d._get_default_store()
    if on.rank == 1:
        if dies:
            os._exit(3)
        store.wait([f"{rank} is through" for rank in range(on.size) if rank != 1])
        return
    begin = time.monotonic()
    with pytest.raises(
        ExchangeFailed, match=rf"the all-gather of {on.size} ranks failed on rank {on.rank}: .*Next step"
    ):
        parallel.merge(out, lse)
    assert time.monotonic() - begin < PATIENCE_SECONDS / 2, "the timeout that the group began with"
    for exchange in (lambda: all_to_all_heads(on.draw(3, 6, 8)), lambda: ring_prefill(*(on.draw(4, 2, 64),) * 3)):
        with pytest.raises(ExchangeFailed, match=rf"of {on.size} ranks failed"):
            exchange()
    store.set(f"{on.rank} is through", "")


def a_rank_dies(on: Rank) -> None:
    _left_alone(on, dies=True)


def a_rank_hangs(on: Rank) -> None:
    _left_alone(on, dies=False)


CASES: dict[str, Case] = {case.__name__: case for case in (a_rank_dies, a_rank_hangs)}
