"""What every operator needs: argument checks with one style of message, row geometry, the current stream, bounded
memos.

An operator checks its arguments once per signature (dtypes, shapes, strides, devices, alignment) and keeps the
prepared launch in
a memo. The hot path is: build the key, find the launch, pack the pointers, launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Optional, TypeVar

import torch

from flashinfer.jit.loader import stream_getter

T = TypeVar("T")

_MEMO_LIMIT = 4096


class Memo(dict[Any, T], Generic[T]):
    """signature -> prepared launch. Emptied when it has grown past any sane number of live signatures."""

    def remember(self, key: Any, value: T) -> T:
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        self[key] = value
        return value


def signature(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a prepared launch depends on, but for the address."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device()


_raw_stream = stream_getter()


def current_stream(device_index: int) -> int:
    """The handle of torch's current CUDA stream on a device; 0 for the CPU (index −1)."""
    return _raw_stream(device_index) if device_index >= 0 else 0


Allocate = Callable[[], torch.Tensor]


def allocator(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Allocate:
    """A function that returns a new, uninitialized, contiguous tensor, of one kind.

    On CUDA it goes around the dispatcher, as the code that torch.compile generates does: 1.1 µs on an H100 machine
    instead of the 2.8 to 3.5 of torch.empty.
    """
    shape = tuple(shape)
    fast: Optional[Callable[..., torch.Tensor]] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if device.type != "cuda" or fast is None:
        return functools.partial(torch.empty, shape, dtype=dtype, device=device)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    index, current_device = device.index, torch._C._cuda_getDevice

    def allocate() -> torch.Tensor:
        if current_device() != index:  # it would be there
            return torch.empty(shape, dtype=dtype, device=device)
        return fast(shape, strides, dtype)

    return allocate


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


# ------------------------------------------------------------------------------------------------------ torch.compile

# Held for the life of the process: what a Library defines disappears with it.
_library = torch.library.Library("flashinfer", "FRAGMENT")


def compiled_op(schema: str, eager: Callable[..., object]) -> Any:
    """Define `torch.ops.flashinfer.<name>` for torch.compile, and return it.

    Only a traced call goes through it (`if torch.compiler.is_dynamo_compiling()`), so that eager calls stay lean. The
    schema returns nothing and marks what the operator writes, `Tensor(a!) output`; results are allocated by the traced
    caller, so that shapes need no second description in a fake kernel.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> None:
        eager(*args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashinfer::{name}", lambda *args, **kwargs: None, lib=_library)
    return getattr(torch.ops.flashinfer, name).default


# --------------------------------------------------------------------------------------------------------------- checks


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
