# SPDX-License-Identifier: Apache-2.0
"""Plans and runs captured over a short batch and replayed over a long one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def replay_long_and_short(
    short: Any,
    long: Any,
    *,
    load: Callable[[Any], None],
    plan: Callable[[Any], object],
    launch: Callable[[], tuple[Tensor, ...]],
    check: Callable[[Any, Any], None],
    max_pages: int,
) -> None:
    """A run captured, planned outside; then a plan and its run captured together. Batches are a kit's, of four requests
    each; what is `load`ed is what the run that is `launch`ed reads, as in an engine, whose buffers stay."""

    def replay(graph: torch.cuda.CUDAGraph, result: tuple[Tensor, ...], batch: Any) -> None:
        for poisoned in result:
            poisoned.fill_(math.nan)
        graph.replay()
        check(batch, result)

    load(short)
    plan(short)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch()
    for batch in (long, short, long):
        load(batch)
        plan(batch)
        replay(graph, result, batch)

    on_device = tuple(torch.zeros(size, dtype=torch.int32, device="cuda") for size in (5, 5, max_pages, 4))
    captured = replace(short, indices=on_device)

    def load_indices(batch: Any) -> None:
        for target, source in zip(on_device, batch.indices):
            target[: len(source)].copy_(source)

    load_indices(short)
    plan(captured)
    both = torch.cuda.CUDAGraph()
    with torch.cuda.graph(both):
        plan(captured)
        result = launch()
    for batch in (long, short):
        load(batch)
        load_indices(batch)
        replay(both, result, batch)
