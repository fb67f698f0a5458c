# SPDX-License-Identifier: Apache-2.0
"""Softmax, filters and speculative sampling in float64 on the CPU, from their definitions."""

from __future__ import annotations

from typing import Optional

import torch


def softmax(logits: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
    logits = logits.to("cpu", torch.float64)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to("cpu", torch.float64).unsqueeze(-1)
    return torch.softmax(logits / temperature, dim=-1)


def larger_than(scores: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element of a row: how many elements have a strictly larger score, and their weight."""
    order = torch.argsort(scores, descending=True, stable=True)
    ordered = scores[order]
    before = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(weights[order], 0)])
    # Position of the first element of each run of equal scores.
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.cummax(torch.where(starts, torch.arange(len(ordered)), 0), 0).values
    count, weight = torch.empty(len(ordered), dtype=torch.int64), torch.empty(len(ordered), dtype=torch.float64)
    count[order], weight[order] = first, before[first]
    return count, weight


def kept(
    scores: torch.Tensor,
    weights: torch.Tensor,
    top_k: Optional[int] = None,
    top_p: Optional[float] = None,
    min_p: Optional[float] = None,
    top_k_first: bool = False,
    slack: float = 0.0,
    larger: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
) -> torch.Tensor:
    """The mask of one row's kept elements.

    `slack` widens (or, negative, narrows) the weight limits by a relative part of the whole: what differs between two
    slacks is undecidable at that precision. `larger` is `larger_than(scores, weights)`, where it is known.
    """
    scores, weights = scores.to("cpu", torch.float64), weights.to("cpu", torch.float64)
    mask = torch.ones_like(scores, dtype=torch.bool)
    count, weight = larger if larger is not None else larger_than(scores, weights)
    if top_k is not None:
        mask &= count < max(top_k, 1)
    if top_p is not None and top_p < 1:
        total = weights[mask].sum() if top_k_first else weights.sum()
        mask &= (weight < (top_p + slack) * total) | (count == 0)
    if min_p is not None:
        mask &= scores >= min_p * (1 - slack) * scores.max()
    return mask
