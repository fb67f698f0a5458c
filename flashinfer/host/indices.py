# SPDX-License-Identifier: Apache-2.0
"""The values of index tensors: page tables, offsets, positions.

The host looks at them where that takes no waiting, which is on the CPU: there each call checks them, and a wrong one is
an IndexError or a ValueError. Of tensors on a GPU it knows shapes alone: kernels write nothing outside of the tensors
they were given, and FLASHINFER_CHECK_INDICES=1 makes the host look (docs/safety.md says which kernel does what).

Whether values may be looked at is known when a launch is prepared (`may_be_visible`), so that calls on a GPU do not pay
for the question; `are_visible` also knows that a CUDA graph is not being captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Optional

import torch

from flashinfer import env
from flashinfer.host import memo

_checks_devices = functools.cache(env.CHECK_INDICES.get)


def may_be_visible(*tensors: Optional[torch.Tensor]) -> bool:
    """Whether the host looks at the values of these tensors, but for the time of a capture. Of every call that has
    tensors on the same devices."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors) or _checks_devices()


def are_visible(*tensors: Optional[torch.Tensor]) -> bool:
    """Whether the host looks at the values of these tensors now."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors) or (
        _checks_devices() and not any(tensor is not None and memo.is_capturing(tensor) for tensor in tensors)
    )


def require_within(
    op: str,
    name: str,
    values: torch.Tensor,
    low: int,
    high: int,
    meaning: str,
    where: Optional[Callable[[], torch.Tensor]] = None,
) -> None:
    """Every entry is at least `low` and below `high`. `meaning` completes the message: "the cache's 12 pages".

    where: makes a mask of the entries that count; None: all do.
    """
    if values.numel() == 0:
        return
    least, greatest = torch.aminmax(values)
    if least.item() >= low and greatest.item() < high:
        return
    wide = values.long()  # torch wraps a bound that the dtype of the tensor does not hold
    wrong = (wide < low) | (wide >= high)
    if where is not None:
        wrong &= where()
    found = torch.nonzero(wrong.reshape(-1))
    if found.numel() == 0:
        return
    index = int(found[0])
    expected = f"{low} to {high - 1}" if high > low else "no entries"
    raise IndexError(f"{op}: {name}[{index}] is {int(values.reshape(-1)[index])}; expected {expected}, {meaning}")


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
