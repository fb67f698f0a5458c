"""The values of index tensors: page tables, offsets, positions.

A kernel follows an index wherever it points. The host looks at the values where that takes no waiting, which is on the
CPU: there each call checks them, and a wrong one is an IndexError or a ValueError. Of tensors on a GPU it knows shapes
alone: kernels write nothing outside of the tensors they were given, and FLASHINFER_CHECK_INDICES=1 makes the host look.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch

from flashinfer import env

_checks_devices = functools.cache(env.CHECK_INDICES.get)


def are_visible(*tensors: Optional[torch.Tensor]) -> bool:
    """Whether the host looks at the values of these tensors. Cheap enough for each call."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors) or (_checks_devices() and not _is_capturing())


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def require_within(op: str, name: str, values: torch.Tensor, low: int, high: int, meaning: str) -> None:
    """Every entry is at least `low` and below `high`. `meaning` completes the message: "the cache's 12 pages"."""
    if values.numel() == 0:
        return
    least, greatest = (int(value) for value in torch.aminmax(values))
    if least >= low and greatest < high:
        return
    flat = values.reshape(-1)
    where = int(torch.nonzero((flat < low) | (flat >= high))[0])
    raise IndexError(
        f"{op}: {name}[{where}] is {int(flat[where])}; expected {low} to {high - 1}, {meaning}"
        if high > low
        else f"{op}: {name}[{where}] is {int(flat[where])}; expected no entries, {meaning}"
    )


def require_offsets(op: str, name: str, offsets: torch.Tensor, end: Optional[int] = None, meaning: str = "") -> None:
    """Offsets start at 0 or above, never fall, and end at `end` or before. `meaning` says what ends there."""
    values = offsets.tolist()  # one copy from a GPU; and sorting what is sorted is one pass
    if not values:
        return
    if values[0] < 0 or values != sorted(values):
        raise ValueError(f"{op}: {name} must start at 0 or above and never descend; got {_shown(values)}")
    if end is not None and values[-1] > end:
        raise IndexError(f"{op}: {name} ends at {values[-1]}; expected at most {end}, {meaning}")


def _shown(values: list[int]) -> str:
    """The values up to and around the first that is wrong."""
    fall = next((i for i in range(1, len(values)) if values[i] < values[i - 1]), 0)
    begin = max(0, fall - 4)
    parts = [str(value) for value in values[begin : fall + 4]]
    return ", ".join([*(["…"] if begin else []), *parts, *(["…"] if fall + 4 < len(values) else [])])
