"""Scales of tensors quantized as a whole: a number, or one float32 on the device that only the kernel reads."""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer.host import checks, memo

Scale = Union[float, torch.Tensor, None]


def signature(scale: Scale) -> object:
    """What a prepared launch depends on: of a number only that it is there, since every launch passes it anew."""
    return memo.signature(scale) if isinstance(scale, torch.Tensor) else scale is not None


NO_VALUES = (0, 1.0, 0)
_LEAST = 2.0**-126  # the reciprocal of a smaller one may not be finite


def values(scale: Scale, op: str = "quantization", name: str = "scale") -> tuple[int, float, int]:
    """The values of `QuantScale` in csrc/quant_scale.h, in order. Numbers are checked, as each call brings another."""
    if scale is None:
        return NO_VALUES
    if scale.__class__ is float and _LEAST <= scale <= checks.FP32_MAX:
        return 0, scale, 0
    if isinstance(scale, torch.Tensor):
        return scale.data_ptr(), 1.0, 0
    return 0, checks.real(op, name, scale, at_least=_LEAST), 0


def names(field: str) -> tuple[str, ...]:
    """Of those values, in a field of that name."""
    return tuple(f"{field}.{name}" for name in ("device_value", "host_value", "reserved"))


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
    else:
        values(scale, op, name)
