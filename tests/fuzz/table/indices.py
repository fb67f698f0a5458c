# SPDX-License-Identifier: Apache-2.0
"""What oracles ask of index tensors, which kernels would otherwise follow anywhere."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.fuzz.call import Refused

LARGEST = 1 << 31  # what does not fit an int32 is an error wherever a kernel counts in int32


def integers(name: str, tensor: Any, length: int | None = None) -> list[int]:
    """The entries of an index vector of this length."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise Refused(f"{name} is no vector of int32 or int64")
    if length is not None and tensor.shape[0] != length:
        raise Refused(f"{name} has {tensor.shape[0]} entries, not {length}")
    return [int(entry) for entry in tensor.tolist()]


def offsets(name: str, tensor: Any, length: int | None = None, end: int | None = None) -> list[int]:
    """Ascending from 0 or above, to `end` at most; at least one."""
    entries = integers(name, tensor, length)
    if not entries or entries[0] < 0 or any(later < earlier for earlier, later in itertools.pairwise(entries)):
        raise Refused(f"{name} is empty, begins below 0 or descends")
    if end is not None and entries[-1] > end:
        raise Refused(f"{name} ends at {entries[-1]}, past {end}")
    return entries


def whole(name: str, number: Any) -> int:
    """A whole number, whatever its type."""
    if isinstance(number, torch.Tensor) and number.numel() == 1 and not number.is_floating_point():
        number = number.item()
    if not isinstance(number, (int, float)) or number != int(number):
        raise Refused(f"{name} is no whole number")
    return int(number)
