# SPDX-License-Identifier: Apache-2.0
"""Memory that tells who touched it: every tensor of a call lies between poison and pages that may not be touched.

    | page without access | poison | tensor, and poison in its gaps | slack: poison | page without access |

The bytes of poison are 255, which is NaN in every floating type and -1 in every index type: read by a kernel they show
in the result. An access beyond the pages ends the process. What is written beside the outputs is found by comparison.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch

POISON = 255
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22  # PROT_READ | PROT_WRITE; MAP_PRIVATE | MAP_ANONYMOUS
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass
class Region:
    """The pages of one tensor."""

    address: int  # of the mapping, its first page being without access
    num_bytes: int  # of the mapping
    content: torch.Tensor  # uint8, all bytes that may be touched
    before: Optional[torch.Tensor] = None  # the content at `Memory.remember`


def _elements(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def strided_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if tensor.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1) * tensor.element_size()


@dataclass
class Memory:
    """The regions of one case."""

    regions: list[Region] = field(default_factory=list)

    def place(
        self, values: torch.Tensor, strides: Optional[Sequence[int]] = None, slack: int = 0, odd_bytes: int = 0
    ) -> torch.Tensor:
        """The values in memory of their own, with these strides (elements; dense if None), `slack` elements of poison
        behind the last, and `odd_bytes` besides. Where strides let elements coincide, the last written one holds."""
        shape, dtype, size = tuple(values.shape), values.dtype, values.element_size()
        strides = tuple(torch.empty(shape, device="meta").stride() if strides is None else strides)
        extent = 0 if values.numel() == 0 else sum((n - 1) * s for n, s in zip(shape, strides)) + 1
        content = self._map((extent + slack) * size + odd_bytes)
        count = (content.numel() - odd_bytes) // size
        offset = content.numel() - odd_bytes - count * size  # of the elements: all but an odd rest
        flat = (
            content.view(dtype)
            if offset == 0 and odd_bytes == 0
            else _elements(content.data_ptr() + offset, count, dtype)
        )
        tensor = flat.as_strided(shape, strides, count - slack - extent)
        if values.numel():
            places = (element_places(tensor) + count - slack - extent)[:, None] * size + torch.arange(size) + offset
            content[places.reshape(-1)] = (
                values.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            )
        return tensor

    def _map(self, num_bytes: int) -> torch.Tensor:
        inner = max(1, -(-num_bytes // _PAGE)) * _PAGE
        total = inner + 2 * _PAGE
        address = _libc.mmap(None, total, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        assert address != _MAP_FAILED, f"mmap of {total} bytes failed"
        for fence in (address, address + _PAGE + inner):
            assert _libc.mprotect(fence, _PAGE, 0) == 0, "mprotect failed"
        content = _elements(address + _PAGE, inner, torch.uint8)
        content.fill_(POISON)
        self.regions.append(Region(address, total, content))
        return content

    def remember(self) -> None:
        """Keep a copy of everything, for `differences`."""
        for region in self.regions:
            region.before = region.content.clone()

    def differences(self, outputs: Sequence[torch.Tensor]) -> Optional[str]:
        """The first byte that differs from what was remembered and is not of an output; None if there is none."""
        for region in self.regions:
            assert region.before is not None
            changed = region.content != region.before
            begin = region.content.data_ptr()
            for output in outputs:
                if output.numel() and begin <= output.data_ptr() < begin + region.content.numel():
                    changed[_bytes_of(output, output.data_ptr() - begin)] = False
            if bool(changed.any()):
                first, count = int(changed.nonzero()[0]), int(changed.sum())
                return f"{count} bytes beside the outputs were written, the first at {first} of {len(changed)}"
        return None

    def release(self) -> None:
        for region in self.regions:
            _libc.munmap(region.address, region.num_bytes)
        self.regions.clear()


def element_places(tensor: torch.Tensor) -> torch.Tensor:
    """Of every element, its distance from the first."""
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        places = places[..., None] + torch.arange(size) * stride
    return places.reshape(-1)


def _bytes_of(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The places of a tensor's bytes, counted from `offset` bytes before its first."""
    size = tensor.element_size()
    return (element_places(tensor)[:, None] * size + torch.arange(size)).reshape(-1) + offset


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements share a byte."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    places = element_places(tensor)
    return len(places) != len(places.unique())


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share a byte, or come close to: interleaved ones count."""
    return max(a.data_ptr(), b.data_ptr()) < min(a.data_ptr() + strided_bytes(a), b.data_ptr() + strided_bytes(b))
