# SPDX-License-Identifier: Apache-2.0
"""Every public function: a generator of cases under its name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.draw import Draw

# What a case yields: a call, or several in a row.
Case = Callable[[Draw], Iterator[Any]]
_MODULES = (
    "norm",
    "activation",
    "page",
    "quantization",
    "rope",
    "sampling",
    "attention",
    "planned_decode",
    "planned_prefill",
    "planned_cascade",
    "block_table",
    "mla",
    "block_sparse",
    "gdn",
    "gemm",
    "mixed",
    "helpers",
)


@functools.cache
def cases() -> dict[str, Case]:
    table: dict[str, Case] = {}
    for module in _MODULES:
        table.update(importlib.import_module(f"tests.fuzz.table.{module}").CASES)
    return table
