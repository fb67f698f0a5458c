# SPDX-License-Identifier: Apache-2.0
"""Small tables that kernels read on a device: written once, kept for the life of the process."""

from __future__ import annotations

import ctypes
import functools

import torch

from flashinfer.jit import driver


@functools.cache
def address_of(table: bytes, device: torch.device) -> int:
    """The address of these bytes in the memory of a device. Prepared launches may hold it.

    On a GPU they are not a tensor of torch's: the first call may come while a CUDA graph is being captured, with whose
    memory it would end, and a copy by torch would be captured as well.
    """
    if device.type == "cpu":
        buffer = ctypes.create_string_buffer(table, len(table) + 15)
        address = -(-ctypes.addressof(buffer) // 16) * 16
        ctypes.memmove(address, table, len(table))
        _buffers.append(buffer)
        return address
    allocated = ctypes.c_uint64()
    index = torch.cuda.current_device() if device.index is None else device.index
    with driver.relaxed_capture(), driver.context(index):
        driver.call("cuMemAlloc_v2", ctypes.byref(allocated), ctypes.c_size_t(len(table)))
        driver.call("cuMemcpyHtoD_v2", allocated, table, ctypes.c_size_t(len(table)))
    return allocated.value


_buffers: list[object] = []
