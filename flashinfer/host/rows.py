# SPDX-License-Identifier: Apache-2.0
"""Where the rows (last axis) of a tensor lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from flashinfer.host.checks import require, require_unit_stride


class Rows(NamedTuple):
    """Where the rows of several tensors lie: in groups, evenly within a group, the groups evenly as well.

    Row `r` of a tensor with strides `(row, group)`, in elements, starts at
    `r // rows_per_group * group + r % rows_per_group * row`.
    """

    num_rows: int
    rows_per_group: int
    strides: tuple[tuple[int, int], ...]  # of each tensor


def common_rows(op: str, tensors: Mapping[str, torch.Tensor]) -> Rows:
    """One grouping of rows (last axes) that holds in all of these tensors, whose leading axes are alike.

    Leading axes that lie evenly in every one of them are merged; what remains must be at most two, as in
    `[tokens, heads, head_dim]` cut out of a packed projection. Raises ValueError otherwise.
    """
    for name, tensor in tensors.items():
        require(tensor.dim() >= 1, op, f"{name} has no dimensions; expected at least [hidden_size]")
        require_unit_stride(op, name, tensor)
    (name, first), *_ = tensors.items()
    leading = first.shape[:-1]
    num_rows = leading.numel()
    require(num_rows < 1 << 31, op, f"{name} has {num_rows} rows; expected at most {(1 << 31) - 1}")
    if first.numel() == 0:
        return Rows(num_rows, 1, ((0, 0),) * len(tensors))
    axes: list[tuple[int, tuple[int, ...]]] = []  # size, stride in each tensor; outermost first
    for size, *strides in zip(leading, *(tensor.stride() for tensor in tensors.values())):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], strides)):
            axes[-1] = (axes[-1][0] * size, tuple(strides))
        else:
            axes.append((size, tuple(strides)))
    if len(axes) > 2:
        if len(tensors) > 1:
            for name, tensor in tensors.items():
                common_rows(op, {name: tensor})  # blames one that is uneven by itself
        shown = " and ".join(f"{name} (strides {list(tensor.stride())})" for name, tensor in tensors.items())
        fault = "group differently" if len(tensors) > 1 else "lie unevenly in memory"
        raise ValueError(f"{op}: the rows of {shown} {fault}; expected at most two levels in all, call .contiguous()")
    if len(axes) == 2:
        (_, groups), (rows_per_group, rows) = axes
        return Rows(num_rows, rows_per_group, tuple(zip(rows, groups)))
    groups = axes[0][1] if axes else (0,) * len(tensors)
    return Rows(num_rows, 1, tuple((0, group) for group in groups))


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
