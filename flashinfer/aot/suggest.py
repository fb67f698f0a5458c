# SPDX-License-Identifier: Apache-2.0
"""Which kernels to add to the precompiled set: those that save most within a budget of bytes.

A 0/1 knapsack. `choose` walks through the items by value per byte and keeps, for each weight worth having, the best
choice so far, less those that cannot beat the best known by a millionth. That is exact unless more than `_MAX_STATES`
of them are in the race; then the most promising go on, and what the others could have reached bounds what was missed.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashinfer import families
from flashinfer import target as targets
from flashinfer.aot import advice
from flashinfer.aot.estimate import Estimator
from flashinfer.aot.records import Distinct, Summary, Tally
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import JitCache

_MAX_STATES = 4000
_TIE = 1e-6  # of the value, which a better choice does not matter by

Size = tuple[int, bool]  # bytes, and whether they are an estimate


@dataclass
class Candidate:
    """A row of a config: one kernel, for all targets of a build that can have it."""

    spec: dict[str, Any]
    bytes: int
    is_estimate: bool
    seconds: float = 0.0  # that it saves
    processes: Distinct = field(default_factory=Distinct)  # that it saves some
    misses: list[Tally] = field(default_factory=list)  # that no process has any more


@dataclass
class Suggestion:
    chosen: list[Candidate]  # most value per byte first
    all: list[Candidate]  # in the same order
    targets: list[str]
    value: float  # seconds, or requests of processes
    bound: float  # which no choice within the budget exceeds; equals the value of the best one
    seconds: float  # that the chosen save
    unaffected: float  # seconds that another step than adding kernels saves
    unknown: int  # kernels that this version does not have
    processes_without_misses: int

    @property
    def bytes(self) -> int:
        return sum(candidate.bytes for candidate in self.chosen)


def suggest(
    summary: Summary,
    budget: int,
    target_names: Sequence[str] = (),
    *,
    by_processes: bool = False,
    every_reason: bool = False,
    cache: Path | None = None,
) -> Suggestion:
    """The rows that save most.

    Args:
        budget: bytes of machine code, over all targets.
        target_names: of the build; empty for those that the records are of.
        by_processes: count the processes that miss a kernel rather than the seconds they lose.
        every_reason: count misses too that are mended otherwise, such as by installing flashinfer_aot.
        cache: the JIT cache, for sizes that no record tells.
    """
    names = list(target_names) or sorted({kernel.spec["target"] for kernel in summary.kernels})
    candidates, unaffected, unknown = _candidates(summary, names, every_reason, cache)

    def value(candidate: Candidate) -> float:
        return float(len(candidate.processes)) if by_processes else candidate.seconds

    candidates.sort(key=lambda one: (-value(one) / max(one.bytes, 1), one.bytes, str(one.spec)))
    indices, bound = choose([value(one) for one in candidates], [one.bytes for one in candidates], budget)
    chosen = [candidates[index] for index in indices]
    mended = {id(miss) for one in chosen for miss in one.misses}
    still = Distinct()
    for kernel in summary.kernels:
        if id(kernel) not in mended:
            still.add(list(kernel.processes.as_set()))
    return Suggestion(
        chosen,
        candidates,
        names,
        value=sum(map(value, chosen)),
        bound=bound,
        seconds=sum(one.seconds for one in chosen),
        unaffected=unaffected,
        unknown=unknown,
        processes_without_misses=len(summary.processes) - len(still),
    )


def _candidates(
    summary: Summary, names: Sequence[str], every_reason: bool, cache: Path | None
) -> tuple[list[Candidate], float, int]:
    """With the seconds that no candidate saves, and the number of kernels that cannot be built."""
    families.register_all()
    absent = [kernel for kernel in summary.kernels if advice.NOT_INSTALLED in kernel.reasons]
    in_core = set() if every_reason else {id(kernel) for kernel in advice.in_core(absent)}
    sizes = Sizes(summary.kernels, cache)
    found: dict[str, Candidate] = {}
    unknown = set()
    for kernel in summary.kernels:
        steps = (advice.ADD,) if id(kernel) in in_core else (advice.ADD, advice.INSTALL)
        mended = [reason for reason in kernel.reasons if every_reason or advice.next_step(reason) in steps]
        if not mended or not _serves(names, kernel.spec["target"]):
            continue
        if kernel.name not in found:
            parts = [sizes.of(spec) for spec in _buildable(kernel.spec, names)]
            if not parts:
                unknown.add(kernel.name)
                continue
            found[kernel.name] = Candidate(
                kernel.spec, sum(size for size, _ in parts), any(guess for _, guess in parts)
            )
        candidate = found[kernel.name]
        candidate.seconds += sum(kernel.reasons[reason] for reason in mended)
        candidate.processes.add(list(kernel.processes.as_set()))
        if len(mended) == len(kernel.reasons):
            candidate.misses.append(kernel)
    saved = sum(candidate.seconds for candidate in found.values())
    return list(found.values()), max(0.0, summary.seconds - saved), len(unknown)


def _serves(names: Sequence[str], target: str) -> bool:
    """Whether machine code for one of the targets runs on this one."""
    try:
        return not set(targets.candidates(target)).isdisjoint(names)
    except UnsupportedConfig:
        return False


def _buildable(spec: dict[str, Any], names: Sequence[str]) -> list[KernelSpec]:
    found = []
    for name in names:
        try:
            made = KernelSpec.from_dict({**spec, "target": name})
            specs.family(made.family).config(made)
            found.append(made)
        except (UnsupportedConfig, TypeError):
            continue
    return found


# ---------------------------------------------------------------------------------------------------------------- sizes


class Sizes:
    """Bytes of machine code: as recorded, as in the JIT cache, else as a build would estimate them."""

    def __init__(self, kernels: Iterable[Tally], cache: Path | None) -> None:
        self._known = {(one.name, one.spec["target"]): one.bytes for one in kernels if one.bytes > 0}
        self._estimator = Estimator()
        if cache is not None:
            for spec, size in _in_cache(cache):
                self._known.setdefault((spec.name, spec.target), size)

    def of(self, spec: KernelSpec) -> Size:
        known = self._known.get((spec.name, spec.target))
        return (known, False) if known is not None else (self._estimator.of(spec).bytes, True)


def _in_cache(cache: Path) -> Iterable[tuple[KernelSpec, int]]:
    for folder in JitCache(cache).folders():
        try:
            meta = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
            spec = KernelSpec(meta["family"], tuple(meta["args"].items()), meta["target"])
            yield spec, (folder / meta["file"]).stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # removed meanwhile, or damaged
            continue


# --------------------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class _State:
    weight: int
    value: float
    last: int  # item taken last; -1: none
    before: _State | None


def choose(values: Sequence[float], weights: Sequence[int], budget: int) -> tuple[list[int], float]:
    """The indices of items of the highest value within a budget, ascending, and a bound that no choice exceeds; it
    equals the value of the choice where that is known to be the best, but for a millionth."""
    order = [index for index in range(len(values)) if weights[index] <= budget and values[index] > 0]
    order.sort(key=lambda index: -values[index] / max(weights[index], 1))
    value_before = [0.0, *itertools.accumulate(values[index] for index in order)]
    weight_before = [0, *itertools.accumulate(weights[index] for index in order)]

    def fill(state: _State, start: int) -> tuple[float, int, float]:
        """By items from a place on: what taking whole ones in order adds, up to which, and what parts of one would."""
        room = budget - state.weight
        end = bisect.bisect_right(weight_before, weight_before[start] + room, lo=start) - 1
        whole = value_before[end] - value_before[start]
        if end == len(order):
            return whole, end, whole
        left = room - (weight_before[end] - weight_before[start])
        return whole, end, whole + values[order[end]] * left / weights[order[end]]

    states = [_State(0, 0.0, -1, None)]
    whole, end, part = fill(states[0], 0)
    best, best_state, best_run, missed = whole, states[0], (0, end), 0.0
    for place, index in enumerate(order):
        taken = [
            _State(state.weight + weights[index], state.value + values[index], place, state)
            for state in states
            if state.weight + weights[index] <= budget
        ]
        worth: list[tuple[float, _State]] = []
        most = -1.0
        for state in sorted([*states, *taken], key=lambda one: (one.weight, -one.value)):
            if state.value <= most:
                continue  # another is as light and as good
            most = state.value
            whole, end, part = fill(state, place + 1)
            if state.value + whole > best:
                best, best_state, best_run = state.value + whole, state, (place + 1, end)
            worth.append((state.value + part, state))
        worth = [(reach, state) for reach, state in worth if reach > best * (1 + _TIE)]
        if len(worth) > _MAX_STATES:
            worth.sort(key=lambda one: -one[0])
            missed = max(missed, worth[_MAX_STATES][0])
            worth = worth[:_MAX_STATES]
        states = [state for _, state in worth]
        if not states:
            break
    places = list(range(*best_run))
    taken_before: _State | None = best_state
    while taken_before is not None and taken_before.last >= 0:
        places.append(taken_before.last)
        taken_before = taken_before.before
    return sorted(order[place] for place in places), max(best, missed)
