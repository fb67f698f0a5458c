"""Where the rows (last axis) of a tensor lie in memory."""

from __future__ import annotations

import torch

from flashinfer.host.checks import require, require_unit_stride


def grouped_rows(op: str, name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """(rows_per_group, row_stride, group_stride) that visit the rows (last axis) of a tensor in order.

    Leading axes that lie evenly in memory are merged; what remains must be at most two, as in `[tokens, heads,
    head_dim]` cut out of
    a packed projection. Raises ValueError otherwise.
    """
    require(tensor.dim() >= 1, op, f"{name} has no dimensions; expected at least [hidden_size]")
    require_unit_stride(op, name, tensor)
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        raise ValueError(
            f"{op}: the rows of {name} lie unevenly in memory (strides {list(tensor.stride())}); call .contiguous()"
        )
    if not merged:
        return 1, 0, 0
    if len(merged) == 1:
        return 1, 0, merged[0][1]
    return merged[1][0], merged[1][1], merged[0][1]


def even_rows(op: str, name: str, tensor: torch.Tensor) -> int:
    """The distance between rows (last axis) of a tensor whose rows are evenly spaced. Raises ValueError otherwise."""
    rows_per_group, _, stride = grouped_rows(op, name, tensor)
    require(rows_per_group == 1, op, f"the rows of {name} are not evenly spaced in memory; call .contiguous()")
    return stride


def require_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    """Dense rows. CUDA kernels copy 16 bytes at a time: there every row must start at a multiple of 16 bytes."""
    require_unit_stride(op, name, tensor)
    if tensor.device.type != "cuda" or tensor.numel() == 0:
        return
    itemsize = tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]) if size > 1]
    if tensor.data_ptr() % 16 or any(stride * itemsize % 16 for stride in strides):
        raise ValueError(
            f"{op}: rows of {name} do not start at multiples of 16 bytes (address % 16 = {tensor.data_ptr() % 16}, "
            f"strides {list(tensor.stride())} elements of {itemsize} bytes); call .contiguous()"
        )


def alignment_of(*tensors: torch.Tensor) -> int:
    """The bitwise or of the addresses and the strides in bytes, last axes apart: what a vector access must divide."""
    alignment = 0
    for tensor in tensors:
        alignment |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
            alignment |= stride * tensor.element_size() if size > 1 else 0
    return alignment & 15


def require_distinct(op: str, name: str, tensor: torch.Tensor) -> None:
    """No two elements of a tensor that is written to share memory, as in an expanded one."""
    reach = 0  # of all axes of smaller stride
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        require(
            stride > reach or tensor.numel() == 0,
            op,
            f"elements of {name} overlap in memory (shape {list(tensor.shape)}, strides {list(tensor.stride())}); "
            "expected one place for each, call .clone()",
        )
        reach += (size - 1) * stride
