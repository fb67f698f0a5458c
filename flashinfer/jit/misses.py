"""What the AOT registries could not answer: recorded once per process and spec, and summed up over a fleet.

A record is one JSON line in `<cache>/misses/<host>-<pid>-<start>.jsonl`. Files of many machines merge by
concatenation. A warm JIT cache does not hide a hole in the core set: `resolved_by` tells which of the two a process
had.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flashinfer import log
from flashinfer.jit.spec import KernelSpec
from flashinfer.version import __version__


@dataclass(frozen=True)
class Miss:
    spec: dict[str, Any]  # KernelSpec.to_dict()
    name: str
    reason: str  # why AOT did not answer
    resolved_by: str  # "jit-cache", "jit-compile" or "failed"
    seconds: float  # lost to it: lookup and compile
    bytes: int  # of machine code
    caller: str  # first frame outside this library, "file.py:123"
    time: float  # Unix time
    process: str  # unique over a fleet
    version: str = __version__


class MissLog:
    """Appends this process's misses to its own file. A file that cannot be written costs one warning, never an
    error."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writable = True
        self._lock = threading.Lock()
        self._recorded: set[tuple[int, KernelSpec, str]] = set()

    def record(self, spec: KernelSpec, reason: str, resolved_by: str, seconds: float, num_bytes: int) -> None:
        with self._lock:
            key = (os.getpid(), spec, resolved_by)  # a request that fails may be repeated at every step of a server
            if self._writable and key not in self._recorded:
                self._recorded.add(key)
                self._append(spec, reason, resolved_by, seconds, num_bytes)

    def after_fork(self) -> None:
        """Forget a lock that a thread of the parent process may have held."""
        self._lock = threading.Lock()

    def _append(self, spec: KernelSpec, reason: str, resolved_by: str, seconds: float, num_bytes: int) -> None:
        process = _process_name(os.getpid())
        miss = Miss(
            spec.to_dict(),
            spec.name,
            reason,
            resolved_by,
            round(seconds, 4),
            num_bytes,
            _caller(),
            time.time(),
            process,
        )
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with open(self._root / f"{process}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(miss)) + "\n")
        except OSError as error:
            self._writable = False
            log.warn_once(f"misses of the AOT registry are not recorded: {self._root}: {error.strerror}")


@functools.cache
def _process_name(pid: int) -> str:
    """Unique over a fleet, and over time: pids come back. Keyed by pid, so that a forked child gets a name of its
    own."""
    return f"{socket.gethostname()}-{pid}-{int(time.time() * 1000)}"


def _caller() -> str:
    package = str(Path(__file__).parent.parent) + os.sep
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# -------------------------------------------------------------------------------------------------------------- reports


@dataclass
class Hole:
    """One kernel missing from the core set, over all processes that asked for it."""

    spec: dict[str, Any]
    name: str
    seconds: float = 0.0
    bytes: int = 0
    processes: set[str] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    resolved_by: set[str] = field(default_factory=set)
    callers: set[str] = field(default_factory=set)


def read(paths: Iterable[Path]) -> tuple[list[Miss], int]:
    """Records from files and folders, and the number of lines that are not records (a process killed while writing)."""
    misses, broken = [], 0
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    misses.append(_parse(line))
                except (ValueError, TypeError, KeyError):
                    broken += 1
    return misses, broken


def _parse(line: str) -> Miss:
    """A record of this version, or of a later one with more fields."""
    data = json.loads(line)
    miss = Miss(**{entry.name: data[entry.name] for entry in fields(Miss)})
    if not all(isinstance(getattr(miss, entry.name), _TYPES[str(entry.type)]) for entry in fields(Miss)):
        raise TypeError("a field has another type")
    if not isinstance(miss.spec["args"], dict) or not {"family", "target"} <= miss.spec.keys():
        raise TypeError("not a kernel")
    return miss


_TYPES: dict[str, Any] = {"dict[str, Any]": dict, "str": str, "int": int, "float": (int, float)}


def aggregate(misses: Iterable[Miss]) -> list[Hole]:
    """Holes of the core set, costliest first."""
    holes: dict[tuple[str, str], Hole] = {}
    for miss in misses:
        hole = holes.setdefault((miss.name, miss.spec["target"]), Hole(miss.spec, miss.name))
        hole.seconds += miss.seconds
        hole.bytes = max(hole.bytes, miss.bytes)
        hole.processes.add(miss.process)
        hole.reasons.add(miss.reason)
        hole.resolved_by.add(miss.resolved_by)
        hole.callers.add(miss.caller)
    return sorted(holes.values(), key=lambda hole: (-hole.seconds, hole.name))


def to_toml(specs: Iterable[dict[str, Any]]) -> str:
    """Rows ready to paste into a file of aot_configs/. The same kernel for several targets is one row: the build names
    targets."""
    rows = {json.dumps([spec["family"], spec["args"]]): spec for spec in specs}
    return "\n".join(_row(spec) for spec in rows.values())


def _row(spec: dict[str, Any]) -> str:
    lines = ["[[kernel]]", f'family = "{spec["family"]}"']
    lines += [f"{axis} = {json.dumps(value)}" for axis, value in spec["args"].items()]
    return "\n".join(lines) + "\n"
