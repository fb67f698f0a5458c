# SPDX-License-Identifier: Apache-2.0
"""Element types: the short names used in specs and C++ sources, and their PyTorch counterparts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# short name (a type of that name exists in C++ on both targets) -> name in torch
_TORCH_NAMES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


@functools.cache
def _short_names() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, name): short for short, name in _TORCH_NAMES.items()}


def short_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bf16"`. A dtype without a kernel type keeps its torch name, for the family to reject."""
    return _short_names().get(dtype) or str(dtype).removeprefix("torch.")


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Accepts a `torch.dtype`, a torch name (`"bfloat16"`, `"half"`) or a short name (`"bf16"`)."""
    import torch

    if isinstance(name, torch.dtype):
        return name
    if not isinstance(name, str):
        raise TypeError(f"dtype is {name!r:.60}; expected a torch.dtype or its name")
    found = getattr(torch, _TORCH_NAMES.get(name, name.removeprefix("torch.")), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype {name!r} is unknown; expected a torch.dtype or one of {', '.join(_TORCH_NAMES.values())}"
        )
    return found
