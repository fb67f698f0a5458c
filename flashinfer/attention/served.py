# SPDX-License-Identifier: Apache-2.0
"""What a server asks for next: who decodes over pages prefills over them too, and the other way round. Where these
kernels have to be compiled, they are by then."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import decode as decode_families
from flashinfer.families.attention import prefill as prefill_families
from flashinfer.families.attention.params import QUERIES
from flashinfer.jit import KernelSpec


def beside_decode(machine: str, page_size: int, axes: dict[str, Any]) -> list[KernelSpec]:
    """axes: arguments that the families of decode and of prefill have in common."""
    if not _is_served(axes):
        return []
    with contextlib.suppress(UnsupportedConfig):
        request = functools.partial(
            prefill_families.prefill, machine, kv_storage="paged", page_size=page_size, mask="causal", **axes
        )
        kernels = dict.fromkeys(request(queries=queries) for queries in QUERIES)
        return [*kernels, prefill_families.PREFILL_PLAN.spec(machine, kv_storage="paged")]
    return []


def beside_prefill(machine: str, group_size: int, axes: dict[str, Any], mixed: bool) -> list[KernelSpec]:
    """axes: as of `beside_decode`; mixed: of the same batch."""
    if not _is_served(axes):
        return []
    with contextlib.suppress(UnsupportedConfig):
        kernel = decode_families.decode(machine, kv_storage="paged", group_size=group_size, mixed=mixed, **axes)
        return [kernel, decode_families.DECODE_PLAN.spec(machine, mixed=mixed)]
    return []


def _is_served(axes: dict[str, Any]) -> bool:
    """Whether one call tells of others: sinks come and go with runs, a function may be tried once."""
    return axes["pos_encoding"] == axes["variant"] == "none" and not axes["has_sinks"]
