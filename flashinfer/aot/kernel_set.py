# SPDX-License-Identifier: Apache-2.0
"""The folder of a set, and how a build changes it without losing what it holds.

    registry.json         what the set holds; replaced in one step, once everything it names is on disk
    kernels/<target>/     machine code, named by content: no build touches a file that an earlier registry speaks of
    build.jsonl           notes, a line per kernel compiled or failed; a build that did not end goes on from its own
    build.jsonl.lock      locked as long as any process of a build lives
    .flashinfer-build/    scratch of the build at work

Nothing else in the folder is ours, and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from flashinfer.aot import worker
from flashinfer.errors import FlashInferError
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry, Registry, replacing

Key = tuple[str, str]  # name and target of a kernel: there is one of each in a set

# A killed build needs a moment to end (worker.py); one that is at work takes longer than anybody would wait unasked.
_LOCK_PATIENCE_SECONDS, _LOCK_POLL_SECONDS = 2.0, 0.05


@dataclass(frozen=True)
class Built:
    """A kernel that lies in the folder."""

    entry: Entry
    seconds: float = 0.0  # of a processor that its compile took, in whichever build; 0 where no note tells
    spill_bytes: int = 0  # of registers to memory; a kernel that spills is slow

    @property
    def key(self) -> Key:
        return self.entry.name, self.entry.target


@dataclass(frozen=True)
class Failure:
    name: str
    target: str
    error: str

    @property
    def key(self) -> Key:
        return self.name, self.target


class KernelSet:
    """What a folder holds, as read at one moment. A folder that is empty or not there yet holds nothing."""

    def __init__(self, root: Path) -> None:
        """Raises FlashInferError when the path is no folder, or its registry cannot be read."""
        if root.exists() and not root.is_dir():
            raise FlashInferError(f"{root} is a file; expected the folder of a set, or the name of a new one")
        self.root = root
        self.version: Optional[str] = None  # of the sources of its kernels; None: there is no registry
        self.noted = [built for built, _ in results(root) if built is not None]
        self.held: dict[Key, Built] = {}
        if not (root / "registry.json").exists():
            return
        try:
            registry = Registry(root)
        except (OSError, ValueError) as error:
            raise FlashInferError(
                f"the registry in {root} is not usable: {error}. Nothing was changed: mend it, delete it to give the "
                f"set up, or choose another --out"
            ) from None
        self.version = registry.version
        notes = {(built.key, built.entry.sha256): built for built in self.noted}
        for entry in registry.entries:
            key = entry.name, entry.target
            note = notes.get((key, entry.sha256), Built(entry))
            self.held[key] = Built(entry, note.seconds, note.spill_bytes)

    def unfinished(self) -> dict[Key, Built]:
        """The newest note of each kernel that the registry does not name: what builds compiled that did not end."""
        newest = {built.key: built for built in self.noted}
        return {key: built for key, built in newest.items() if key not in self.held or self.held[key] != built}

    def replace(self, version: str, built: Sequence[Built], unfinished: Iterable[Built]) -> None:
        """Have the set hold these kernels and the notes of `unfinished` ones; delete what it held besides.

        The order makes each step safe to be killed after: a registry never names a file that is gone, and a file that
        nothing names any more is still in the notes of the next build.
        """
        if {one.key: one for one in built} != self.held or version != self.version:
            Registry.write(self.root, [one.entry for one in built], version)
        kept = [*built, *unfinished]
        _delete(self.root, _files([*self.noted, *self.held.values()]) - _files(kept))
        write_notes(self.root, kept)


def _files(built: Iterable[Built]) -> set[str]:
    return {os.path.normpath(one.entry.file) for one in built}


def _delete(root: Path, files: Iterable[str]) -> None:
    machine_code = (root / "kernels").resolve()
    for file in files:
        path = root / file
        if not path.parent.resolve().is_relative_to(machine_code):  # a registry from elsewhere may name anything
            continue
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


# ---------------------------------------------------------------------------------------------------------------- notes


def results(root: Path, start: int = 0) -> Iterator[tuple[Optional[Built], Optional[Failure]]]:
    """Lines of the notes from a byte on. A line cut short by a crash is skipped: its kernel is built again."""
    try:
        with open(root / worker.RESULTS, "rb") as file:
            file.seek(start)
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield _result(json.loads(line))


def _result(data: dict[str, Any]) -> tuple[Optional[Built], Optional[Failure]]:
    if "error" in data:
        spec = KernelSpec.from_dict(data["request"])
        return None, Failure(spec.name, spec.target, data["error"])
    return Built(Entry(**data["entry"]), data["seconds"], data["spill_bytes"]), None


def write_notes(root: Path, built: Iterable[Built]) -> None:
    lines = [{"entry": vars(one.entry), "seconds": one.seconds, "spill_bytes": one.spill_bytes} for one in built]
    with replacing(root / worker.RESULTS) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def sole_writer(root: Path) -> Iterator[int]:
    """Hold the lock of a set, and have a scratch folder; makes the set's folder where there is none.

    Two builds of one set would lose each other's kernels. The lock belongs to an open file, which compile processes
    inherit with the descriptor yielded here: when a build is killed it is free once the last of them has ended.

    Raises:
        FlashInferError: another build has the lock, or the folder cannot be written.
    """
    import fcntl

    scratch = root / worker.SCRATCH
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / f"{worker.RESULTS}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(root, error) from None
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise unwritable(root, error) from None
            if time.monotonic() > deadline:
                raise FlashInferError(f"another build is writing to {root}; wait for it, or choose another --out")
            time.sleep(_LOCK_POLL_SECONDS)
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            yield lock
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def unwritable(root: Path, error: OSError) -> FlashInferError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "free space there and run it again: it goes on with what lies there"
    else:
        step = "expected a folder of your own: choose another --out, or build into a copy of the set"
    return FlashInferError(f"{root} cannot be written ({error.strerror}); {step}")
