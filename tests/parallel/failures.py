"""Ranks that are left alone: without check the others raise, at the latest when the timeout of the group is over."""

from __future__ import annotations

import os
import time

import pytest
import torch

from flashinfer.errors import ExchangeFailed
from flashinfer.parallel import ContextParallel, all_to_all_heads, ring_prefill
from tests.parallel.kit import Case, Rank

TIMEOUT = 1.0


def _left_alone(on: Rank, dies: bool) -> None:
    parallel = ContextParallel(check=False)
    out, lse = on.draw(3, 4, 32), torch.zeros(3, 4, device=on.device)
    parallel.merge(out, lse)  # so that all are there
    if on.rank == 1:
        if dies:
            os._exit(3)
        time.sleep(2.5 * TIMEOUT)
        return
    begin = time.monotonic()
    with pytest.raises(
        ExchangeFailed, match=rf"the all-gather of {on.size} ranks failed on rank {on.rank}: .*Next step"
    ):
        parallel.merge(out, lse)
    assert time.monotonic() - begin < TIMEOUT + 5
    for exchange in (lambda: all_to_all_heads(on.draw(3, 6, 8)), lambda: ring_prefill(*(on.draw(4, 2, 64),) * 3)):
        with pytest.raises(ExchangeFailed, match=rf"of {on.size} ranks failed"):
            exchange()


def a_rank_dies(on: Rank) -> None:
    _left_alone(on, dies=True)


def a_rank_hangs(on: Rank) -> None:
    _left_alone(on, dies=False)


CASES: dict[str, Case] = {case.__name__: case for case in (a_rank_dies, a_rank_hangs)}
