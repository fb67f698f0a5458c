# SPDX-License-Identifier: Apache-2.0
"""Workspaces of planned attention: regions for schedules and partial results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Protocol

import torch

from flashinfer.host import checks

_ALIGNMENT = 256
INT_WORKSPACE_BYTES = 8 << 20


class Memory(Protocol):
    """What a workspace is to a plan: a tensor, or a `Region`."""

    def data_ptr(self) -> int: ...
    def numel(self) -> int: ...
    def element_size(self) -> int: ...


class Region(NamedTuple):
    """A part of a workspace that somebody else keeps alive."""

    address: int
    num_bytes: int

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return self.num_bytes

    def element_size(self) -> int:
        return 1


def halves(buffer: torch.Tensor) -> tuple[Region, Region]:
    """Of one workspace, where its integers go and where its floats do. It is not kept alive."""
    address, num_bytes = buffer.data_ptr(), buffer.numel() * buffer.element_size()
    int_bytes = min(INT_WORKSPACE_BYTES, num_bytes // 4)
    return Region(address, int_bytes), Region(address + int_bytes, num_bytes - int_bytes)


def two_parts(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one workspace, for two schedules."""
    elements = buffer.view(-1)
    half = len(elements) // 2
    return elements[:half], elements[half:]


def carve(op: str, name: str, buffer: Memory, sizes: Sequence[int]) -> list[int]:
    """Addresses of consecutive regions of these sizes in bytes inside a workspace. Raises ValueError if it is too
    small."""
    address = start = -(-buffer.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    addresses = []
    for size in sizes:
        addresses.append(address)
        address += -(-size // _ALIGNMENT) * _ALIGNMENT
    available = buffer.numel() * buffer.element_size()
    if address - buffer.data_ptr() > available:
        raise ValueError(
            f"{op}: {name} holds {available} bytes; this plan needs {address - start + _ALIGNMENT}. "
            "Pass a larger buffer to the constructor or to reset_workspace_buffer()"
        )
    return addresses


def require_workspace(op: str, buffer: object, device: Optional[torch.device] = None) -> None:
    """device: of the wrapper that is to use it, if there is one."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{op}: the workspace is {type(buffer).__name__}; expected a tensor")
    checks.require(
        buffer.is_contiguous() and buffer.device.type in ("cuda", "cpu"),
        op,
        f"the workspace must be a contiguous tensor on a CUDA device or the CPU; got one on {buffer.device}",
    )
    checks.require(
        device is None or buffer.device == device,
        op,
        f"a workspace is on {buffer.device}; expected {device}, the device of the wrapper",
    )
