# SPDX-License-Identifier: Apache-2.0
"""Scales of tensors quantized as a whole: a number, or one float32 on the device that only the kernel reads."""

from __future__ import annotations

from typing import Union

import torch

from flashinfer.host import checks, memo

Scale = Union[float, torch.Tensor, None]


def signature(scale: Scale) -> object:
    """What a prepared launch depends on: of a number only its type, since every launch passes it anew."""
    return memo.signature(scale) if isinstance(scale, torch.Tensor) else type(scale)


NO_VALUES = (0, 1.0, 0)
_LEAST = 2.0**-126  # the reciprocal of a smaller one may not be finite


def values(scale: Scale, op: str = "quantization", name: str = "scale") -> tuple[int, float, int]:
    """The values of `QuantScale` in csrc/quant_scale.h, in order. Numbers are checked, as each call brings another."""
    if scale is None:
        return NO_VALUES
    if scale.__class__ is float and _LEAST <= scale <= checks.FP32_MAX:
        return 0, scale, 0
    if isinstance(scale, torch.Tensor):
        return scale.data_ptr() or checks.no_address(op, name, scale), 1.0, 0
    return 0, checks.real(op, name, scale, at_least=_LEAST), 0


_FIELDS = ("device_value", "host_value", "reserved")


def names(field: str) -> tuple[str, ...]:
    """Of those values, in a field of that name."""
    return tuple(f"{field}.{name}" for name in _FIELDS)


def constants(field: str) -> dict[str, Union[int, float]]:
    """Of those values, by name, where a kernel does not scale."""
    return dict(zip(names(field), values(None)))


def check(op: str, name: str, scale: Scale, device: torch.device, owner: str = "the wrapper") -> None:
    """`owner`: whose device it is."""
    if isinstance(scale, torch.Tensor):
        checks.require(
            scale.numel() == 1 and scale.dtype == torch.float32,
            op,
            f"{name} is {scale.dtype} of shape {list(scale.shape)}; expected a number or one float32 in a tensor",
        )
        checks.require(
            scale.device == device, op, f"{name} is on {scale.device}, {owner} on {device}; move them to one device"
        )
        checks.require_addresses(op, **{name: scale})
    else:
        values(scale, op, name)
