# SPDX-License-Identifier: Apache-2.0
"""GPUs that are not there, for what operators ask for on them: tensors in the CPU's memory that say they are on one.

Nothing is launched, so kernels have to be idle (ask_core.Idle); what torch computes, the CPU computes. To be installed
in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode


class Gpu(NamedTuple):
    """One that is sold, and what operators ask of it."""

    name: str
    capability: tuple[int, int]
    num_sms: int


class OnGpu(torch.Tensor):
    """One of `cuda:index`. Its class alone makes it so: its memory is the CPU's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    index = 0
    devices: tuple[torch.device, ...] = ()
    is_cuda, is_cpu = True, False

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.devices[self.index]

    def get_device(self) -> int:
        return self.index


# What a tensor is, wherever it lies: most of what an operator asks torch for.
_QUESTIONS = {
    *(getattr(torch.Tensor, name) for name in ("stride", "size", "dim", "numel", "element_size", "data_ptr")),
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "layout", "is_meta", "requires_grad")),
    *(torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.device),
}


class _Machine(TorchFunctionMode):
    """Has torch compute on the CPU, and what comes of it lie where it would."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _QUESTIONS:
            return function(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        for several in [value for value in given if type(value) in (tuple, list)]:
            given += several
        index = next((value.index for value in given if isinstance(value, OnGpu)), None)
        goes_to = ["cpu"] if function is torch.Tensor.cpu else [value for value in given if _is_device(value)]
        for device in map(torch.device, goes_to):
            index = None if device.type == "cpu" else device.index or 0
        result = function(
            *("cpu" if _is_device(value) else value for value in args),
            **{name: "cpu" if _is_device(value) else value for name, value in kwargs.items() if name != "pin_memory"},
        )
        if result is None or (not goes_to and args and result is args[0]):  # in place
            return result
        if type(result) in (tuple, list):
            return type(result)(_on(value, index) for value in result)
        return _on(result, index)


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(("cuda", "cpu")))


def _on(value: Any, index: int | None) -> Any:
    """A tensor where it belongs; None: on the CPU."""
    if not isinstance(value, torch.Tensor) or (value.index if isinstance(value, OnGpu) else None) == index:
        return value
    if index is None:
        return value.as_subclass(torch.Tensor)
    moved = value.as_subclass(OnGpu)
    moved.index = index
    return moved


class _Generator:
    """Of random numbers, none of which is drawn."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None: ...

    def initial_seed(self) -> int:
        return 0


def install(gpus: tuple[Gpu, ...]) -> None:
    """Make these the GPUs of this process, `cuda:0` and on."""
    known: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: None,
        "get_device_capability": lambda index=0: gpus[torch.device("cuda", index).index].capability,
        "get_device_properties": lambda index: SimpleNamespace(multi_processor_count=gpus[index].num_sms),
        "default_generators": (_Generator(),) * len(gpus),
    }
    for name, value in known.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDevice = lambda: -1  # none of them: torch.empty allocates, which the mode sees
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    from flashinfer.attention import tma
    from flashinfer.host import memo

    memo._is_capturing = lambda: False
    tma.driver.tensor_map_of_16_bit = lambda *_: bytes(128)
    OnGpu.devices = tuple(torch.device("cuda", index) for index in range(len(gpus)))
    _Machine().__enter__()
