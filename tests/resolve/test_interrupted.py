# SPDX-License-Identifier: Apache-2.0
"""Requests for kernels that are interrupted, that come in the middle of others, or find no thread: nothing is lost,
and nobody waits for himself."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from flashinfer import events
from flashinfer.events import Event
from flashinfer.jit import ahead
from flashinfer.jit.spec import KernelSpec
from tests.kit import PATIENCE_SECONDS, cpu_resolver, finish, fork, miss_records, rmsnorm_spec, run_rmsnorm


def test_a_wait_that_is_interrupted_leaves_the_compile_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a fork, or the end of the process, has to wait for; and it is there when it is asked for again."""
    let, begun = threading.Event(), threading.Event()

    def find(spec: KernelSpec, reason: str) -> str:
        begun.set()
        assert let.wait(PATIENCE_SECONDS)
        return "found"

    def interrupted(job: Future[str], timeout: float | None = None) -> str:
        raise KeyboardInterrupt

    jobs, spec = ahead.Ahead(find), rmsnorm_spec()
    jobs.start(spec, "")
    assert begun.wait(PATIENCE_SECONDS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Future, "result", interrupted)
        jobs.take(spec)
    assert jobs.knows(spec)
    let.set()
    jobs.settle()
    assert jobs.take(spec) == "found" and not jobs.knows(spec)


def test_a_record_that_is_interrupted_is_written_by_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    resolver = cpu_resolver(tmp_path)
    for interruption in (KeyboardInterrupt, MemoryError):
        with monkeypatch.context() as patched, pytest.raises(interruption):
            patched.setattr(Path, "mkdir", _raises(interruption))
            resolver.load(rmsnorm_spec())
    with pytest.raises(Exception, match="is not available"):
        resolver.load(rmsnorm_spec())
    assert len(miss_records(tmp_path / "misses")) == 1


def _raises(error: type[BaseException]) -> object:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


def test_a_compile_needs_no_second_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None begins while the interpreter ends, or where the system gives no more."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = cpu_resolver(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", start)
    resolver.expect([rmsnorm_spec()])
    run_rmsnorm(resolver.load(rmsnorm_spec()))


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_callback_that_asks_for_the_kernel_of_its_event_is_told(
    is_expected: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would wait for itself."""
    resolver, spec = cpu_resolver(tmp_path), rmsnorm_spec()
    asked: list[str] = []

    def ask(event: Event) -> None:
        asked.append(event.kind)
        resolver.load(spec)

    stop = events.subscribe(ask)
    try:
        with caplog.at_level(logging.WARNING, logger="flashinfer"):
            if is_expected:
                resolver.expect([spec])
            run_rmsnorm(resolver.load(spec))
    finally:
        stop()
    assert asked == ["compile", "miss"]
    (warning,) = {record.getMessage() for record in caplog.records}
    assert f"{spec.name} for {spec.target} is asked for in the middle of a request for it" in warning


def test_locks_of_modules_are_free_in_a_child() -> None:
    """Whichever thread of the parent process holds them at the fork is not there."""
    code = """
    import importlib, os, pkgutil, sys, threading
    import flashinfer
    for module in pkgutil.walk_packages(flashinfer.__path__, "flashinfer."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                pass  # of an extra
    kinds = type(threading.Lock()), type(threading.RLock())
    modules = [module for name, module in sys.modules.items() if name.startswith("flashinfer")]
    locks = {f"{module.__name__}.{name}": value
             for module in modules for name, value in vars(module).items() if isinstance(value, kinds)}
    assert len(locks) >= 5, locks
    for lock in locks.values():
        assert lock.acquire(timeout=5)
    child = os.fork()
    if child == 0:
        held = [name for name, lock in locks.items() if not lock.acquire(timeout=0)]
        print(held, file=sys.stderr)
        os._exit(len(held))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    finish(fork(code))
