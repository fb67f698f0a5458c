"""Building a set: specs -> a folder with a registry.json and kernels/<target>/.

    plan     which kernels the folder lacks, or holds of other sources or from another compiler
    compile  those, by ninja, several kernels per process (worker.py)
    finish   the registry, replaced in one step; files it does not name are removed

Nothing here needs a GPU or torch. A build that was stopped goes on where it was when run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from flashinfer.aot import worker
from flashinfer.errors import FlashInferError, ToolchainMissing
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry, Registry
from flashinfer.jit.toolchain import toolchain

# Measured: 130 MB for NVRTC with a small kernel, 150 MB for g++; the rest is room for the largest attention kernels.
_BYTES_PER_JOB = 1 << 30
# Several batches per job keep all cores busy to the end; a longer batch than this saves nothing more.
_BATCHES_PER_JOB, _MAX_BATCH = 6, 16
_POLL_SECONDS = 0.1


class SetTooLarge(FlashInferError):
    """The machine code of a set exceeds the limit it was given."""


@dataclass(frozen=True)
class Built:
    """A kernel that lies in the folder."""

    entry: Entry
    seconds: float  # its compile took, in this build or an earlier one
    spill_bytes: int  # of registers to memory; a kernel that spills is slow


@dataclass(frozen=True)
class Failure:
    name: str
    target: str
    error: str


@dataclass
class Plan:
    """What a build has to do."""

    out: Path
    stale: list[KernelSpec] = field(default_factory=list)  # to be compiled
    fresh: list[Built] = field(default_factory=list)  # lie there already


@dataclass
class Report:
    built: list[Built]  # everything the set holds now
    num_compiled: int
    failures: list[Failure]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(built.entry.bytes for built in self.built)


def plan(specs: Sequence[KernelSpec], out: Path) -> Plan:
    """Compare what is asked for with what the folder holds: digest, compiler and sha256 must agree."""
    done = {(built.entry.name, built.entry.target): built for built, _ in _results(out) if built is not None}
    result = Plan(out)
    for spec in specs:
        built = done.get((spec.name, spec.target))
        if built is not None and _is_fresh(built.entry, spec, out):
            result.fresh.append(built)
        else:
            result.stale.append(spec)
    return result


def build(todo: Plan, num_jobs: Optional[int] = None, max_bytes: Optional[int] = None) -> Report:
    """Compile what a plan lacks and write the registry.

    A kernel that fails to compile is reported and left out; the others are kept.

    Args:
        todo: from `plan`.
        num_jobs: compile processes at a time; None for as many as cores and memory allow.
        max_bytes: fail when the machine code of the whole set is larger; the registry is then left as it was.

    Raises:
        FlashInferError: ninja or tqdm is missing, or another build is writing to the folder.
        SetTooLarge: see max_bytes.
    """
    started = time.perf_counter()
    todo.out.mkdir(parents=True, exist_ok=True)
    with _sole_writer(todo.out):
        results_start = _size(todo.out / worker.RESULTS)
        if todo.stale:
            _compile(todo, num_jobs or default_jobs(), results_start)
        built, failures = _collect(todo, results_start)
        report = Report([*todo.fresh, *built], len(built), failures, time.perf_counter() - started)
        if max_bytes is not None and report.bytes > max_bytes:
            raise SetTooLarge(
                f"the set holds {report.bytes} bytes of machine code, --max-bytes allows {max_bytes}; the registry was "
                f"not written. Drop rows or targets, or raise the limit"
            )
        _finish(todo.out, report.built)
    return report


def default_jobs() -> int:
    """Compile processes this machine can run: its cores, or fewer when memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_memory()
    return max(1, cores if memory is None else min(cores, memory // _BYTES_PER_JOB))


# ---------------------------------------------------------------------------------------------------------------- steps


def _is_fresh(entry: Entry, spec: KernelSpec, out: Path) -> bool:
    source = render(spec)
    if entry.digest != source.digest:
        return False
    with contextlib.suppress(ToolchainMissing):  # without a compiler at hand, what is there will do
        if entry.compiler != toolchain(source.kind).identity:
            return False
    try:
        return hashlib.sha256((out / entry.file).read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False


@contextlib.contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Two builds of one folder would remove each other's files."""
    import filelock

    lock = filelock.FileLock(str(out / f"{worker.RESULTS}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FlashInferError(f"another build is writing to {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def _compile(todo: Plan, num_jobs: int, results_start: int) -> None:
    with tempfile.TemporaryDirectory(prefix="flashinfer-aot-") as folder:
        batches = _batches(todo.stale, num_jobs)
        plan_file = Path(folder, "plan.json")
        requests = [[spec.to_dict() for spec in batch] for batch in batches]
        plan_file.write_text(json.dumps({"out": str(todo.out.resolve()), "batches": requests}))
        _write_ninja(Path(folder, "build.ninja"), plan_file, len(batches))
        # Batches write no file that ninja could look at: what has to be built is decided by content in `plan`.
        command = [_ninja(), "-C", folder, "-j", str(num_jobs), "-k", "0", "--quiet"]
        with open(Path(folder, "log.txt"), "w+") as log_file:
            process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=_environment())
            try:
                _watch(process, todo, results_start)
            except BaseException:  # Ctrl-C reached ninja and the compilers too; what they finished is kept
                process.terminate()
                process.wait()
                raise


def _batches(specs: Sequence[KernelSpec], num_jobs: int) -> list[list[KernelSpec]]:
    size = max(1, min(_MAX_BATCH, len(specs) // (num_jobs * _BATCHES_PER_JOB)))
    count = -(-len(specs) // size)
    # Dealt out like cards: neighbours in a config are alike, and a batch of slow kernels alone would finish last.
    return [list(specs[start::count]) for start in range(count)]


def _write_ninja(path: Path, plan_file: Path, num_batches: int) -> None:
    command = shlex.join([sys.executable, "-m", worker.__name__, str(plan_file)]).replace("$", "$$")
    lines = ["rule compile", f"  command = {command} $batch", f"  description = batch $batch of {num_batches}"]
    for number in range(num_batches):
        lines += [f"build batch-{number}: compile", f"  batch = {number}"]
    path.write_text("\n".join(lines) + "\n")


def _environment() -> dict[str, str]:
    """Ours, and the folder this package was imported from, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise FlashInferError("ninja was not found; pip install 'flashinfer[build]'")
    return found


def _watch(process: subprocess.Popen[bytes], todo: Plan, results_start: int) -> None:
    """Show progress until ninja has ended."""
    try:
        from tqdm import tqdm
    except ImportError:
        process.terminate()
        raise FlashInferError("tqdm was not found; pip install 'flashinfer[build]'") from None
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    with tqdm(total=len(todo.stale), desc="compiling", unit="kernel", mininterval=interval) as bar:
        while True:
            ended = process.poll() is not None
            bar.update(_num_lines(todo.out / worker.RESULTS, results_start) - bar.n)
            if ended:
                return
            time.sleep(_POLL_SECONDS)


def _collect(todo: Plan, results_start: int) -> tuple[list[Built], list[Failure]]:
    """What became of each kernel that had to be compiled."""
    wanted = {(spec.name, spec.target): spec for spec in todo.stale}
    built: dict[tuple[str, str], Built] = {}
    failures: dict[tuple[str, str], Failure] = {}
    for success, failure in _results(todo.out, results_start):
        if success is not None:
            key = (success.entry.name, success.entry.target)
            spec = wanted.get(key)
            if spec is None:
                continue
            if success.entry.digest == render(spec).digest:
                built[key] = success
            else:
                failures[key] = Failure(*key, "its sources changed during the build; run it again")
        elif failure is not None and (failure.name, failure.target) in wanted:
            failures[failure.name, failure.target] = failure
    for key in wanted:
        if key not in built and key not in failures:
            failures[key] = Failure(*key, "its compile process died without a word (out of memory? try fewer --jobs)")
    return list(built.values()), list(failures.values())


def _finish(out: Path, built: Sequence[Built]) -> None:
    Registry.write(out, [one.entry for one in built])
    lines = [{"entry": vars(one.entry), "seconds": one.seconds, "spill_bytes": one.spill_bytes} for one in built]
    partial = out / f"{worker.RESULTS}.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(out / worker.RESULTS)
    named = {out / one.entry.file for one in built}
    for path in sorted((out / "kernels").rglob("*"), reverse=True):  # files before their folders
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path not in named:
            path.unlink()


# -------------------------------------------------------------------------------------------------------------- results


def _results(out: Path, start: int = 0) -> Iterator[tuple[Optional[Built], Optional[Failure]]]:
    """Lines of the result file from a byte on. A line cut short by a crash is skipped: its kernel is built again."""
    try:
        with open(out / worker.RESULTS, "rb") as file:
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
