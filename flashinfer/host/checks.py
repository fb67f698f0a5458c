# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, with one style of message: `op: what is wrong; what was expected`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Optional

import torch
from torch._subclasses.fake_tensor import FakeTensor

from flashinfer import dtypes
from flashinfer.errors import UnsupportedConfig


def require(condition: bool, op: str, message: str) -> None:
    """Raise ValueError(`op: message`) unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def _shown(value: object) -> str:
    """On one line, and not all of it."""
    return f"{' '.join(repr(value).split()):.60}"


def _require_constant(op: str, name: str, value: object, expected: str) -> None:
    # A memo compares numbers by value; a tensor it would know by identity, whatever became of its value.
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is a tensor; expected {expected}, call .item()")


def integer(op: str, name: str, value: object, low: int = -(1 << 31), high: int = (1 << 31) - 1) -> int:
    """The value as an int from low to high, both included. Raises TypeError or ValueError."""
    _require_constant(op, name, value, "an integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} is {_shown(value)}; expected an integer") from None
    require(low <= number <= high, op, f"{name} is {number}; expected {_range(low, high)}")
    return number


def _range(low: int, high: int) -> str:
    limits = {-(1 << 31): "", (1 << 31) - 1: ""}
    parts = [text for text in (limits.get(low, f"at least {low}"), limits.get(high, f"at most {high}")) if text]
    return " and ".join(parts) or "an integer of 32 bits"


FP32_MAX = (2 - 2.0**-23) * 2.0**127


def real(op: str, name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf) -> float:
    """The value as a float that fp32 holds, greater than `above` and not less than `at_least`. Raises TypeError or
    ValueError."""
    _require_constant(op, name, value, "a number")
    try:
        if isinstance(value, (str, bytes, bytearray, bool)):  # float("1.5") would do
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{op}: {name} is {_shown(value)}; expected a number") from None
    expected = f", above {above:g}" if above > -math.inf else f", at least {at_least:g}" if at_least > -math.inf else ""
    fits = abs(number) <= FP32_MAX and number > above and number >= at_least
    require(fits, op, f"{name} is {number}; expected a finite number of 32 bits{expected}")
    return number


def not_tensors(op: str, **given: object) -> TypeError:
    """The error of a call with something else than tensors. Whoever made it found out by what a tensor has."""
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            return TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor")
    return TypeError(f"{op}: {', '.join(given)}: expected tensors")


def require_memory(op: str, **tensors: torch.Tensor) -> None:
    """Tensors in the memory of the CPU or of a CUDA device: not on meta nor fake, which have a shape alone, nor of a
    storage that was freed."""
    for name, tensor in tensors.items():
        if tensor.device.type not in ("cpu", "cuda") or isinstance(tensor, FakeTensor):
            raise UnsupportedConfig(
                f"{op}: {name} is a {type(tensor).__name__} on {tensor.device}, which has no memory here; expected a "
                "tensor on the CPU or on a CUDA device"
            )
        if tensor.layout != torch.strided or tensor.data_ptr() == 0:
            no_address(op, name, tensor)


def require_flag(op: str, name: str, value: object) -> None:
    """True, False, or None for what the hardware is best at."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"{op}: {name} is {value!r:.60}; expected True, False or None")


# Tensors lie above it on a CUDA device, and on the CPU but for executables at fixed addresses. What lies below may have
# no memory, and is looked at.
LOWEST_ADDRESS = 1 << 32


def require_addresses(op: str, **operands: object) -> None:
    """Each is a tensor in memory, or empty, or on meta. For an operator that failed to read an address: says why."""
    for name, value in operands.items():
        if not isinstance(value, torch.Tensor):
            raise not_tensors(op, **{name: value}) from None
        try:
            address = value.data_ptr()
        except RuntimeError:
            address = 0  # of a sparse tensor
        if address < LOWEST_ADDRESS:
            no_address(op, name, value)


def no_address(op: str, name: str, tensor: torch.Tensor) -> int:
    """0, the address of a tensor that is empty or on meta. Raises UnsupportedConfig for one that has elements: a fake
    tensor has the device, and so the prepared launches, of a real one. So has a tensor whose storage was given back."""
    if tensor.layout == torch.strided:
        if tensor.numel() == 0 or tensor.is_meta:
            return 0
        if not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr():
            return tensor.data_ptr()  # low, but there
    raise UnsupportedConfig(
        f"{op}: {name} is a {type(tensor).__name__} of layout {str(tensor.layout)[6:]} without memory; expected a "
        "dense tensor on a cuda or cpu device. Fake tensors are for torch.compile"
    ) from None


def low_address(op: str, name: str, tensor: torch.Tensor) -> int:
    """The address of a tensor in memory, though below LOWEST_ADDRESS; 0 if it is empty. Raises UnsupportedConfig for
    one that has elements but no memory: on meta, fake, or a view of a storage that was given back, whose address is the
    offset in it."""
    require_memory(op, **{name: tensor})
    return no_address(op, name, tensor)


def require_tensors(op: str, **values: object) -> None:
    """Tensors in memory, of sizes that 32 bits count. Raises TypeError or ValueError."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise not_tensors(op, **{name: value})
        require_memory(op, **{name: value})
        counted = max(value.shape, default=0) < 1 << 31
        require(counted, op, f"{name} has shape {list(value.shape)}; expected sizes of 32 bits")


def boolean(op: str, name: str, value: object) -> bool:
    """The value as a bool. Raises TypeError; 0 and 1 will do."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{op}: {name} is {_shown(value)}; expected True or False")


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


def require_supported(op: str, name: str, tensor: torch.Tensor, supported: Sequence[str]) -> None:
    """A dtype that kernels have, by their short names. Raises UnsupportedConfig."""
    if dtypes.short_name(tensor.dtype) not in supported:
        *others, last = [str(dtypes.torch_dtype(short))[6:] for short in supported]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected {expected}")


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
