"""Checks of arguments, with one style of message: `op: what is wrong; what was expected`."""

from __future__ import annotations

from typing import Optional

import torch


def require(condition: bool, op: str, message: str) -> None:
    """Raise ValueError(`op: message`) unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def require_like(
    op: str, name: str, tensor: torch.Tensor, reference: torch.Tensor, reference_name: str = "input"
) -> None:
    """The same shape, dtype and device as the reference."""
    require_shape(op, name, tensor, reference, reference_name)
    require_dtype_device(op, name, tensor, reference, reference_name)


def require_shape(
    op: str, name: str, tensor: torch.Tensor, reference: torch.Tensor, reference_name: str = "input"
) -> None:
    require(
        tensor.shape == reference.shape,
        op,
        f"{name} has shape {list(tensor.shape)}; expected {list(reference.shape)}, the shape of {reference_name}",
    )


def require_dtype_device(
    op: str, name: str, tensor: torch.Tensor, reference: torch.Tensor, reference_name: str = "input"
) -> None:
    require(
        tensor.dtype == reference.dtype,
        op,
        f"{name} is {tensor.dtype}; expected {reference.dtype}, the dtype of {reference_name}",
    )
    require_device(op, name, tensor, reference, reference_name)


def require_device(
    op: str, name: str, tensor: torch.Tensor, reference: torch.Tensor, reference_name: str = "input"
) -> None:
    require(
        tensor.device == reference.device,
        op,
        f"{name} is on {tensor.device}, {reference_name} on {reference.device}; move them to one device",
    )


def require_unit_stride(op: str, name: str, tensor: torch.Tensor) -> None:
    require(
        tensor.numel() <= 1 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
        op,
        f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, call .contiguous()",
    )


def check_index(op: str, name: str, tensor: torch.Tensor, length: Optional[int] = None) -> None:
    """A dense vector of int32 or int64, of the given length."""
    require(
        tensor.dim() == 1 and (length is None or tensor.shape[0] == length),
        op,
        f"{name} has shape {list(tensor.shape)}; expected [{'n' if length is None else length}]",
    )
    require(
        tensor.dtype in (torch.int32, torch.int64), op, f"{name} is {tensor.dtype}; expected torch.int32 or torch.int64"
    )
    require(
        tensor.shape[0] <= 1 or tensor.stride(0) == 1,
        op,
        f"{name} has stride {tensor.stride(0)}; expected 1, call .contiguous()",
    )
