# SPDX-License-Identifier: Apache-2.0
"""What a kernel is: `KernelSpec` (a request), `Family` (what requests can exist) and `Config` (what the compiler is
told)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

from flashinfer import target as targets
from flashinfer.errors import UnsupportedConfig

ArgValue = Union[str, int, bool]


class KernelSpec(NamedTuple):
    """One kernel request. A tuple, so that hashing and comparing it in the process table happens in C.

    Build it with `Family.spec(...)`, which checks it and puts the arguments in the family's order.
    """

    family: str
    args: tuple[tuple[str, ArgValue], ...]
    target: str

    @property
    def name(self) -> str:
        """`rmsnorm-dtype=bf16-hidden_size=4096`: unique for (family, args), usable as a file name. A text that is no
        word, such as an expression, stands by its hash."""
        return "-".join([self.family, *(f"{axis}={_text(value)}" for axis, value in self.args)])

    def arg(self, axis: str) -> Any:
        for name, value in self.args:
            if name == axis:
                return value
        return _families[self.family].optional[axis]

    def with_target(self, target: str) -> KernelSpec:
        return self._replace(target=target)

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, "args": dict(self.args), "target": self.target}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> KernelSpec:
        """The inverse of `to_dict`. Raises UnsupportedConfig for an unknown family, axis or value."""
        return family(data["family"]).spec(data["target"], **data["args"])


def _text(value: ArgValue) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return text if _WORD.fullmatch(text) else _hash(text)


_WORD = re.compile(r"\w{0,32}")


@functools.lru_cache(maxsize=256)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CxxType(str):
    """The name of a type in namespace flashinfer; rendered as `using NAME = flashinfer::TYPE;`."""


class CxxMember(str):
    """The definition of a member, rendered as it is."""


Constants = Mapping[str, Union[CxxType, CxxMember, int, bool, float]]


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched. Rendered as constants too, so that device code and host agree. Ignored on the CPU.

    But for units_per_block, which is for hosts alone: how many a block takes of what a grid is counted in, where that
    follows from the kernel (rows of a norm, groups of heads, KV rows of a tile of decode).
    """

    num_threads: int = 128
    min_blocks_per_sm: int = 1
    smem_bytes: int = 0  # dynamic shared memory; the header asserts that its struct fits
    cluster_size: int = 1  # thread-block cluster along x
    units_per_block: int = 1


@dataclass(frozen=True)
class Config:
    """What the compiler is told about one kernel: named constants and types, and the launch shape."""

    constants: Constants
    launch: Launch = Launch()


def _serves_all(spec: KernelSpec) -> bool:
    return True


@dataclass(frozen=True)
class Implementation:
    """One way to compute a family, on one kind of target or from one architecture on.

    Attributes:
        on: "cuda" or "cpu": every target of that kind; or a target, such as "sm_90a": those that run its machine code.
        header: defines the entry point, `template <class Config> void FAMILY(const PARAMS&)` in namespace flashinfer
            (flashinfer::cpu); relative to csrc/.
        params: ctypes mirror of the parameter struct; its class name is the C++ name.
        config: spec -> Config: the tile table lives behind this function.
        serves: whether it can compute a spec, whose target it runs on; those it cannot go to the next implementation.
    """

    on: str
    header: str
    params: type[ctypes.Structure]
    config: Callable[[KernelSpec], Config]
    serves: Callable[[KernelSpec], bool] = _serves_all

    def runs_on(self, target: str) -> bool:
        return self.on == targets.kind(target) or self.on in targets.candidates(target)


def twins(
    params: type[ctypes.Structure], config: Callable[[KernelSpec], Config], *, cuda: str, cpu: str
) -> tuple[Implementation, ...]:
    """A header for every GPU and one for the CPU, over the same parameters and the same constants."""
    return Implementation("cuda", cuda, params, config), Implementation("cpu", cpu, params, config)


@dataclass(frozen=True)
class Family:
    """A kernel and the set of specs it can be asked for.

    Attributes:
        name: the entry point.
        axes: argument -> legal values, in canonical order.
        implementations: most specific first; the first that runs on the target and serves the spec computes it.
        optional: axis -> the value at which it is no part of a spec, so that a kernel keeps its name, and its rows in
            configs and records, when the family gets another axis.
    """

    name: str
    axes: Mapping[str, Container[Any]]
    implementations: tuple[Implementation, ...]
    optional: Mapping[str, ArgValue] = field(default_factory=dict)

    def spec(self, target: str, /, **args: ArgValue) -> KernelSpec:
        """Check the arguments and build the request. Raises UnsupportedConfig naming the argument and what is
        allowed."""
        if not self.runs_on(target):
            known = ", ".join(implementation.on for implementation in self.implementations)
            raise UnsupportedConfig(f"{self.name}: no kernel for target {target}; this family has {known}")
        args = {**self.optional, **args}
        if args.keys() != self.axes.keys():
            raise UnsupportedConfig(f"{self.name}: expected arguments {', '.join(self.axes)}; got {', '.join(args)}")
        for axis, legal in self.axes.items():
            if args[axis] not in legal:
                raise UnsupportedConfig(
                    f"{self.name}: {axis}={args[axis]!r} is not supported; allowed: {_allowed(legal)}"
                )
        values = tuple(
            (axis, _canonical(args[axis], legal))
            for axis, legal in self.axes.items()
            if axis not in self.optional or args[axis] != self.optional[axis]
        )
        return KernelSpec(self.name, values, target)

    def runs_on(self, target: str) -> bool:
        return any(implementation.runs_on(target) for implementation in self.implementations)

    def implementation(self, spec: KernelSpec) -> Implementation:
        """The one that computes a spec. Raises UnsupportedConfig where none does."""
        for implementation in self.implementations:
            if implementation.runs_on(spec.target) and implementation.serves(spec):
                return implementation
        raise UnsupportedConfig(f"{self.name}: no implementation for {spec.name} on {spec.target}")

    def config(self, spec: KernelSpec) -> Config:
        """What the compiler is told of a spec. Raises UnsupportedConfig, without compiling, where no kernel fits."""
        return self.implementation(spec).config(spec)


def _canonical(value: ArgValue, legal: Container[Any]) -> Any:
    """The legal value that equals this one: 1 and True, or 64 and 64.0, would render to different sources."""
    if isinstance(legal, tuple):
        return legal[legal.index(value)]
    return int(value) if isinstance(legal, range) else value


def _allowed(legal: Container[Any]) -> str:
    if isinstance(legal, range):
        step = f", multiples of {legal.step}" if legal.step != 1 else ""
        return f"{legal.start} to {legal[-1]}{step}"
    return ", ".join(str(value) for value in legal)  # type: ignore[attr-defined]


_families: dict[str, Family] = {}


def register(*families: Family) -> None:
    """Make families known by name. Called by the modules of `flashinfer.families` when they are imported."""
    for entry in families:
        _families[entry.name] = entry


def known_families() -> list[Family]:
    return list(_families.values())


def family(name: str) -> Family:
    """The family of that name. Raises UnsupportedConfig listing the known ones."""
    try:
        return _families[name]
    except KeyError:
        raise UnsupportedConfig(f"kernel family {name!r} is unknown; known: {', '.join(sorted(_families))}") from None
