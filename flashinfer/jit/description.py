# SPDX-License-Identifier: Apache-2.0
"""What a registry says of a kernel to hosts that are not Python: how it is launched, and what its parameters look like.

docs/registry.md is the format. All of it follows from the family, as the source does; nothing of it changes a digest.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

from flashinfer.jit import spec as specs
from flashinfer.jit.source import Source
from flashinfer.jit.spec import CxxMember

_TYPES: dict[Any, str] = {
    ctypes.c_void_p: "pointer",
    ctypes.c_int64: "int64",
    ctypes.c_uint64: "uint64",
    ctypes.c_int32: "int32",
    ctypes.c_uint32: "uint32",
    ctypes.c_float: "float32",
    ctypes.c_uint8: "uint8",
}


def layout(params: type[ctypes.Structure]) -> dict[str, Any]:
    """A parameter struct: `{"struct": …, "bytes": …, "fields": [[name, offset, type], …]}`, nested ones laid out flat.

    A type is one of `_TYPES`, or one with a count, as in `uint8[128]`.
    """
    fields = [[field[0], getattr(params, field[0]).offset, _type(field[1])] for field in params._fields_]
    return {"struct": params.__name__, "bytes": ctypes.sizeof(params), "fields": fields}


def _type(ctype: Any) -> str:
    if issubclass(ctype, ctypes.Array):
        return f"{_TYPES[ctype._type_]}[{ctype._length_}]"
    return _TYPES[ctype]


@functools.cache
def abi(params: type[ctypes.Structure]) -> str:
    """16 hexadecimal digits that two layouts share if they are the same."""
    described = layout(params)
    lines = [f"{described['struct']} {described['bytes']}", *(f"{n} {o} {t}" for n, o, t in described["fields"])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def launch(source: Source) -> dict[str, Any]:
    """The field `launch` of a registry's entry."""
    how, params = source.config.launch, source.implementation.params
    constants = {name: value for name, value in source.config.constants.items() if not isinstance(value, CxxMember)}
    return {
        "num_threads": how.num_threads,
        "smem_bytes": how.smem_bytes,
        "cluster_size": how.cluster_size,
        "units_per_block": how.units_per_block,
        "params": params.__name__,
        "abi": abi(params),
        "constants": {name: str(value) if isinstance(value, str) else value for name, value in constants.items()},
    }


def layouts(families: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The field `layouts` of a registry: those of families that this version has, by their abi."""
    wanted = set(families)
    known = [family for family in specs.known_families() if family.name in wanted]
    structs = {one.params for family in known for one in family.implementations}
    return {abi(params): layout(params) for params in sorted(structs, key=lambda params: params.__name__)}
