# SPDX-License-Identifier: Apache-2.0
"""Kernels that are compiled before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashinfer
from flashinfer import events
from flashinfer.errors import CompileError, KernelMissing
from flashinfer.jit import ahead
from flashinfer.jit import resolver as resolver_module
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import Source
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore
from flashinfer.jit.toolchain import Compiled
from tests.kit import (
    PATIENCE_SECONDS,
    CountingCxx,
    compiler_script,
    cpu_resolver,
    finish,
    fork,
    miss_records,
    only_artifact,
    rmsnorm_spec,
    run_rmsnorm,
    spawn,
)


class GatedCxx(CountingCxx):
    """Compiles what `let` names; who compiles waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.began: set[str] = set()
        self._gates: dict[str, threading.Event] = {}
        self._changed = threading.Condition()

    def _gate(self, name: str) -> threading.Event:
        with self._changed:
            return self._gates.setdefault(name, threading.Event())

    def let(self, *names: str) -> None:
        for name in names:
            self._gate(name).set()

    def wait_until_began(self, *names: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.began.issuperset(names), PATIENCE_SECONDS)

    def compile(self, source: Source) -> Compiled:
        with self._changed:
            self.began.add(source.spec.name)
            self._changed.notify_all()
        assert self._gate(source.spec.name).wait(PATIENCE_SECONDS)
        return super().compile(source)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(ahead, "_num_threads", lambda: 2)
    yield 2


def test_what_is_expected_is_compiled_side_by_side_and_once(tmp_path: Path, processors: int) -> None:
    compiler, specs = GatedCxx(), [rmsnorm_spec(64), rmsnorm_spec(128)]
    names = [spec.name for spec in specs]
    resolver = cpu_resolver(tmp_path, compiler)
    resolver.expect(specs)
    compiler.wait_until_began(*names)  # both, though neither has ended
    resolver.expect(specs)
    compiler.let(*names)
    for spec, size in zip(specs, (64, 128)):
        run_rmsnorm(resolver.load(spec), size)
        assert resolver.answered_by[spec] == "jit-compile"
    assert compiler.num_compiles == 2
    resolver.expect(specs)
    assert compiler.num_compiles == 2


def test_it_is_a_miss_once_it_is_asked_for(tmp_path: Path) -> None:
    asked, never = rmsnorm_spec(64), rmsnorm_spec(128)
    heard: list[events.Event] = []
    resolver = cpu_resolver(tmp_path)
    stop = events.subscribe(heard.append)
    try:
        with flashinfer.tag("a model"):
            resolver.expect([asked, never])
        resolver.settle()
        assert {event.kind for event in heard} <= {"compile"} and not (tmp_path / "misses").exists()
        resolver.load(asked)
    finally:
        stop()
    compiles = [event for event in heard if event.kind == "compile" and event.kernel == asked.name]
    assert len(compiles) == 1 and compiles[0].model in ("a model", "")  # "" if it had not begun when it was asked for
    (miss,) = miss_records(tmp_path)
    assert miss.name == asked.name and miss.resolved_by == "jit-compile"
    assert miss.compiled <= miss.seconds  # what went by while nobody waited is not lost


def test_who_asks_compiles_what_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_num_threads", lambda: 1)
    compiler, first, second = GatedCxx(), rmsnorm_spec(64), rmsnorm_spec(128)
    resolver = cpu_resolver(tmp_path, compiler)
    resolver.expect([first])
    compiler.wait_until_began(first.name)
    resolver.expect([second])
    compiler.let(second.name)
    run_rmsnorm(resolver.load(second), 128)  # does not wait for the first
    compiler.let(first.name)
    run_rmsnorm(resolver.load(first))
    assert compiler.num_compiles == 2


def test_what_somebody_waits_for_is_settled_too() -> None:
    """A fork in another thread would end the compiler in the middle."""
    let, begun, ended = threading.Event(), threading.Event(), threading.Event()

    def find(spec: KernelSpec, reason: str) -> bool:
        begun.set()
        assert let.wait(PATIENCE_SECONDS)
        ended.set()
        return True

    jobs, spec = ahead.Ahead(find), rmsnorm_spec()
    jobs.start(spec, "")
    assert begun.wait(PATIENCE_SECONDS)
    asks = threading.Thread(target=jobs.take, args=(spec,))
    settles = threading.Thread(target=lambda: (jobs.settle(), settled.append(ended.is_set())))
    settled: list[bool] = []
    asks.start()
    settles.start()
    let.set()
    for thread in (asks, settles):
        thread.join(PATIENCE_SECONDS)
    assert settled == [True] and not jobs.knows(spec)


def test_what_fails_is_told_to_who_asks(tmp_path: Path) -> None:
    class Broken(CountingCxx):
        def compile(self, source: Source) -> Compiled:
            self.num_compiles += 1
            raise CompileError(f"{source.spec.name}: attempt {self.num_compiles}")

    compiler, spec = Broken(), rmsnorm_spec()
    resolver = cpu_resolver(tmp_path, compiler)
    resolver.expect([spec])
    resolver.settle()
    with pytest.raises(CompileError, match=r"attempt \d"):
        resolver.load(spec)


def test_nothing_is_compiled_where_compiling_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    compiler, spec = CountingCxx(), rmsnorm_spec()
    resolver = cpu_resolver(tmp_path, compiler)
    resolver.expect([spec])
    resolver.settle()
    with pytest.raises(KernelMissing, match="compiling is disabled"):
        resolver.load(spec)
    assert compiler.num_compiles == 0


def test_a_capture_takes_what_was_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def capturing(spec: object) -> bool:
        assert threading.current_thread() is threading.main_thread(), "a thread of its own asked, which breaks captures"
        return True

    compiler, spec = GatedCxx(), rmsnorm_spec()
    resolver = cpu_resolver(tmp_path, compiler)
    monkeypatch.setattr(resolver_module, "_capturing", capturing)
    resolver.expect([spec])
    compiler.wait_until_began(spec.name)
    compiler.let(spec.name)
    run_rmsnorm(resolver.load(spec))
    with pytest.raises(KernelMissing, match="being captured"):
        resolver.load(rmsnorm_spec(128))


CODE = """
import os, threading
from flashinfer.jit import ahead
from flashinfer.jit.resolver import default_resolver
from tests.kit import rmsnorm_spec, run_rmsnorm, wait_until
ahead._num_threads = lambda: 1
resolver = default_resolver()
resolver.expect(map(rmsnorm_spec, (64, 128, 256)))
jobs = list(resolver._ahead._jobs.values())
wait_until(lambda: any(job.running() for job in jobs))
others = [job for job in jobs if not job.running()]

def let():  # the one that has begun end once no other will begin
    wait_until(lambda: all(job.cancelled() for job in others))
    os.unlink(os.environ["COMPILE_HELD"])

threading.Thread(target=let, daemon=True).start()
"""


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Path]:
    """Variables of a process whose first compile does not end before it is let."""
    script, _ = compiler_script(tmp_path)
    (tmp_path / "held").touch()
    return {"FLASHINFER_CXX": script, "COMPILE_HELD": tmp_path / "held", "FLASHINFER_CACHE_DIR": tmp_path / "cache"}


def test_a_process_that_ends_waits_for_what_has_begun_alone(tmp_path: Path, held: dict[str, Path]) -> None:
    finish(spawn(CODE, **held))
    only_artifact(tmp_path / "cache")


def test_a_fork_in_the_middle(held: dict[str, Path]) -> None:
    code = """
child = os.fork()
run_rmsnorm(resolver.load(rmsnorm_spec(256)), 256)
if child:
    assert os.waitpid(child, 0)[1] == 0
    run_rmsnorm(resolver.load(rmsnorm_spec(64)))
else:
    resolver.expect([rmsnorm_spec(512)])
    run_rmsnorm(resolver.load(rmsnorm_spec(512)), 512)
"""
    finish(fork(CODE + code, **held))


@pytest.mark.gpu
def test_a_plan_has_its_planner_and_its_other_tile_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.attention.prefill import launch

    cold = Resolver(AotStore(roots=[]), tmp_path)
    monkeypatch.setattr(resolver_module, "_resolver", cold)
    launch.load_spec.cache_clear()
    launch.load_planner.cache_clear()
    heard: list[events.Event] = []
    i = lambda *values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
    pages, cache = torch.arange(32, device="cuda").int(), torch.zeros(32, 2, 16, 1, 64, device="cuda").half()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
    stop = events.subscribe(heard.append)
    try:
        for num_tokens in (512, 2):
            wrapper.plan(i(0, num_tokens), i(0, 32), pages, i(16), 4, 1, 64, 16, causal=True)
            wrapper.run(torch.zeros(num_tokens, 4, 64, device="cuda").half(), cache)
            cold.settle()
    finally:
        stop()
    kinds = [event.kind for event in heard]
    assert kinds.count("compile") == kinds.count("miss") == len(miss_records(tmp_path)) == 3
    assert "compile" not in kinds[-1:]  # all had ended before the last was asked for
