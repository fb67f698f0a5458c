"""Workspaces of planned attention: regions for schedules and partial results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.host import checks

_ALIGNMENT = 256
INT_WORKSPACE_BYTES = 8 << 20


def carve(op: str, name: str, buffer: torch.Tensor, sizes: Sequence[int]) -> list[int]:
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


def require_workspace(op: str, buffer: object) -> None:
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{op}: the workspace is {type(buffer).__name__}; expected a tensor")
    checks.require(
        buffer.is_contiguous() and buffer.device.type in ("cuda", "cpu"),
        op,
        f"the workspace must be a contiguous tensor on a CUDA device or the CPU; got one on {buffer.device}",
    )
