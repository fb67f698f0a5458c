# SPDX-License-Identifier: Apache-2.0
"""What the AOT registries could not answer: recorded once per process and spec. aot/records.py sums records up.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashinfer import events, log
from flashinfer.jit.spec import KernelSpec
from flashinfer.version import __version__


@dataclass(frozen=True)
class Miss:
    spec: dict[str, Any]  # KernelSpec.to_dict()
    name: str
    reason: str  # why AOT did not answer
    resolved_by: str  # "jit-cache", "jit-compile" or "failed"
    seconds: float  # lost to it: lookup, compile, waiting, loading
    bytes: int  # of machine code
    caller: str  # first frame outside this library, "file.py:123"
    time: float  # Unix time
    process: str  # unique over a fleet
    version: str = __version__
    model: str = ""  # flashinfer.tag
    compiled: float = 0.0  # seconds of a compile in this process
    waited: float = 0.0  # seconds of waiting for a compile in another one


@dataclass
class Spent:
    """Where the time of a request goes."""

    seconds: float = 0.0  # in all
    compiled: float = 0.0
    waited: float = 0.0  # for another process


class MissLog:
    """Appends this process's misses to its own file. A file that cannot be written costs one warning, never an
    error."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writable = True
        self._lock = threading.Lock()
        self._recorded: set[tuple[int, KernelSpec, str]] = set()

    def record(self, spec: KernelSpec, reason: str, resolved_by: str, spent: Spent, num_bytes: int) -> None:
        with self._lock:
            key = (os.getpid(), spec, resolved_by)  # a request that fails may be repeated at every step of a server
            if self._writable and key not in self._recorded:
                self._append(spec, reason, resolved_by, spent, num_bytes)
                self._recorded.add(key)

    def after_fork(self) -> None:
        """Forget a lock that a thread of the parent process may have held."""
        self._lock = threading.Lock()

    def _append(self, spec: KernelSpec, reason: str, resolved_by: str, spent: Spent, num_bytes: int) -> None:
        process = _process_name(os.getpid())
        miss = Miss(
            spec.to_dict(),
            spec.name,
            reason,
            resolved_by,
            round(spent.seconds, 4),
            num_bytes,
            _caller(),
            time.time(),
            process,
            model=events.current_tag(),
            compiled=round(spent.compiled, 4),
            waited=round(spent.waited, 4),
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


def to_toml(specs: Iterable[dict[str, Any]]) -> str:
    """Rows ready to paste into a file of aot_configs/. The same kernel for several targets is one row: the build names
    targets."""
    rows = {json.dumps([spec["family"], spec["args"]]): spec for spec in specs}
    return "\n".join(_row(spec) for spec in rows.values())


def _row(spec: dict[str, Any]) -> str:
    lines = ["[[kernel]]", f'family = "{spec["family"]}"']
    lines += [f"{axis} = {json.dumps(value)}" for axis, value in spec["args"].items()]
    return "\n".join(lines) + "\n"
