"""Workspaces and index tensors of planned attention. Nothing here waits for the device or copies from it."""

from __future__ import annotations

import itertools
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


def require_workspace(op: str, buffer: torch.Tensor) -> None:
    checks.require(
        buffer.is_contiguous() and buffer.device.type in ("cuda", "cpu"),
        op,
        f"the workspace must be a contiguous tensor on a CUDA device or the CPU; got one on {buffer.device}",
    )


def upload(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The index tensor as contiguous int32 on the device: itself if it is that already, else an asynchronous copy."""
    if (
        tensor.get_device() == device.index
        and tensor.dtype is torch.int32
        and tensor.dim() == 1
        and tensor.is_contiguous()
    ):
        return tensor  # the common case on a GPU
    if name.endswith("indptr"):
        require_ascending(op, name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected one dimension")
    if tensor.dtype != torch.int32:
        if tensor.dtype != torch.int64:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected int32")
        tensor = tensor.to(torch.int32)
    if tensor.device != device:
        if tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {device} or the CPU")
        pinned = tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()
        tensor = pinned.to(device, non_blocking=True)
    return tensor.contiguous()


def require_ascending(op: str, name: str, indptr: torch.Tensor) -> None:
    """Offsets start at zero or above and never fall. Checked on the CPU alone, where it costs no synchronization."""
    if indptr.device.type != "cpu" or indptr.numel() == 0:
        return
    offsets = indptr.tolist()
    if offsets[0] < 0 or any(later < earlier for earlier, later in itertools.pairwise(offsets)):
        raise ValueError(f"{op}: {name} must start at 0 or above and never descend; got {offsets[:8]}…")


class FixedBuffers:
    """The caller's index buffers of a wrapper for CUDA graphs: a plan copies into them, a replay reads them."""

    def __init__(self, op: str, device: torch.device, **buffers: torch.Tensor | None) -> None:
        self._op = op
        for name, buffer in buffers.items():
            if buffer is None:
                raise ValueError(f"{op}: use_cuda_graph=True needs {name}; the graph reads it at every replay")
            if buffer.dtype != torch.int32 or buffer.device != device or not buffer.is_contiguous():
                raise ValueError(
                    f"{op}: {name} is {buffer.dtype} on {buffer.device}; expected contiguous int32 on {device}"
                )

    def fill(self, name: str, buffer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Copy into the front of the buffer, asynchronously. Values that are the buffer already are left in place."""
        if values.data_ptr() == buffer.data_ptr() and values.device == buffer.device:
            return buffer
        if values.numel() > buffer.numel():
            raise ValueError(
                f"{self._op}: {name} holds {buffer.numel()} entries, the plan brings {values.numel()}; "
                "make the buffer as large as the largest plan"
            )
        if values.device.type == "cpu" and buffer.device.type == "cuda" and not values.is_pinned():
            values = values.pin_memory()
        buffer[: values.numel()].copy_(values, non_blocking=True)
        return buffer
