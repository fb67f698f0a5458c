# SPDX-License-Identifier: Apache-2.0
"""Joining sets that several machines have built: shards of one config, or targets."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashinfer.aot import verify, worker
from flashinfer.aot.kernel_set import Built, KernelSet, Key, sole_writer, unwritable, write_notes
from flashinfer.errors import FlashInferError
from flashinfer.version import __version__

_MAX_LISTED = 10


class Conflict(FlashInferError):
    """Sets that cannot be one, or a set that is damaged. The message lists what is wrong, a line each."""


@dataclass
class Merged:
    built: list[Built]  # everything the set holds now
    brought: dict[Path, int]  # set -> kernels that no set before it had


def merge(sources: Sequence[Path], out: Path) -> Merged:
    """Have a set hold what several hold, and what it held itself. Does nothing where there is a conflict.

    The set is the one that a single machine would have built, to the byte, whatever the order of the sources.

    Args:
        sources: folders of sets, none of which is changed; `out` may be among them.
        out: the folder of the joint set; need not exist.

    Raises:
        Conflict: two sets hold different kernels of one name and target, kernels of one target by different compilers,
            or kernels of different versions of the sources; or a file is not what its registry says.
        FlashInferError: a source holds no registry or one that cannot be read; `out` is in use or cannot be written.
    """
    _refuse(_sets(sources, out), out)
    with sole_writer(out):
        sets = _sets(sources, out)
        _refuse(sets, out)  # again: a build may have changed it meanwhile
        held = next((each for each in sets if each.root == out), KernelSet(out))
        joint: dict[Key, Built] = {}
        brought = {}
        for each in sets:
            new = {key: built for key, built in each.held.items() if key not in joint}
            brought[each.root] = len(new)
            joint.update(new)
        # First, so that a merge that is killed leaves no machine code that no note names.
        write_notes(out, [*held.noted, *(built for key, built in joint.items() if key not in held.held)])
        for each in sets:
            if each is not held:
                _copy(each.root, each.held.values(), out)
        unfinished = [built for key, built in held.unfinished().items() if key not in joint]
        built = sorted(joint.values(), key=lambda one: one.key)
        KernelSet(out).replace(sets[0].version or __version__, built, unfinished)
    return Merged(built, brought)


def _sets(sources: Sequence[Path], out: Path) -> list[KernelSet]:
    """The one to merge into first, where it holds anything."""
    held = KernelSet(out)
    sets = [] if held.version is None else [held]
    for source in dict.fromkeys(sources):
        if source.resolve() == out.resolve():
            continue
        sets.append(KernelSet(source))
        if sets[-1].version is None:
            raise FlashInferError(f"{source} holds no registry.json; expected the folder of a set that was built")
    if not sets:
        raise FlashInferError(f"nothing to merge: {out} holds no set")
    return sets


def _refuse(sets: Sequence[KernelSet], out: Path) -> None:
    wrong = [*_conflicts(sets), *(line for each in sets if each.root != out for line in _damage(each))]
    if wrong:
        more = f"\n  ... and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        lines = "".join(f"\n  {line}" for line in wrong[:_MAX_LISTED])
        raise Conflict(f"the sets cannot be merged; {out} is as it was:{lines}{more}")


def _conflicts(sets: Sequence[KernelSet]) -> Iterator[str]:
    first = sets[0]
    for other in sets[1:]:
        if other.version != first.version:
            yield f"{other.root} is of version {other.version}, {first.root} of {first.version}"
    compilers: dict[str, dict[str, Path]] = {}  # target -> compiler -> a set with kernels of it
    for each in sets:
        for built in each.held.values():
            compilers.setdefault(built.entry.target, {}).setdefault(built.entry.compiler, each.root)
    for target, by in sorted(compilers.items()):
        if len(by) > 1:
            yield f"{target}: " + ", ".join(f"{root} was compiled by {compiler}" for compiler, root in by.items())
    seen: dict[Key, tuple[Built, Path]] = {}
    for each in sets:
        for key, built in each.held.items():
            before, root = seen.setdefault(key, (built, each.root))
            differing = [name for name, value in vars(built.entry).items() if vars(before.entry)[name] != value]
            if differing:
                yield f"{key[0]} ({key[1]}) differs between {root} and {each.root}: {', '.join(differing)}"


def _damage(source: KernelSet) -> Iterator[str]:
    for built in source.held.values():
        for why in verify.damage(source.root, built.entry):
            yield f"{source.root}: {built.entry.file} {why}"


def _copy(root: Path, built: Iterable[Built], out: Path) -> None:
    """Each file in one step, as a compile process puts it there."""
    partial = out / worker.SCRATCH / "merged"
    for one in built:
        path = out / one.entry.file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / one.entry.file, partial)
            partial.replace(path)
        except OSError as error:
            raise unwritable(out, error) from None
