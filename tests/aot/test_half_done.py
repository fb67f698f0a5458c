# SPDX-License-Identifier: Apache-2.0
"""Builds that do not end, and two at once: nothing is lost, nothing is left running, and the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashinfer.aot import build, kernel_set, worker
from flashinfer.errors import FlashInferError
from flashinfer.jit.stores import AotStore, Hit, Registry
from tests.aot.kit import (
    BOTH,
    HOST,
    artifacts,
    assert_sound,
    build_set,
    change_registry,
    command,
    failing_compiler,
    has_nvrtc,
    kernels_of,
    registry_of,
    rmsnorm_rows,
    run,
    run_cli,
    run_script,
    tree,
    write_config,
)
from tests.kit import PATIENCE_SECONDS, rmsnorm_spec, wait_until

OTHER_DIGEST = "0" * 64

# -------------------------------------------------------------------------------------------------------- really killed

MARK = "BUILD_UNDER_TEST"  # environment variable that every process of a build inherits
PREFILL = """
[[kernel]]
family = "prefill"
q_dtype = "bf16"
kv_dtype = "bf16"
head_dim_qk = 64
head_dim_vo = 64
kv_storage = "paged"
o_dtype = "bf16"
queries = "{queries}"
large_pages = false
mask = "{mask}"
pos_encoding = "none"
has_window = false
has_soft_cap = false
has_sinks = false
device_scales = false
"""


def living(mark: str) -> dict[int, str]:
    """Command lines of the processes that carry the mark, but not of zombies: nothing of those runs."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile
                continue
    return found


def wait_until_gone(mark: str, alive: set[int]) -> None:
    """These processes, left to themselves, would wait for longer than this does; and no other may start."""

    def gone() -> bool:
        left = living(mark)
        assert left.keys() <= alive, left
        return not left

    wait_until(gone)


@contextmanager
def building(mark: str, argv: list[str], **variables: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A build by scripts/build_aot.py, or what else `argv` runs; nothing of it is left afterwards."""
    process = (run if argv[0] == sys.executable else run_script)(argv, **variables, **{MARK: mark})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in living(mark):
            with suppress(ProcessLookupError):  # ended meanwhile
                os.kill(pid, signal.SIGKILL)


def stubborn_compiler(folder: Path) -> Path:
    """One that heeds no signal it can ignore and waits for a process of its own, when hidden_size is 65. It notes the
    numbers of that process and of its parent."""
    waits = f"sleep 600 & echo $! $PPID > '{folder / 'started'}'; wait; sleep 600"
    return failing_compiler(folder, f"trap '' INT TERM HUP QUIT; {waits}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_build_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    mark, out = uuid.uuid4().hex, tmp_path / "set"
    config = write_config(tmp_path, rmsnorm_rows(65, 64, vec_size=1))
    compiler = stubborn_compiler(tmp_path)
    with building(mark, command(config, out, "--jobs", "2"), FLASHINFER_CXX=compiler) as process:
        wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text().endswith("\n"))
        wait_until(lambda: (out / worker.RESULTS).exists() and b"\n" in (out / worker.RESULTS).read_bytes())
        for part in ("build_aot.py", "ninja", worker.__name__, "failing-g++", "sleep 600"):
            wait_until(lambda part=part: any(part in line for line in living(mark).values()))
        compiling = int((tmp_path / "started").read_text().split()[1])  # the compile process that waits for a compiler
        held = [os.readlink(entry) for entry in Path(f"/proc/{compiling}/fd").iterdir()]
        assert str(out / f"{worker.RESULTS}.lock") in held, "the lock outlives the build as long as this does"
        process.send_signal(number)
        wait_until(lambda: not living(mark).keys() - {process.pid})
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)  # interrupted, it still says so
    assert process.returncode == (130 if number == signal.SIGINT else -number), errors
    assert not (out / "registry.json").exists()

    # The next build has the lock at once, and goes on where this one was.
    (tmp_path / "started").unlink()
    with building(mark, command(config, out), FLASHINFER_CXX=failing_compiler(tmp_path, ":")) as process:
        text, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    first_line = text.splitlines()[0]
    assert first_line.startswith("2 kernels: ") and " 0 up to date" not in first_line
    assert len(kernels_of(out)) == len(artifacts(out)) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "build.jsonl", "build.jsonl.lock", "kernels", "registry.json",
    ]  # fmt: skip
    assert_sound(out)


def test_a_killed_build_starts_no_more_compile_processes(tmp_path: Path) -> None:
    """ninja does not stop at one that fails, and would go on to the next."""
    mark, out = uuid.uuid4().hex, tmp_path / "set"
    config = write_config(tmp_path, rmsnorm_rows(*range(1, 72), vec_size=1))
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1.2.3; else exec sleep 600; fi\n')
    compiler.chmod(0o755)
    with building(mark, command(config, out, "--jobs", "6"), FLASHINFER_CXX=compiler) as process:
        wait_until(lambda: list(living(mark).values()).count("sleep 600 ") == 6)
        alive = set(living(mark))
        process.kill()
        wait_until_gone(mark, alive)


def test_a_build_killed_inside_of_nvrtc(tmp_path: Path) -> None:
    """Which compiles in the compile process itself, for a second of a processor here, and hears nothing meanwhile."""
    if not has_nvrtc():
        pytest.skip("needs NVRTC")
    mark, out = uuid.uuid4().hex, tmp_path / "set"
    rows = [
        PREFILL.format(queries=queries, mask=mask) for queries in ("medium", "short") for mask in ("causal", "none")
    ]
    config = write_config(tmp_path, "".join(rows))
    argv = ["--config", str(config), "--target", "sm_90a", "--out", str(out), "--jobs", "1"]
    with building(mark, argv) as process:
        wait_until(
            lambda: any("libnvrtc" in _maps(pid) for pid, line in living(mark).items() if worker.__name__ in line)
        )
        alive = set(living(mark))
        process.kill()
        wait_until_gone(mark, alive)
    assert (out / worker.RESULTS).read_text() == "", "no compile went on to its end"


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_a_killed_ninja_takes_its_compilers_along(tmp_path: Path) -> None:
    """The build reports what it lost and keeps what it has, as soon as they are gone."""
    mark, out = uuid.uuid4().hex, tmp_path / "set"
    config = write_config(tmp_path, rmsnorm_rows(64, 65, vec_size=1))
    patient = f"import sys; from flashinfer.aot import build; build._KILL_SECONDS = {10 * PATIENCE_SECONDS}; "
    patient += "from flashinfer.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", patient, "aot", "build", *command(config, out, "--jobs", "1")]
    with building(mark, argv, FLASHINFER_CXX=stubborn_compiler(tmp_path)) as process:
        wait_until((tmp_path / "started").exists)
        (ninja,) = [pid for pid, line in living(mark).items() if "ninja" in line.partition(" ")[0]]
        os.kill(ninja, signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert not living(mark)
    assert process.returncode == 1
    assert "its compile process died" in errors
    assert kernels_of(out) == {(64, HOST)}
    assert_sound(out)


def test_a_killed_warmup_leaves_nothing_running(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    config = write_config(tmp_path, rmsnorm_rows(65, 64, vec_size=1))
    argv = [sys.executable, "-m", "flashinfer", "warmup", "--config", str(config), "--target", HOST, "--jobs", "2"]
    variables = {"FLASHINFER_CXX": str(stubborn_compiler(tmp_path)), "FLASHINFER_CACHE_DIR": str(tmp_path / "cache")}
    with building(mark, argv, **variables) as process:
        wait_until((tmp_path / "started").exists)
        assert len(living(mark)) >= 5, "two compile processes, a compiler and what it waits for"
        process.kill()
        wait_until(lambda: not living(mark))


def test_progress_counts_this_build_alone(
    unfinished: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what earlier ones noted, nor a line that a kill cut short."""
    with open(unfinished / worker.RESULTS, "a") as notes:
        notes.write('{"request": {}, "error": "of long ago"}\n{"entry": {"na')
    bars = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.n, self.highest = total, 0, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.n += count
            self.highest = max(self.highest, self.n)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(build, "_progress_bar", Bar)
    assert build_set(rows(192, 256), unfinished, num_jobs=1).num_compiled == 2
    ((bar),) = bars
    assert (bar.total, bar.n, bar.highest) == (2, 2, 2)
    notes_left = (unfinished / worker.RESULTS).read_text()
    assert "of long ago" not in notes_left and len(notes_left.splitlines()) == 4


# ------------------------------------------------------------------------------------------------------ what they leave


@pytest.fixture
def unfinished(host_copy: Path) -> Path:
    """A set of rmsnorm 64, and rmsnorm 128 as a build leaves it that ends after compiling."""
    change_registry(
        host_copy, kernels=[one for one in registry_of(host_copy)["kernels"] if one["args"]["hidden_size"] == 64]
    )
    return host_copy


def test_another_build_keeps_the_progress_of_one_that_did_not_end(unfinished: Path, rows: Callable[..., Path]) -> None:
    assert_sound(unfinished)
    assert build_set(rows(192), unfinished).num_compiled == 1
    assert kernels_of(unfinished) == {(64, HOST), (192, HOST)}
    assert_sound(unfinished)
    assert build_set(rows(64, 128), unfinished).num_compiled == 0
    assert kernels_of(unfinished) == BOTH | {(192, HOST)}
    assert_sound(unfinished)


def test_progress_of_no_more_use_is_dropped(
    unfinished: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (unfinished / worker.RESULTS).read_text().splitlines()]
    for line in lines:
        if line["entry"]["args"]["hidden_size"] == 128:
            line["entry"]["digest"] = OTHER_DIGEST
    (unfinished / worker.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = command(rows(192), unfinished)
    assert run_cli("aot", "build", *argv, "--dry-run") == 0
    assert "would remove: 1 kernel that builds which did not end had left behind" in capsys.readouterr().out
    assert run_cli("aot", "build", *argv) == 0
    assert "removed: 1 kernel that builds which did not end had left behind" in capsys.readouterr().out
    assert len(artifacts(unfinished)) == 2
    assert_sound(unfinished)


def test_exact_drops_progress_too(unfinished: Path, rows: Callable[..., Path]) -> None:
    report = build_set(rows(64, 192), unfinished, exact=True)
    assert len(report.dropped) == 1 and len(artifacts(unfinished)) == 2
    assert_sound(unfinished)


@pytest.mark.parametrize("moment", ["_report", "replace"])
def test_a_compile_process_may_be_killed_before_either_of_its_last_steps(
    moment: str, host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs that kernel's compile, and leaves no machine code that nothing names."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, kernel_set.sole_writer(host_copy), pytest.raises(Killed):
        patched.setattr(worker if moment == "_report" else Path, moment, killed)
        worker._attempt(host_copy, rmsnorm_spec(192).to_dict())
    assert len(artifacts(host_copy)) == 2
    assert build_set(rows(64), host_copy).num_compiled == 0
    assert build_set(rows(192), host_copy).num_compiled == 1
    assert len(artifacts(host_copy)) == 3
    assert_sound(host_copy)


class Killed(BaseException):
    """Stands for a kill at one moment of the last step."""


@pytest.mark.parametrize("moment", ["registry", "delete", "notes"])
@pytest.mark.parametrize("after", [False, True])
def test_a_build_may_be_killed_between_any_two_steps(
    moment: str, after: bool, wide_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set is sound at once, and the next build leaves no file behind."""
    where, name = {
        "registry": (Registry, "write"),
        "delete": (kernel_set, "_delete"),
        "notes": (kernel_set, "write_notes"),
    }[moment]
    step = getattr(where, name)

    def killed(*args: Any) -> None:
        if after:
            step(*args)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(where, name, staticmethod(killed) if where is Registry else killed)
        with pytest.raises(Killed):
            build_set(rows(64), wide_copy, HOST, exact=True)
    assert (64, HOST) in kernels_of(wide_copy)
    store = AotStore([wide_copy])
    assert all(isinstance(store.find(rmsnorm_spec(size, on)), Hit) for size, on in kernels_of(wide_copy))
    assert build_set(rows(64), wide_copy, HOST, exact=True).num_compiled == 0
    assert kernels_of(wide_copy) == {(64, HOST)}
    assert {path.relative_to(wide_copy).as_posix() for path in artifacts(wide_copy)} == {
        one["file"] for one in registry_of(wide_copy)["kernels"]
    }
    assert_sound(wide_copy)


def test_rebuilding_leaves_the_files_of_the_registry_alone(
    host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another compiler makes other machine code of the same source: until the registry says so, what it
    names is there."""
    monkeypatch.setenv("FLASHINFER_CXX", str(other_compiler(host_copy.parent)))
    monkeypatch.setattr(build, "check_forecast", lambda *_: None)  # too large only in the end
    before = tree(host_copy / "kernels")
    with pytest.raises(build.SetTooLarge):
        build_set(rows(64, 128), host_copy, max_bytes=1)
    after = tree(host_copy / "kernels")
    assert len(after) == len(before) + 2, "compiled anew, beside what was there"
    assert {name: after[name] for name in before} == before
    assert build_set(rows(64, 128), host_copy).num_compiled == 0
    assert len(artifacts(host_copy)) == 2
    assert_sound(host_copy)


def other_compiler(folder: Path) -> Path:
    script = folder / "other-g++"
    script.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1.2.3; else exec g++ -g "$@"; fi\n')
    script.chmod(0o755)
    return script


# --------------------------------------------------------------------------------------------------- two builds at once


def test_two_builds_of_one_set(
    host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_set, "_LOCK_PATIENCE_SECONDS", 0.1)
    with kernel_set.sole_writer(host_copy):
        assert run_cli("aot", "build", *command(rows(192), host_copy)) == 1
    assert f"another build is writing to {host_copy}" in capsys.readouterr().err
    assert kernels_of(host_copy) == BOTH


def test_what_another_build_added_meanwhile_is_kept(
    host_set: Path, host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that began to look before the other had ended."""
    change_registry(host_copy, kernels=registry_of(host_copy)["kernels"][:1])
    (host_copy / worker.RESULTS).unlink()

    @contextmanager
    def late(root: Path) -> Iterator[int]:
        (host_copy / "registry.json").write_bytes((host_set / "registry.json").read_bytes())
        with kernel_set.sole_writer(root) as lock:
            yield lock

    monkeypatch.setattr(build, "sole_writer", late)
    build_set(rows(192), host_copy)
    assert kernels_of(host_copy) == BOTH | {(192, HOST)}
    assert_sound(host_copy)


def test_builds_started_together_lose_nothing(tmp_path: Path) -> None:
    """Each either adds its kernel or says that another is at work, and adds it when run again."""
    out = tmp_path / "set"
    configs = [write_config(tmp_path, rmsnorm_rows(size), f"{size}.toml") for size in (64, 128)]
    statuses = []
    for process in [run_script(command(config, out, "--jobs", "1")) for config in configs]:
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        statuses.append(process.returncode)
        assert process.returncode == 0 or f"another build is writing to {out}" in errors
    assert 0 in statuses
    for config in configs:
        build_set(config, out)
    assert kernels_of(out) == BOTH
    assert_sound(out)


def test_the_lock_is_held_while_any_process_of_the_build_lives(
    host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernel_set.sole_writer(host_copy) as lock:
        survivor = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        monkeypatch.setattr(kernel_set, "_LOCK_PATIENCE_SECONDS", 0.1)
        with pytest.raises(FlashInferError, match="another build is writing"):
            build_set(rows(192), host_copy)
        monkeypatch.setattr(kernel_set, "_LOCK_PATIENCE_SECONDS", PATIENCE_SECONDS)
        waited = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            survivor.kill()
            survivor.wait()

        monkeypatch.setattr(kernel_set, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        assert build_set(rows(64), host_copy, exact=True).removed
        assert len(waited) == 1, "for the survivor, and for nothing after it"
    finally:
        survivor.kill()
        survivor.wait()
