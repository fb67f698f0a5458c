"""Scales of tensors quantized as a whole: a number, or one float32 on the device that only the kernel reads."""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer.host import checks, memo

Scale = Union[float, torch.Tensor, None]

_LARGEST = torch.finfo(torch.float32).max


def signature(scale: Scale) -> object:
    """What a prepared launch depends on: of a number only its type, since every launch passes it anew."""
    return memo.signature(scale) if isinstance(scale, torch.Tensor) else type(scale)


def values(scale: Scale, what: str = "a scale") -> tuple[int, float, int]:
    """The values of `QuantScale` in csrc/quant_scale.h, in order.

    Raises ValueError, which begins with `what`, for a number that fp32 does not hold; `check` looks at the first of a
    type only.
    """
    if isinstance(scale, torch.Tensor):
        return scale.data_ptr(), 1.0, 0
    if scale is None:
        return 0, 1.0, 0
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"{what} is {scale!r:.60}; expected a finite number")
    return 0, scale, 0


_FIELDS = ("device_value", "host_value", "reserved")


def names(field: str) -> tuple[str, ...]:
    """Of those values, in a field of that name."""
    return tuple(f"{field}.{name}" for name in _FIELDS)


def constants(field: str) -> dict[str, Union[int, float]]:
    """Of those values, by name, where a kernel does not scale."""
    return dict(zip(names(field), values(None)))


# A scale in the schema of an operator for torch.compile, and back.
SCHEMA = "Tensor? {0}, float? {0}_value"


def split(scale: Scale) -> tuple[Optional[torch.Tensor], Optional[float]]:
    return (scale, None) if isinstance(scale, torch.Tensor) else (None, scale)


def join(tensor: Optional[torch.Tensor], value: Optional[float]) -> Scale:
    return value if tensor is None else tensor


def check(op: str, name: str, scale: Scale, reference: torch.Tensor, reference_name: str = "input") -> None:
    if isinstance(scale, torch.Tensor):
        checks.require(
            scale.numel() == 1 and scale.dtype == torch.float32,
            op,
            f"{name} is {scale.dtype} of shape {list(scale.shape)}; expected a number or one float32 in a tensor",
        )
        checks.require_device(op, name, scale, reference, reference_name)
        checks.require_memory(op, **{name: scale})
    elif scale is not None:
        checks.real(op, name, scale)
