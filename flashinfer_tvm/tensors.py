# SPDX-License-Identifier: Apache-2.0
"""Tensors of the FFI as torch sees them, and the stream that the FFI has for a device.

Torch is what the checks and launches of flashinfer are written for, so tensors pass through it: a view of 1.5 µs each,
on the CPU, which copies nothing. Its allocator and its streams stay out of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch
import tvm_ffi
from torch.utils.dlpack import from_dlpack

from flashinfer.errors import UnsupportedConfig
from flashinfer.host import memo


def tensor(op: str, name: str, given: Any) -> torch.Tensor:
    """A view of a tensor of the FFI. Raises TypeError for what is none, UnsupportedConfig for what torch has no dtype
    or device for."""
    if isinstance(given, torch.Tensor):
        return given
    try:
        capsule = given.__dlpack__()
    except AttributeError:
        raise TypeError(f"{op}: {name} is {type(given).__name__}; expected a tensor") from None
    try:
        view = from_dlpack(capsule)
    except (RuntimeError, BufferError) as error:
        if given.__dlpack_device__()[0] == _PINNED:
            return from_dlpack(_as_of_cpu(given.__dlpack__()))
        reason = str(error).splitlines()[0]
        raise UnsupportedConfig(
            f"{op}: {name} is {given.dtype} on {given.device}, which torch does not take ({reason}); expected a dtype "
            "and a device of torch"
        ) from None
    if _MAY_IGNORE_OFFSETS and view.numel() and getattr(given, "data_ptr", view.data_ptr)() != view.data_ptr():
        raise UnsupportedConfig(
            f"{op}: {name} starts behind the address that it names, which torch {torch.__version__} does not heed. "
            "Next step: PyTorch 2.11 or later"
        )
    return view


# Early releases read a tensor of DLPack from the address that it names, whatever its byte_offset; 2.11 does not.
_MAY_IGNORE_OFFSETS = torch.torch_version.TorchVersion(torch.__version__) < "2.11"
_CPU, _PINNED = 1, 3  # DLPack's kinds of devices
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _as_of_cpu(capsule: object) -> object:
    """A tensor in pinned memory, which is memory of the CPU but a kind of device that torch does not take. TVM keeps
    the index arrays of the host there."""
    managed = _pointer_of(capsule, b"dltensor")  # of this capsule alone; it begins with the address, then the device
    ctypes.c_int32.from_address(managed + 8).value = _CPU
    return capsule


def tensors(op: str, **given: Any) -> list[torch.Tensor]:
    return [tensor(op, name, value) for name, value in given.items()]


def address(op: str, name: str, given: Any) -> int:
    """Of a tensor of the FFI, which in later releases than 0.1.11 tells it without a view."""
    try:
        found: int = given.data_ptr()
    except AttributeError:
        found = tensor(op, name, given).data_ptr()
    return found


@functools.cache
def _ffi_device(index: int) -> Any:
    torch.cuda.init()  # the process may have used CUDA without torch so far
    return tvm_ffi.device("cuda", index)


_NO_CHANGE = contextlib.nullcontext()


def environment_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the stream that the FFI has for a device torch's current one, which launches go to."""
    if device.type != "cuda":
        return _NO_CHANGE
    handle = tvm_ffi.get_raw_stream(_ffi_device(device.index))
    if handle == memo.current_stream(device.index):
        return _NO_CHANGE
    stream = torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)
    return torch.cuda.stream(stream)


class _Memory:
    """Memory on a CUDA device that somebody else keeps alive, in the protocol that torch reads without owning it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def borrowed(workspace: torch.Tensor) -> torch.Tensor:
    """The bytes of a workspace, which this does not keep alive. On the CPU, whose kernels need none, an empty one."""
    if workspace.device.type != "cuda":
        return torch.empty(0, dtype=torch.uint8)
    memory = _Memory(workspace.data_ptr(), workspace.numel() * workspace.element_size())
    return torch.as_tensor(memory, device=workspace.device)
