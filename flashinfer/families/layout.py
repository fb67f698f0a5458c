# SPDX-License-Identifier: Apache-2.0
"""What parameter structs of several families have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from flashinfer.dtypes import ITEMSIZE

P, I64, I32, U32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
Fields = list[tuple[str, Any]]

DTYPES = ("fp16", "bf16", "fp32")
FP8_DTYPES = ("fp8_e4m3", "fp8_e5m2")
QUANT_SCALE: Fields = [("device_value", P), ("host_value", F32), ("reserved", I32)]  # csrc/quant_scale.h
FAST_DIVISOR: Fields = [("divisor", U32), ("magic", U32), ("shift", U32)]  # csrc/fast_divisor.h


def nested(name: str, fields: Sequence[Any]) -> Fields:
    """The fields of a struct inside a struct, under their C++ names (`slots.page_size`): a launch packs flat values."""
    return [(f"{name}.{field[0]}", field[1]) for field in fields]


def inside(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a struct's fields, as those of that struct inside another."""
    return {f"{name}.{field}": value for field, value in values.items()}


def fast_divisor(field: str, divisor: int) -> dict[str, int]:
    """The values of a FastDivisor (csrc/fast_divisor.h) in a field of that name."""
    shift = (divisor - 1).bit_length()
    magic = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
    return {f"{field}.divisor": divisor, f"{field}.magic": magic, f"{field}.shift": shift}


def vec_size(dtype: str, length: int, alignment: int = 0) -> int:
    """Elements per load: the largest power of two that divides the length, within 16 bytes and the alignment.

    `alignment` is the bitwise or of every address and every stride in bytes that the kernel adds to one. Where vectors
    must divide several lengths, `length` is their greatest common divisor. 1 for a dtype that no kernel has: the spec
    refuses it.
    """
    size = max(1, min(16, alignment & -alignment if alignment else 16) // ITEMSIZE.get(dtype, 16))
    while length % size:
        size //= 2
    return size
