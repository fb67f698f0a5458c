"""Workspaces and index tensors of planned attention. Nothing here waits for the device or copies from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashinfer import _op

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
    _op.require(
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


@dataclass(frozen=True)
class DecodeSchedule:
    """Addresses of a decode's schedule and scratch, in the order of AttentionParams; all 0 on the CPU."""

    chunks: int = 0
    requests: int = 0
    empty: int = 0
    counters: int = 0
    partial_out: int = 0
    partial_lse: int = 0
    tile_indptr: int = 0

    @property
    def values(self) -> tuple[int, ...]:
        return (self.chunks, self.requests, self.empty, self.counters, self.partial_out, self.partial_lse)


# Sizes of the structs in csrc/attention/params.h, which asserts them.
DECODE_CHUNK_BYTES, DECODE_REQUEST_BYTES = 48, 32


def decode_partial_bytes(num_chunks: int, num_qo_heads: int, head_dim_vo: int) -> tuple[int, int]:
    """Bytes of partial_out and partial_lse: for each chunk, two slots and two of the groups that begin with it
    (csrc/attention/decode_schedule.cuh)."""
    slots = 4 * num_chunks * num_qo_heads
    return slots * head_dim_vo * 4, slots * 4


def decode_num_counters(batch_size: int, num_chunks: int, num_head_blocks: int) -> int:
    """One for each request, and two for the groups of partial results that begin with each chunk."""
    return (batch_size + 2 * num_chunks) * num_head_blocks


def decode_schedule(
    op: str,
    int_workspace: torch.Tensor,
    float_workspace: torch.Tensor,
    batch_size: int,
    num_chunks: int,
    num_head_blocks: int,
    num_qo_heads: int,
    head_dim_vo: int,
) -> DecodeSchedule:
    """Lay out the workspaces of a planned decode. Depends on shapes alone, so that a captured launch stays valid."""
    chunks, requests, empty, counters, tile_indptr = carve(
        op,
        "the int workspace",
        int_workspace,
        (
            num_chunks * DECODE_CHUNK_BYTES,
            batch_size * DECODE_REQUEST_BYTES,
            batch_size * 4,
            decode_num_counters(batch_size, num_chunks, num_head_blocks) * 4,
            (batch_size + 1) * 4,
        ),
    )
    partial_out, partial_lse = carve(
        op, "float_workspace_buffer", float_workspace, decode_partial_bytes(num_chunks, num_qo_heads, head_dim_vo)
    )
    return DecodeSchedule(chunks, requests, empty, counters, partial_out, partial_lse, tile_indptr)
