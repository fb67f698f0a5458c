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
    if offsets.numel() == 0:
        return
    steps = offsets[1:] - offsets[:-1]
    if int(offsets[0]) < 0 or bool((steps < 0).any()):
        shown = ", ".join(str(int(value)) for value in offsets[:8]) + (", …" if len(offsets) > 8 else "")
        raise ValueError(f"{op}: {name} must start at 0 or above and never descend; got {shown}")
    if end is not None and int(offsets[-1]) > end:
        raise IndexError(f"{op}: {name} ends at {int(offsets[-1])}; expected at most {end}, {meaning}")
