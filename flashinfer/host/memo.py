# SPDX-License-Identifier: Apache-2.0
"""What makes the second call cheap: memos of prepared launches, the current stream, allocation.

An operator checks its arguments once per signature (dtypes, shapes, strides, devices, alignment) and keeps the prepared
launch in a memo. The hot path is: build the key, find the launch, pack the pointers, launch.
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
    """signature -> prepared launch. Emptied when it has grown past any sane number of live signatures.

    A signature names the device of one tensor by itself. The others, whose addresses the operator has looked at, may be
    named by number (`get_device()`, which costs half as much): what has an address is on the CPU or on the process's
    one kind of accelerator.
    """

    _last: tuple[Any, Optional[T]] = (None, None)

    def find(self, key: Any) -> Optional[T]:
        """As `get`, for an operator whose calls are most often like the one before: to compare takes half as long as to
        hash."""
        last, value = self._last
        try:
            if key == last:
                return value
        except (OverflowError, RuntimeError, ValueError):
            pass  # of arguments that do not compare, which the operator refuses
        value = self.get(key)
        if value is not None:
            self._last = key, value
        return value

    def hold(self, key: Any, value: T) -> T:
        """Until another signature comes: of what keeps memory alive."""
        self._last = key, value
        return value

    def clear(self) -> None:
        super().clear()
        self._last = None, None

    def remember(self, key: Any, value: T) -> T:
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        self[key] = value
        self._last = key, value
        return value


def no_launch(*values: object) -> None:
    """The prepared launch where there is nothing to compute: no elements, or a meta tensor, which has only a shape."""


def signature(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a prepared launch depends on, but for the address. The class is for fake tensors, alike in all else."""
    return tensor.__class__, tensor.dtype, tensor.shape, tensor.stride(), tensor.device


_raw_stream = stream_getter()


def current_stream(device_index: int) -> int:
    """The handle of torch's current CUDA stream on a device; 0 for the CPU (index −1)."""
    return _raw_stream(device_index) if device_index >= 0 else 0


_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether work on the tensor's device becomes part of a CUDA graph."""
    return tensor.is_cuda and _is_capturing()


Allocate = Callable[[], torch.Tensor]


def allocator(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Allocate:
    """A function that returns a new, uninitialized, contiguous tensor, of one kind.

    It goes around the dispatcher, as the code that torch.compile generates does: 1.1 µs on an H100 machine instead of
    the 2.8 to 3.5 of torch.empty. That allocates on the current device, which is looked at where there are several.
    """
    shape = tuple(shape)
    fast: Optional[Callable[..., torch.Tensor]]
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is None or device.type not in ("cpu", "cuda"):
        return functools.partial(torch.empty, shape, dtype=dtype, device=device)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return functools.partial(fast, shape, strides, dtype)
    index, current_device = device.index, torch._C._cuda_getDevice

    def allocate() -> torch.Tensor:
        if current_device() != index:  # it would be there
            return torch.empty(shape, dtype=dtype, device=device)
        return fast(shape, strides, dtype)

    return allocate


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
