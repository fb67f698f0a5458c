# SPDX-License-Identifier: Apache-2.0
"""Machine code -> something to launch.

    kernel   = default_resolver().load(spec)            # CudaKernel or CpuKernel, one per spec and process
    launcher = kernel.on(device_index)          # one per kernel and device; loads the cubin there
    launcher(grid, stream, values)              # by the names of the parameter struct's fields
    launch   = launcher.prepare(grid, values, varying=("input", "output"))
    launch(input_address, output_address)       # the rest stays as prepared; on torch's current stream

A device, or the dynamic loader, may refuse machine code that is whole by its checksum: built for another architecture
or system, or damaged before the checksum was taken. The kernel then asks `instead` for the one from the next source. So
only a launcher knows its Config and its parameter struct.

A launch packs the values into a preallocated block and makes one driver call. What is prepared costs least to repeat.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Union

from flashinfer import target as targets
from flashinfer.errors import DriverError, FlashInferError
from flashinfer.jit import driver
from flashinfer.jit.source import Source
from flashinfer.jit.spec import Config

Grid = tuple[int, int, int]
Value = Union[int, float, bytes]
Values = Mapping[str, Value]  # by field of the parameter struct, those of nested structs as in "kv.k"
PreparedLaunch = Callable[..., None]
Instead = Callable[[str], "Kernel"]  # why machine code does not load -> the kernel from the next source; may raise


@functools.cache
def stream_getter() -> Callable[[int], int]:
    """A function: device index -> handle of torch's current CUDA stream there.

    torch.cuda.current_stream() builds an object and costs more than a kernel launch; Triton reads the handle this way
    too.
    """
    import torch

    def no_stream(device_index: int) -> int:
        return 0

    getter: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", no_stream)
    return getter


class Launcher(Protocol):
    config: Config
    params: type[ctypes.Structure]  # mirror of the struct that the launched kernel takes
    is_dependent: bool  # whether a launch may overlap the kernel before it

    def max_blocks_per_sm(self) -> int:
        """Blocks of this kernel that one SM holds at a time; persistent grids are a multiple of it."""

    def __call__(self, grid: Grid, stream: int, values: Values) -> None: ...

    def prepare(self, grid: Grid, values: Values, *, varying: Sequence[str]) -> PreparedLaunch:
        """A launch on torch's current stream, called with the fields named in `varying`, in that order.

        They lead the parameter struct, so that a call packs them alone. Every other field is in `values`. Raises
        ValueError naming the fields that are unknown, missing or given twice.
        """


class Kernel(Protocol):
    def on(self, device_index: int | None, *, pdl: bool | None = None) -> Launcher:
        """The launcher for a device. `pdl`: with programmatic dependent launch; None: where the hardware has it (sm_90
        and later), which is also the only place where True changes anything."""


_FORMATS: dict[Any, str] = {
    ctypes.c_void_p: "P",
    ctypes.c_int64: "q",
    ctypes.c_int32: "i",
    ctypes.c_uint32: "I",
    ctypes.c_uint64: "Q",
    ctypes.c_float: "f",
    ctypes.c_uint8: "B",
}


@functools.cache
def _packer(params: type[ctypes.Structure], num_fields: int | None = None) -> struct.Struct:
    """A struct.Struct laid out like the first fields of the C struct. Byte arrays (TMA descriptors) take one
    `bytes`."""
    text = ""
    for field in params._fields_[:num_fields]:
        ctype: Any = field[1]
        if issubclass(ctype, ctypes.Array):
            text += (
                f"{ctype._length_}s" if ctype._type_ is ctypes.c_uint8 else f"{ctype._length_}{_FORMATS[ctype._type_]}"
            )
        else:
            text += _FORMATS[ctype]
    return struct.Struct(text)


def _in_order(params: type[ctypes.Structure], values: Values, varying: Sequence[str] = ()) -> list[Value]:
    """The value of every field in the struct's order; zeros for those that vary."""
    names = [field[0] for field in params._fields_]
    given = values.keys()
    faults = {
        "unknown": [name for name in (*given, *varying) if name not in names],
        "missing": [name for name in names if name not in given and name not in varying],
        "given twice": [name for name in varying if name in given or varying.count(name) > 1],
        "varying, but not the first fields in order": [
            name for name, leading in zip(varying, names) if name in names and name != leading
        ],
    }
    wrong = "; ".join(f"{', '.join(found)}: {what}" for what, found in faults.items() if found)
    if wrong:
        raise ValueError(f"values of {params.__name__}: {wrong}")
    zeros = (b"" if issubclass(field[1], ctypes.Array) else 0 for field in params._fields_)
    return [values.get(name, zero) for name, zero in zip(names, zeros)]


# ----------------------------------------------------------------------------------------------------------------- CUDA


class CudaKernel:
    def __init__(self, source: Source, machine_code: bytes, instead: Instead) -> None:
        self._spec, self._config, self._params = source.spec, source.config, source.implementation.params
        self._machine_code = machine_code
        self._instead = instead
        self._successor: Kernel | None = None  # once a device has refused this one
        self._launchers: dict[tuple[int, bool], CudaLauncher] = {}
        self._may_depend = targets.launches_dependent(source.spec.target)
        self._lock = threading.Lock()

    def on(self, device_index: int | None, *, pdl: bool | None = None) -> Launcher:
        assert device_index is not None
        # Drivers before 12.3 do not capture dependent launches into graphs.
        pdl = pdl is not False and self._may_depend and driver.version() >= (12, 3)
        launcher = self._launchers.get((device_index, pdl))
        return launcher if launcher is not None else self._make_launcher(device_index, pdl)

    def _make_launcher(self, device_index: int, pdl: bool) -> Launcher:
        with self._lock:
            launcher = self._launchers.get((device_index, pdl))
            if launcher is None and self._successor is None:
                sibling = self._launchers.get((device_index, not pdl))
                try:
                    function = sibling.function if sibling else self._load(device_index)
                except DriverError as error:
                    if error.code not in driver.REFUSALS:  # out of memory, an earlier fault, …: not the code's fault
                        raise FlashInferError(
                            f"{self._spec.name} for {self._spec.target} was not loaded on cuda:{device_index}: {error}"
                        ) from error
                    self._successor = self._instead(f"cuda:{device_index}: {error}")
                else:
                    launcher = CudaLauncher(self._spec.name, self._config, self._params, function, device_index, pdl)
                    self._launchers[device_index, pdl] = launcher
        if launcher is not None:
            return launcher
        assert self._successor is not None
        return self._successor.on(device_index, pdl=pdl)

    def _load(self, device_index: int) -> ctypes.c_void_p:
        _, function = driver.load_function(device_index, self._machine_code, self._spec.family)
        smem_bytes = self._config.launch.smem_bytes
        if smem_bytes > 48 * 1024:
            driver.call("cuFuncSetAttribute", function, driver.FUNC_MAX_DYNAMIC_SMEM, smem_bytes)
        return function


class CudaLauncher:
    """Launches one kernel on one device. Safe to call from several threads."""

    def __init__(
        self,
        name: str,
        config: Config,
        params: type[ctypes.Structure],
        function: ctypes.c_void_p,
        device_index: int,
        pdl: bool,
    ) -> None:
        self.function, self.config, self.params, self.is_dependent = function, config, params, pdl
        self._device_index = device_index
        self._name = name
        self._launch = config.launch
        self._pack_params = _packer(params).pack_into
        attributes = []
        if config.launch.cluster_size > 1:
            size = (ctypes.c_uint * 16)(config.launch.cluster_size, 1, 1)
            attributes.append(driver.LaunchAttribute(driver.LAUNCH_CLUSTER_DIMENSION, 0, size))
        if pdl:
            attributes.append(
                driver.LaunchAttribute(driver.LAUNCH_PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_uint * 16)(1))
            )
        self._attributes = (driver.LaunchAttribute * len(attributes))(*attributes)
        self._block = (config.launch.num_threads, 1, 1, config.launch.smem_bytes)
        # Free parameter blocks. A launch takes one and gives it back: list.pop and append are atomic, so that threads
        # never share a block and none waits for another.
        self._slots: list[LaunchSlot] = []
        self._launch_kernel: Callable[..., int] = driver.library().cuLaunchKernelEx

    def __call__(self, grid: Grid, stream: int, values: Values) -> None:
        ordered = _in_order(self.params, values)
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = self._new_slot()
        config, params, args, _ = slot
        _pack_launch(config, 0, *grid, *self._block, stream)
        self._pack_params(params, 0, *ordered)
        code = self._launch_kernel(*args)
        if code != 0:
            self._retry_or_raise(code, args)
        self._slots.append(slot)

    def prepare(self, grid: Grid, values: Values, *, varying: Sequence[str]) -> PreparedLaunch:
        ordered = _in_order(self.params, values, varying)
        pack_varying = _packer(self.params, len(varying)).pack_into
        launch_kernel, device_index, current_stream = self._launch_kernel, self._device_index, stream_getter()
        slots: list[LaunchSlot] = []

        def launch(*first_values: Value) -> None:
            try:
                slot = slots.pop()
            except IndexError:
                slot = self._new_slot()
                _pack_launch(slot[0], 0, *grid, *self._block, 0)
                self._pack_params(slot[1], 0, *ordered)
            config, params, args, _ = slot
            config.stream = current_stream(device_index)
            pack_varying(params, 0, *first_values)
            code = launch_kernel(*args)
            if code != 0:
                self._retry_or_raise(code, args)
            slots.append(slot)

        return launch

    def max_blocks_per_sm(self) -> int:
        with driver.context(self._device_index):
            return driver.max_blocks_per_sm(self.function, self._launch.num_threads, self._launch.smem_bytes)

    def _new_slot(self) -> LaunchSlot:
        config, params = driver.LaunchConfig(), self.params()
        config.num_attributes = len(self._attributes)
        if len(self._attributes):
            config.attributes = ctypes.addressof(self._attributes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        # Addresses as ready-made pointer objects: the call converts nothing.
        args = (ctypes.byref(config), self.function, ctypes.c_void_p(ctypes.addressof(pointers)), None)
        return config, params, args, pointers

    def _retry_or_raise(self, code: int, args: tuple[object, ...]) -> None:
        # A thread that has made no CUDA call yet has no current context, and a caller may be on another device: enter
        # it.
        if code in (driver.INVALID_CONTEXT, driver.INVALID_HANDLE):
            with driver.context(self._device_index):
                code = self._launch_kernel(*args)
        if code != 0:
            failure = driver.error("cuLaunchKernelEx", code)
            raise FlashInferError(f"launch of {self._name} on cuda:{self._device_index}: {failure}") from failure


# The memory one launch in progress needs: configuration, parameters, the arguments of the driver call, and the array of
# parameter pointers, which only the driver reads.
LaunchSlot = tuple[driver.LaunchConfig, ctypes.Structure, tuple[object, ...], object]
_pack_launch = struct.Struct("7I4xP").pack_into  # grid, block, smem_bytes, stream of CUlaunchConfig


# ------------------------------------------------------------------------------------------------------------------ CPU


class CpuKernel:
    def __init__(self, source: Source, library_path: Path) -> None:
        share_openmp()
        function = getattr(ctypes.CDLL(str(library_path)), source.entry)
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_bool
        self._launcher = CpuLauncher(source.spec.name, source.config, source.implementation.params, function)

    def on(self, device_index: int | None, *, pdl: bool | None = None) -> CpuLauncher:
        return self._launcher


class CpuLauncher:
    """Calls one CPU kernel. There is no grid and no stream: the kernel spreads its work over OpenMP threads itself."""

    is_dependent = False

    def __init__(
        self, name: str, config: Config, params: type[ctypes.Structure], function: Callable[[bytes], bool]
    ) -> None:
        """function: returns whether it had the memory it takes."""
        self._name, self.config, self.params = name, config, params
        self._function, self._pack = function, _packer(params).pack

    def __call__(self, grid: Grid, stream: int, values: Values) -> None:
        if not self._function(self._pack(*_in_order(self.params, values))):
            raise self._no_memory()

    def prepare(self, grid: Grid, values: Values, *, varying: Sequence[str]) -> PreparedLaunch:
        function, pack = self._function, self._pack
        fixed_values = _in_order(self.params, values, varying)[len(varying) :]

        def launch(*first_values: Value) -> None:
            if not function(pack(*first_values, *fixed_values)):
                raise self._no_memory()

        return launch

    def _no_memory(self) -> MemoryError:
        return MemoryError(
            f"{self._name}: no memory for what the kernel writes down on its way; the result is not complete. Next "
            "step: free memory, or use fewer threads, each of which takes some (OMP_NUM_THREADS)"
        )

    def max_blocks_per_sm(self) -> int:
        return 1


@functools.cache
def share_openmp() -> str:
    """Make the OpenMP runtime visible to CPU kernels, which leave its symbols open so as to share torch's threads.
    Returns its file."""
    import torch

    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    for candidate in [*map(str, bundled), "libgomp.so.1", "libomp.so"]:
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return candidate
        except OSError:
            continue
    raise FlashInferError("no OpenMP runtime was found beside torch or in the system; install libgomp1")


# -------------------------------------------------------------------------------------------------------------- either


def load(source: Source, machine_code: bytes, path: Path | None, instead: Instead) -> Kernel:
    """Make machine code callable. `path` is its file, if it has one; a CPU library without one is loaded from a
    private copy."""
    if source.kind == "cuda":
        return CudaKernel(source, machine_code, instead)
    if path is not None:
        # The file can be gone (a cache being cleared) or its file system forbid execution: then as if it had none.
        with contextlib.suppress(OSError):
            return CpuKernel(source, path)
    try:
        with tempfile.NamedTemporaryFile(prefix="flashinfer-", suffix=".so") as copy:
            copy.write(machine_code)
            copy.flush()
            return CpuKernel(source, Path(copy.name))
    except (OSError, AttributeError) as error:  # AttributeError: a library without the entry point
        return instead(str(error))
