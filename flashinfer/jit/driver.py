# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver calls we make, through ctypes.

A process whose kernels are all answered by AOT must reach its first launch in milliseconds, so nothing is imported for
it
(cuda-bindings took 10 ms to import warm and 155 ms cold on an H100 machine, and launches no faster: 4.7 µs either way).
libcuda.so.1 is part of the driver and already loaded by torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import sys
from collections.abc import Iterator, Sequence

from flashinfer.errors import DriverError

INVALID_CONTEXT, INVALID_HANDLE = 201, 400  # CUresult of a launch without, or outside, the right current context

# CUresults that say that a device cannot use machine code: invalid image, no binary for the GPU, invalid PTX, PTX of a
# later version, invalid source, symbol not found.
INVALID_IMAGE = 200
REFUSALS = (INVALID_IMAGE, 209, 218, 222, 300, 500)

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
FUNC_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LAUNCH_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
LAUNCH_PROGRAMMATIC_SERIALIZATION = 6
CAPTURE_MODE_RELAXED = 2

TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64  # CUtensorMap
TENSOR_MAP_UINT16, TENSOR_MAP_NO_INTERLEAVE = 1, 0
TENSOR_MAP_NO_SWIZZLE, TENSOR_MAP_SWIZZLE_128B = 0, 3
TENSOR_MAP_L2_PROMOTION_256B, TENSOR_MAP_FILL_ZEROS = 3, 0


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a 64-byte union, of which we use up to three words."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("_pad", ctypes.c_uint),
        ("value", ctypes.c_uint * 16),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda. Raises OSError when no driver is installed."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def call(name: str, *args: object) -> None:
    """Call a driver function; raise DriverError unless it succeeds."""
    code = getattr(library(), name)(*args)
    if code != 0:
        raise error(name, code)


def error(name: str, code: int) -> DriverError:
    text = ctypes.c_char_p()
    library().cuGetErrorName(code, ctypes.byref(text))
    return DriverError(name, code, (text.value or b"unknown error").decode())


@functools.cache
def version() -> tuple[int, int]:
    """The CUDA version the installed driver supports, e.g. (13, 0)."""
    number = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def capabilities() -> list[tuple[int, int]]:
    """The compute capability of each visible GPU, without torch. Raises OSError when no driver is installed."""
    call("cuInit", 0)
    count, number = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    found = []
    for index in range(count.value):
        device, parts = ctypes.c_int(), []
        call("cuDeviceGet", ctypes.byref(device), index)
        for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
            call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            parts.append(number.value)
        found.append((parts[0], parts[1]))
    return found


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    call("cuInit", 0)
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(handle), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


@contextlib.contextmanager
def context(device: int) -> Iterator[None]:
    """Make the device's primary context, the one torch uses, current in this thread; restore the previous one after."""
    previous = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(previous))
    call("cuCtxSetCurrent", _primary_context(device))
    try:
        yield
    finally:
        if previous.value is not None:
            call("cuCtxSetCurrent", previous)


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread load code while a stream is being captured into a CUDA graph, without invalidating the
    capture."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def load_function(device: int, machine_code: bytes, entry: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Load a cubin on a device. Returns (library handle, function handle); neither is ever unloaded."""
    if not is_whole_elf(machine_code):
        raise DriverError("reading the cubin", INVALID_IMAGE, "not a whole ELF file")
    loaded, kernel, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    with relaxed_capture(), context(device):
        call("cuLibraryLoadData", ctypes.byref(loaded), machine_code, None, None, 0, None, None, 0)
        call("cuLibraryGetKernel", ctypes.byref(kernel), loaded, entry.encode())
        call("cuKernelGetFunction", ctypes.byref(function), kernel)
    return loaded, function


_ELF_HEADER = struct.Struct("<4sB27xQQ6xHHHH2x")  # magic, class; offsets, then sizes and numbers of both tables
_ELF_SECTION = struct.Struct("<4xI16xQQ24x")  # type, offset, size
_NO_BITS = 8  # type of a section without content in the file


def is_whole_elf(machine_code: bytes) -> bool:
    """Whether all that an ELF file refers to lies within it. The driver is told no size and believes so; some files
    that end early make it loop for ever."""
    size = len(machine_code)
    if size < _ELF_HEADER.size:
        return False
    magic, width, segments, sections, segment_size, num_segments, section_size, num_sections = _ELF_HEADER.unpack_from(
        machine_code
    )
    if magic != b"\x7fELF" or width != 2 or section_size != _ELF_SECTION.size:
        return False
    if segments + segment_size * num_segments > size or sections + section_size * num_sections > size:
        return False
    for number in range(num_sections):
        kind, offset, length = _ELF_SECTION.unpack_from(machine_code, sections + number * section_size)
        if kind != _NO_BITS and offset + length > size:
            return False
    return True


def tensor_map_of_16_bit(
    address: int, axes: Sequence[tuple[int, int]], box: Sequence[int], swizzled: bool = True
) -> bytes:
    """The descriptor by which TMA (sm_90) copies boxes of a tensor of 16-bit elements into shared memory: in rows of
    128 bytes, swizzled, or in rows of any length as they are.

    axes: (size, stride in bytes) of each, the innermost, contiguous one first. An axis of one element may have any
    stride. box: elements along each axis.
    """
    rank = len(axes)
    strides = [stride if size > 1 and stride % 16 == 0 else 16 for size, stride in axes[1:]]
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    begin = -ctypes.addressof(storage) % TENSOR_MAP_ALIGNMENT
    call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(storage, begin),
        TENSOR_MAP_UINT16,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*(size for size, _ in axes)),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        TENSOR_MAP_NO_INTERLEAVE,
        TENSOR_MAP_SWIZZLE_128B if swizzled else TENSOR_MAP_NO_SWIZZLE,
        TENSOR_MAP_L2_PROMOTION_256B,
        TENSOR_MAP_FILL_ZEROS,
    )
    return storage.raw[begin : begin + TENSOR_MAP_BYTES]


def max_blocks_per_sm(function: ctypes.c_void_p, num_threads: int, smem_bytes: int) -> int:
    """Occupancy of a loaded function."""
    blocks = ctypes.c_int()
    call(
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        ctypes.byref(blocks),
        function,
        num_threads,
        ctypes.c_size_t(smem_bytes),
    )
    return blocks.value
