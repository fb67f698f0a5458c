"""What parameter structs of several families have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

P, I64, I32, U32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
Fields = list[tuple[str, Any]]

DTYPES = ("fp16", "bf16", "fp32")
FP8_DTYPES = ("fp8_e4m3", "fp8_e5m2")
QUANT_SCALE: Fields = [("device_value", P), ("host_value", F32), ("reserved", I32)]  # csrc/quant_scale.h


def nested(name: str, fields: Sequence[Any]) -> Fields:
    """The fields of a struct inside a struct, under their C++ names (`slots.page_size`): a launch packs flat values."""
    return [(f"{name}.{field[0]}", field[1]) for field in fields]


def inside(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a struct's fields, as those of that struct inside another."""
    return {f"{name}.{field}": value for field, value in values.items()}
