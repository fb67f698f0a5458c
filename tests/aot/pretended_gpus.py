# SPDX-License-Identifier: Apache-2.0
"""GPUs that are not there, for what operators ask for on them: tensors in the CPU's memory that say they are on one.

Nothing is launched, so kernels have to be idle (Idle); what torch computes, the CPU computes. To be installed
in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from flashinfer.jit import loader
from flashinfer.jit import spec as specs
from flashinfer.jit.loader import Grid, Values
from flashinfer.jit.spec import KernelSpec


class Gpu(NamedTuple):
    """One that is sold, and what operators ask of it."""

    name: str
    capability: tuple[int, int]
    num_sms: int


# By target of the core set: a GPU that it is made for, and another that its machine code runs on, which places samplers
# in other ways.
GPUS = {
    "sm_80": (Gpu("A100", (8, 0), 108), Gpu("A10", (8, 6), 72)),
    "sm_89": (Gpu("L40S", (8, 9), 142), Gpu("L4", (8, 9), 58)),
    "sm_90a": (Gpu("H200", (9, 0), 132), Gpu("H20", (9, 0), 78)),
    "sm_100f": (Gpu("B200", (10, 0), 148), Gpu("B300", (10, 3), 148)),
    "sm_120f": (Gpu("RTX 5090", (12, 0), 170), Gpu("GB10", (12, 1), 48)),
}


class Idle:
    """A kernel that does nothing, and its launcher, which packs parameters as one for a GPU does."""

    is_dependent = False

    def __init__(self, spec: KernelSpec) -> None:
        implementation = specs.family(spec.family).implementation(spec)
        self.spec, self.config, self.params = spec, implementation.config(spec), implementation.params

    def on(self, device_index: int | None, *, pdl: bool | None = None) -> Idle:
        return self

    def max_blocks_per_sm(self) -> int:
        return 1

    def __call__(self, grid: Grid, stream: int, values: Values) -> None:
        loader._packer(self.params).pack(*loader._in_order(self.params, values))

    def prepare(self, grid: Grid, values: Values, *, varying: Sequence[str]) -> Callable[..., None]:
        loader._packer(self.params).pack(*loader._in_order(self.params, values, varying))
        pack_varying = loader._packer(self.params, len(varying)).pack

        def launch(*first_values: Any) -> None:
            pack_varying(*first_values)

        return launch


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
