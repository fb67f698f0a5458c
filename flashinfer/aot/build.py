# SPDX-License-Identifier: Apache-2.0
"""Building a set: specs -> a folder with a registry.json and kernels/<target>/.

    plan     what is asked for and lies there, what has to be compiled, and what becomes of everything else
    compile  by ninja, several kernels per process (worker.py)
    replace  the registry in one step; then files that nothing names any more are removed (kernel_set.py)

A set keeps what it holds: a build adds to it, unless it is told to leave exactly what was asked for. A build that was
stopped goes on where it was when run again. Nothing here needs a GPU or torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from flashinfer import families
from flashinfer.aot import tools, verify, worker
from flashinfer.aot.estimate import DOUBT, Forecast, forecast
from flashinfer.aot.kernel_set import Built, Failure, KernelSet, Key, results, sole_writer, unwritable, write_notes
from flashinfer.errors import FlashInferError, ToolchainMissing, UnsupportedConfig
from flashinfer.jit import description
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry
from flashinfer.jit.toolchain import toolchain
from flashinfer.version import __version__

# Measured: 130 MB for NVRTC with a small kernel, 150 MB for g++; the rest is room for the largest attention kernels.
_BYTES_PER_JOB = 1 << 30
# Several batches per job keep all cores busy to the end; a longer batch than this saves nothing more.
_BATCHES_PER_JOB, _MAX_BATCH = 6, 16
_POLL_SECONDS = 0.1
_LOG_LINES = 20
_LARGEST = 5  # kernels that are named where a set is too large
_KILL_SECONDS = 10.0  # processes that were sent SIGKILL are gone in milliseconds, unless the kernel itself hangs


class SetTooLarge(FlashInferError):
    """The machine code of a set exceeds the limit it was given."""


@dataclass
class Plan:
    """What a build has to do, and what becomes of everything that lies in the folder."""

    held: KernelSet
    to_compile: list[KernelSpec] = field(default_factory=list)
    fresh: list[Built] = field(default_factory=list)  # asked for, and there already
    kept: list[Built] = field(default_factory=list)  # in the set and not asked for
    unusable: dict[Key, str] = field(default_factory=dict)  # of those kept: why this package never uses them
    removed: list[Built] = field(default_factory=list)  # in the set, not asked for, and the set is to be exact
    unfinished: list[Built] = field(default_factory=list)  # compiled by builds that did not end, for when they go on
    dropped: list[Built] = field(default_factory=list)  # the same, but stale by now, or the set is to be exact

    @property
    def num_requested(self) -> int:
        return len(self.fresh) + len(self.to_compile)

    @functools.cached_property
    def forecast(self) -> Forecast:
        """What compiling will take."""
        return forecast(self.to_compile, [*self.held.noted, *self.held.held.values()])

    @property
    def is_done(self) -> bool:
        """Nothing would change."""
        added = [built for built in self.fresh if self.held.held.get(built.key) != built]
        changes = self.to_compile or self.removed or self.dropped or added
        return not changes and self.held.version == version_of(self, self.known)

    @property
    def known(self) -> list[Built]:
        """What the set will hold whatever becomes of the compiles."""
        return [*self.fresh, *self.kept]


@dataclass
class Report:
    plan: Plan
    built: list[Built]  # everything the set holds now
    num_compiled: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def removed(self) -> list[Built]:
        """Nothing where kernels failed: what is asked for is not there yet."""
        return [] if self.failures else self.plan.removed

    @property
    def dropped(self) -> list[Built]:
        return [] if self.failures else self.plan.dropped

    @property
    def bytes(self) -> int:
        return _bytes(self.built)


def plan(
    specs: Iterable[KernelSpec], out: Path, *, exact: bool = False, refresh: bool = False, is_part: bool = False
) -> Plan:
    """Compare what is asked for with what the folder holds: digest, compiler and sha256 must agree.

    Args:
        specs: what the set shall hold.
        out: the folder of the set; need not exist.
        exact: the set shall hold nothing else. Otherwise whatever it holds besides is kept as it is.
        refresh: ask also for every kernel that the set holds and this version knows.
        is_part: these are one machine's part of what is asked for, which may be none.

    Raises:
        FlashInferError: nothing is asked for, `out` is no folder, or its registry cannot be read.
    """
    families.register_all()
    held = KernelSet(out)
    wanted = dict.fromkeys(specs)
    if refresh:
        wanted.update(dict.fromkeys(filter(None, map(_request, held.held.values()))))
    if not wanted and not is_part:
        raise FlashInferError(
            f"nothing to build: {out} holds no kernel that this version has" if refresh else "nothing to build"
        )
    result = Plan(held)
    unfinished = held.unfinished()
    for spec in wanted:
        key = spec.name, spec.target
        candidates = [there[key] for there in (held.held, unfinished) if key in there]
        fresh = next((built for built in candidates if _is_fresh(built.entry, spec, out)), None)
        if fresh is not None:  # how it is launched is no part of its digest, and of old sets not told
            entry = replace(fresh.entry, launch=description.launch(render(spec)))
            result.fresh.append(replace(fresh, entry=entry))
        else:
            result.to_compile.append(spec)
    asked = {(spec.name, spec.target) for spec in wanted}
    others = [built for key, built in held.held.items() if key not in asked]
    if exact:
        result.removed = others
    else:
        result.kept = others
        whys = {built.key: next(verify.findings(out, built.entry), None) for built in others}
        result.unusable = {key: why for key, why in whys.items() if why is not None}
    for key, built in unfinished.items():
        if key not in asked:
            request = None if exact else _request(built)
            goes_on = request is not None and _is_fresh(built.entry, request, out)
            (result.unfinished if goes_on else result.dropped).append(built)
    return result


def build(
    specs: Sequence[KernelSpec],
    out: Path,
    *,
    exact: bool = False,
    refresh: bool = False,
    is_part: bool = False,
    num_jobs: Optional[int] = None,
    max_bytes: Optional[int] = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Report:
    """Compile what a set lacks and write its registry.

    A kernel that fails to compile is reported; the others are kept, and so is the one that the set held in its place.
    Nothing is removed then.

    Args:
        specs, out, exact, refresh, is_part: see `plan`.
        num_jobs: compile processes at a time; None for as many as cores and memory allow.
        max_bytes: fail when the machine code of the whole set is larger, before compiling where an estimate says so;
            the registry is then left as it was.
        on_plan: called with the plan before anything is compiled.

    Raises:
        ToolchainMissing: a compiler, ninja or tqdm is missing; the message names all that is.
        FlashInferError: another build is writing to the set, or the folder cannot be used.
        SetTooLarge: see max_bytes.
    """
    started = time.perf_counter()
    todo = plan(specs, out, exact=exact, refresh=refresh, is_part=is_part)
    tools.check({spec.target for spec in todo.to_compile})
    if todo.is_done:  # a set that is complete may be read-only
        on_plan(todo)
        check_size(todo, todo.known, max_bytes)
        return Report(todo, todo.known, seconds=time.perf_counter() - started)
    with sole_writer(out) as lock:
        todo = plan(
            specs, out, exact=exact, refresh=refresh, is_part=is_part
        )  # again: another build may have ended meanwhile
        on_plan(todo)
        check_size(todo, todo.known, max_bytes)
        check_forecast(todo, max_bytes)
        built, failures = _compile(todo, num_jobs or default_jobs(), lock)
        held = todo.held.held
        remains = [*todo.known, *built, *(held[one.key] for one in failures if one.key in held)]
        report = Report(todo, remains, len(built), failures)
        if failures:
            report.built += todo.removed
        check_size(todo, report.built, max_bytes)
        if report.built or not failures:  # nothing is what some shards of a small set hold
            unfinished = [*todo.unfinished, *(todo.dropped if failures else [])]
            try:
                KernelSet(out).replace(version_of(todo, report.built), report.built, unfinished)
            except OSError as error:
                raise unwritable(out, error) from None
    report.seconds = time.perf_counter() - started
    return report


def version_of(todo: Plan, built: Iterable[Built]) -> str:
    """Of a set that holds these: this package's once all of them are of its sources, until then the one it had.

    So a set that was only added to is not packaged as one of the new version, and the library goes on to warn.
    """
    stale = any(True for one in built for _ in verify.drift(one.entry))
    return todo.held.version if stale and todo.held.version is not None else __version__


def check_size(todo: Plan, built: Sequence[Built], max_bytes: Optional[int]) -> None:
    """Raises SetTooLarge when the machine code of these is more."""
    if max_bytes is not None and _bytes(built) > max_bytes:
        raise _too_large(todo, f"{_bytes(built)} bytes", max_bytes, {one.key: one.entry.bytes for one in built})


def check_forecast(todo: Plan, max_bytes: Optional[int]) -> None:
    """Raises SetTooLarge when the machine code of the set will be more, by an estimate that may be off by DOUBT."""
    ahead, known = todo.forecast, _bytes(todo.known)
    if max_bytes is not None and known + ahead.bytes * (1 - DOUBT) > max_bytes:
        sizes = {one.key: one.entry.bytes for one in todo.known}
        sizes.update({(spec.name, spec.target): one.bytes for spec, one in ahead.estimates.items()})
        raise _too_large(todo, f"about {known + ahead.bytes} bytes", max_bytes, sizes)


def _too_large(todo: Plan, size: str, max_bytes: int, sizes: Mapping[Key, int]) -> SetTooLarge:
    others = f", {_bytes(todo.kept)} of it of kernels that were not asked for" if todo.kept else ""
    largest = heapq.nlargest(_LARGEST, sizes, key=lambda key: (sizes[key], key))
    lines = "".join(f"\n  {sizes[key]:>8} bytes  {key[0]} ({key[1]})" for key in largest)
    return SetTooLarge(
        f"the set would hold {size} of machine code{others}; --max-bytes allows {max_bytes}. The registry was "
        f"not written. Drop rows or targets, raise the limit{', or let the set be --exact' if others else ''}. "
        f"Largest are:{lines}"
    )


def _bytes(built: Iterable[Built]) -> int:
    return sum(one.entry.bytes for one in built)


def default_jobs() -> int:
    """Compile processes this machine can run: its cores, or fewer when memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_memory()
    return max(1, cores if memory is None else min(cores, memory // _BYTES_PER_JOB))


# ---------------------------------------------------------------------------------------------------------------- steps


def _request(built: Built) -> Optional[KernelSpec]:
    """What a kernel answers; None when this version has no such kernel, or would give it another name."""
    entry = built.entry
    try:
        spec = KernelSpec.from_dict({"family": entry.family, "args": entry.args, "target": entry.target})
    except UnsupportedConfig:
        return None
    return spec if spec.name == entry.name else None


def _is_fresh(entry: Entry, spec: KernelSpec, out: Path) -> bool:
    source = render(spec)
    if entry.digest != source.digest:
        return False
    with contextlib.suppress(ToolchainMissing):  # without a compiler at hand, what is there will do
        if entry.compiler != toolchain(source.kind).identity:
            return False
    return _is_whole(entry, out)


def _is_whole(entry: Entry, out: Path) -> bool:
    try:
        return hashlib.sha256((out / entry.file).read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False


def _compile(todo: Plan, num_jobs: int, lock: int) -> tuple[list[Built], list[Failure]]:
    """Compile what a plan lacks. What has been compiled is kept when this is interrupted."""
    out = todo.held.root
    if not todo.to_compile:
        return [], []
    bar = _progress_bar(len(todo.to_compile))
    try:
        write_notes(out, todo.held.noted)  # whole lines only, and none of failures long past
        notes = out / worker.RESULTS
        notes_start = notes.stat().st_size
        scratch = (out / worker.SCRATCH).resolve()
        plan_file, log = scratch / "plan.json", scratch / "log.txt"
        batches = [[spec.to_dict() for spec in batch] for batch in _batches(todo.to_compile, num_jobs)]
        plan_file.write_text(json.dumps({"out": str(out.resolve()), "batches": batches}))
    except OSError as error:
        raise unwritable(out, error) from None
    ours, theirs = socket.socketpair()  # worker.py tells what for
    with ours, theirs, bar, open(log, "wb") as log_file:
        _write_ninja(scratch / "build.ninja", plan_file, theirs.fileno(), len(batches))
        # Batches write no file that ninja could look at: what has to be built is decided by content in `plan`.
        process = subprocess.Popen(
            [tools.ninja() or "ninja", "-C", str(scratch), "-j", str(num_jobs), "-k", "0", "--quiet"],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=_environment(),
            pass_fds=(theirs.fileno(), lock),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
        )
        theirs.close()
        try:
            while process.poll() is None:
                bar.update(_num_lines(notes, notes_start) - bar.n)
                time.sleep(_POLL_SECONDS)
            bar.update(_num_lines(notes, notes_start) - bar.n)
        finally:  # nothing outlives a build, nor a ninja that was killed
            process.kill()
            ours.shutdown(socket.SHUT_WR)
            process.wait()
            ours.settimeout(_KILL_SECONDS)
            with contextlib.suppress(OSError):
                ours.recv(1)
    return _collect(todo.to_compile, out, notes_start, log.read_text(errors="replace"))


def _batches(specs: Sequence[KernelSpec], num_jobs: int) -> list[list[KernelSpec]]:
    size = max(1, min(_MAX_BATCH, len(specs) // (num_jobs * _BATCHES_PER_JOB)))
    count = -(-len(specs) // size)
    # Dealt out like cards: neighbours in a config are alike, and a batch of slow kernels alone would finish last.
    return [list(specs[start::count]) for start in range(count)]


def _write_ninja(path: Path, plan_file: Path, build: int, num_batches: int) -> None:
    command = shlex.join([sys.executable, "-m", worker.__name__, str(plan_file), str(build)]).replace("$", "$$")
    lines = ["rule compile", f"  command = {command} $batch", f"  description = batch $batch of {num_batches}"]
    for number in range(num_batches):
        lines += [f"build batch-{number}: compile", f"  batch = {number}"]
    path.write_text("\n".join(lines) + "\n")


def _environment() -> dict[str, str]:
    """Ours, and the folder this package was imported from, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _progress_bar(num_kernels: int) -> Any:
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    return tqdm(total=num_kernels, desc="compiling", unit="kernel", mininterval=interval)


def _collect(specs: Sequence[KernelSpec], out: Path, notes_start: int, log: str) -> tuple[list[Built], list[Failure]]:
    """What became of each kernel that had to be compiled."""
    wanted = {(spec.name, spec.target): spec for spec in specs}
    built: dict[Key, Built] = {}
    failures: dict[Key, Failure] = {}
    for success, failure in results(out, notes_start):
        if success is not None and (spec := wanted.get(success.key)) is not None:
            if success.entry.digest != render(spec).digest:
                failures[success.key] = Failure(*success.key, "its sources changed during the build; run it again")
            elif _is_whole(success.entry, out):
                built[success.key] = success
        elif failure is not None and failure.key in wanted:
            failures[failure.key] = failure
    last_words = "\n".join(log.splitlines()[-_LOG_LINES:])
    for key in wanted:
        if key not in built and key not in failures:
            why = "its compile process died (out of memory? try fewer --jobs). The last that ninja saw:"
            failures[key] = Failure(*key, f"{why}\n{last_words}")
    return list(built.values()), list(failures.values())


def _num_lines(path: Path, start: int) -> int:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read().count(b"\n")
    except OSError:
        return 0


def _available_memory() -> Optional[int]:
    """Bytes that can still be used: of the machine, or of this container when that is less."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(found) if found else None
