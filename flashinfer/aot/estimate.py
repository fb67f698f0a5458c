# SPDX-License-Identifier: Apache-2.0
"""What kernels will take, before any is compiled: seconds of a processor and bytes of machine code.

Of a kernel that the set's notes speak of, what its last build took. Of any other, what the most alike kernel took that
`benchmarks/bench_compile.py --figures` compiled for the nearest target; figures.json holds those of the core set.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashinfer import target as targets
from flashinfer.aot.kernel_set import Built, Key
from flashinfer.jit.spec import KernelSpec

FIGURES = Path(__file__).with_name("figures.json")
# How far the bytes of a set may be off, and are: a limit that is nearer than this is left to the build itself.
DOUBT = 0.1
# Of the bytes of machine code, those that a wheel takes: 24.54 MB of 82.75 with the core set, its registry included.
_PACKED = 0.297


@dataclass(frozen=True)
class Estimate:
    seconds: float
    bytes: int
    origin: str  # "last build", "measured", "alike", or "guess" for a family that nobody has measured


Axes = Mapping[str, str]
Measured = tuple[Axes, Estimate]


class Estimator:
    def __init__(self, noted: Iterable[Built] = ()) -> None:
        """`noted`: what builds of this set compiled; none for estimates that are the same on every machine."""
        self._noted: dict[Key, Built] = {built.key: built for built in noted}
        self._figures = figures()

    def of(self, spec: KernelSpec) -> Estimate:
        built = self._noted.get((spec.name, spec.target))
        if built is None:
            return self._by_figures(spec)
        return Estimate(built.seconds or self._by_figures(spec).seconds, built.entry.bytes, "last build")

    def _by_figures(self, spec: KernelSpec) -> Estimate:
        others = sorted(self._figures, key=functools.partial(_unlikeness_of_targets, spec.target))
        for target in others:
            measured = self._figures[target].get(spec.family)
            if measured is not None:
                same = measured.get(spec.name)
                if same is not None and target == spec.target:
                    return same[1]
                _, estimate = same or most_alike(_axes(spec.name), list(measured.values()))
                return dataclasses.replace(estimate, origin="alike")
        whole = [estimate for rows in self._figures[others[0]].values() for _, estimate in rows.values()]
        mean = sum(one.seconds for one in whole) / len(whole), sum(one.bytes for one in whole) // len(whole)
        return Estimate(*mean, "guess")


def shard(specs: Sequence[KernelSpec], index: int, count: int) -> list[KernelSpec]:
    """The part of `specs` that machine `index` of `count` (from 1) builds: each kernel is in exactly one.

    Parts take about the same time. They depend on the kernels and on this package alone, neither on the order of the
    kernels nor on what some machine has built before.
    """
    estimator = Estimator()
    heaviest_first = sorted(
        (-estimator.of(spec).seconds, spec.name, spec.target, spec) for spec in dict.fromkeys(specs)
    )
    loads = [(0.0, part) for part in range(1, count + 1)]
    mine = set()
    for seconds, _, _, spec in heaviest_first:
        load, part = loads[0]
        heapq.heapreplace(loads, (load - seconds, part))
        if part == index:
            mine.add(spec)
    return [spec for spec in dict.fromkeys(specs) if spec in mine]


def write_figures(built: Iterable[Built], about: Mapping[str, str], path: Path = FIGURES) -> None:
    """Replace the figures of the targets that these are for; a line per kernel, so that differences can be read.

    Args:
        built: kernels that one build compiled.
        about: how, e.g. compiler and commit; noted for each target.
    """
    data: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"about": {}, "kernels": {}}
    )
    built = list(built)
    new = {one.entry.target for one in built}
    rows: dict[str, dict[str, list[float]]] = {
        name: {target: row for target, row in row_of.items() if target not in new}
        for name, row_of in data["kernels"].items()
    }
    for one in built:
        rows.setdefault(one.entry.name, {})[one.entry.target] = [round(one.seconds, 2), one.entry.bytes]
    about_all = {**data["about"], **{target: dict(about) for target in new}}
    lines = [f" {json.dumps(name)}: {json.dumps(rows[name], sort_keys=True)}" for name in sorted(rows) if rows[name]]
    text = (
        '{"about": '
        + json.dumps(about_all, indent=1, sort_keys=True)
        + ',\n"kernels": {\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )
    path.write_text(text, encoding="utf-8")


@functools.cache
def figures() -> dict[str, dict[str, dict[str, Measured]]]:
    """target -> family -> name of a kernel -> what was measured."""
    found: dict[str, dict[str, dict[str, Measured]]] = {}
    for name, row_of in json.loads(FIGURES.read_text(encoding="utf-8"))["kernels"].items():
        axes = _axes(name)
        for target, (seconds, num_bytes) in row_of.items():
            rows = found.setdefault(target, {}).setdefault(name.partition("-")[0], {})
            rows[name] = axes, Estimate(seconds, num_bytes, "measured")
    return found


def _axes(name: str) -> Axes:
    """`"rmsnorm-dtype=bf16-hidden_size=64"` -> `{"dtype": "bf16", "hidden_size": "64"}`."""
    return dict(part.split("=", 1) for part in name.split("-")[1:])


def most_alike(axes: Axes, measured: Sequence[Measured]) -> Measured:
    """Of kernels of one family, the first of those that are least unlike."""
    return min(measured, key=lambda one: _unlikeness(axes, one[0]))


def _unlikeness(ours: Axes, theirs: Axes) -> float:
    """0 for the same kernel; an octave of a size counts as much as another dtype."""
    return sum(_unlike(value, theirs.get(axis, "")) for axis, value in ours.items() if theirs.get(axis) != value)


def _unlike(value: str, other: str) -> float:
    if value.isdigit() and other.isdigit():
        return abs(math.log2((int(value) + 1) / (int(other) + 1)))
    return 1.0


def _unlikeness_of_targets(ours: str, theirs: str) -> tuple[float, ...]:
    if targets.kind(ours) != targets.kind(theirs):
        return (2.0,)
    if targets.kind(ours) == "cpu":
        return (0.0 if ours == theirs else 1.0 if ours[:3] == theirs[:3] else 1.5,)
    (major, minor), (other_major, other_minor) = targets.capability(ours), targets.capability(theirs)
    return (0.0, abs(major - other_major), abs(minor - other_minor), float(ours != theirs))


# ------------------------------------------------------------------------------------------------------------- forecast


@dataclass(frozen=True)
class Forecast:
    """Of the kernels that a build has to compile."""

    estimates: Mapping[KernelSpec, Estimate]

    @property
    def seconds(self) -> float:
        """Of a processor."""
        return math.fsum(estimate.seconds for estimate in self.estimates.values())

    @property
    def bytes(self) -> int:
        return sum(estimate.bytes for estimate in self.estimates.values())

    @property
    def packed_bytes(self) -> int:
        """In a wheel, which is compressed."""
        return int(_PACKED * self.bytes)

    def origins(self) -> Iterator[tuple[str, int]]:
        """Where the estimates come from, and how many from each."""
        for origin in ("last build", "measured", "alike", "guess"):
            count = sum(estimate.origin == origin for estimate in self.estimates.values())
            if count:
                yield origin, count


def forecast(to_compile: Iterable[KernelSpec], noted: Iterable[Built]) -> Forecast:
    estimator = Estimator(noted)
    return Forecast({spec: estimator.of(spec) for spec in to_compile})
