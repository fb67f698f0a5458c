# SPDX-License-Identifier: Apache-2.0
"""What an application hears of kernels: events, counters, spans. Tags: test_misses.py."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashinfer import events, target
from flashinfer.errors import CompileError, KernelMissing
from flashinfer.events import Event
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import render
from flashinfer.jit.stores import AotStore, Entry, Registry
from tests.kit import CountingCxx, cpu_resolver, finish, fork, rmsnorm_spec


@pytest.fixture(autouse=True)
def from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_counts", dict.fromkeys(events._COUNTERS, 0))
    monkeypatch.setattr(events, "_callbacks", ())


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    found: list[Event] = []
    stop = events.subscribe(found.append)
    yield found
    stop()


def changed() -> dict[str, float]:
    return {name: value for name, value in events.counters().items() if value}


def test_a_compile_a_cache_hit_and_no_more(tmp_path: Path, heard: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_TAG", "llama")
    spec = rmsnorm_spec()
    resolver = cpu_resolver(tmp_path)
    resolver.load(spec)
    compiled, missed = heard
    assert (compiled.kind, compiled.store, missed.kind, missed.store) == (
        "compile",
        "jit-compile",
        "miss",
        "jit-compile",
    )
    for event in heard:
        assert (event.kernel, event.target, event.model) == (spec.name, spec.target, "llama")
        assert event.reason == "flashinfer_aot is not installed" and event.bytes > 1000
    assert 0 < compiled.seconds == missed.compiled < missed.seconds and missed.waited == 0
    before = changed()
    assert before == {
        "misses": 1,
        "compiles": 1,
        "miss_seconds": missed.seconds,
        "compile_seconds": compiled.seconds,
        "compiled_bytes": compiled.bytes,
    }
    resolver.load(spec)
    assert changed() == before and len(heard) == 2, "a kernel in use tells nothing"
    cpu_resolver(tmp_path).load(spec)
    assert [event.kind for event in heard[2:]] == ["miss"] and heard[2].store == "jit-cache"
    assert heard[2].compiled == 0.0


def test_a_precompiled_kernel_is_a_hit(tmp_path: Path, heard: list[Event]) -> None:
    import hashlib

    spec = rmsnorm_spec()
    code = CountingCxx().compile(render(spec)).machine_code
    (tmp_path / "k.so").write_bytes(code)
    known = {"digest": render(spec).digest, "sha256": hashlib.sha256(code).hexdigest(), "bytes": len(code)}
    Registry.write(tmp_path, [Entry(spec.name, **spec.to_dict(), **known, file="k.so", compiler="g++")])
    Resolver(AotStore([tmp_path]), tmp_path / "cache").load(spec)
    (event,) = heard
    assert (event.kind, event.store, event.bytes, event.reason) == ("hit", "aot", len(code), "")
    assert changed() == {"hits": 1}


def test_failures_are_told_before_they_are_raised(
    tmp_path: Path, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(CountingCxx):
        def compile(self, source: Any) -> Any:
            raise CompileError("no such luck")

    with pytest.raises(CompileError):
        cpu_resolver(tmp_path, Broken()).load(rmsnorm_spec())
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    monkeypatch.setenv("FLASHINFER_RECORD_MISSES", "0")  # which is about files
    with pytest.raises(KernelMissing):
        cpu_resolver(tmp_path).load(rmsnorm_spec())
    assert [(event.kind, event.store) for event in heard] == [
        ("compile", "failed"),
        ("miss", "failed"),
        ("miss", "failed"),
    ]
    assert (changed()["failures"], changed()["compiles"]) == (2, 1)


def test_a_warmup_compiles_and_misses_nothing(tmp_path: Path, heard: list[Event]) -> None:
    cpu_resolver(tmp_path).ensure(rmsnorm_spec())
    assert [event.kind for event in heard] == ["compile"]


def test_a_callback_that_fails_harms_nobody(
    tmp_path: Path, heard: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError(f"of {tmp_path.name}")

    stop = events.subscribe(broken)
    after: list[Event] = []
    events.subscribe(after.append)
    with caplog.at_level(logging.WARNING, logger="flashinfer"):
        cpu_resolver(tmp_path).load(rmsnorm_spec())
    assert len(heard) == len(after) == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"a callback of flashinfer.events failed: RuntimeError: of {tmp_path.name}" in warning
    stop()
    stop()
    assert len(events._callbacks) == 2
    with pytest.raises(TypeError, match="callback is a int; expected a function"):
        events.subscribe(7)  # type: ignore[arg-type]


def test_a_callback_may_ask_for_kernels_itself(tmp_path: Path) -> None:
    """And subscribe, and read the counters: no lock is held meanwhile."""
    resolver, seen = cpu_resolver(tmp_path), []

    def ask(event: Event) -> None:
        seen.append((event.kind, events.counters()["misses"]))
        if len(seen) == 1:
            resolver.load(rmsnorm_spec(128))
            events.subscribe(lambda event: None)()

    events.subscribe(ask)
    resolver.load(rmsnorm_spec(64))
    assert [kind for kind, _ in seen] == ["compile", "compile", "miss", "miss"]


def test_a_child_counts_for_itself(tmp_path: Path) -> None:
    code = """
    import os, sys
    from flashinfer import events
    from flashinfer.jit import default_resolver
    from tests.kit import rmsnorm_spec
    default_resolver().load(rmsnorm_spec(64))
    events._lock.acquire()  # as a thread may hold it
    child = os.fork()
    if child == 0:
        default_resolver().load(rmsnorm_spec(128))
        assert events.counters()["misses"] == 1, events.counters()
        os._exit(0)
    events._lock.release()
    assert events.counters()["misses"] == 1
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    finish(fork(code, FLASHINFER_CACHE_DIR=tmp_path))


# --------------------------------------------------------------------------------------------------------------- spans


def test_spans_where_opentelemetry_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    spec = rmsnorm_spec()
    with provider.get_tracer("serving").start_as_current_span("request"):
        cpu_resolver(tmp_path).load(spec)
    compiled, missed, request = exporter.get_finished_spans()
    assert [span.name for span in (compiled, missed)] == ["flashinfer.compile", "flashinfer.miss"]
    assert compiled.parent.span_id == missed.context.span_id and missed.parent.span_id == request.context.span_id
    assert missed.attributes["flashinfer.kernel"] == spec.name
    assert missed.attributes["flashinfer.target"] == target.host()
    assert missed.attributes["flashinfer.resolved_by"] == "jit-compile"
    exporter.clear()
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    with pytest.raises(KernelMissing):
        cpu_resolver(tmp_path / "other").load(spec)
    (failed,) = exporter.get_finished_spans()
    assert (
        failed.status.status_code is trace.StatusCode.ERROR and failed.attributes["flashinfer.resolved_by"] == "failed"
    )


def test_a_tracer_that_fails_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", sys)  # which has no get_tracer
    cpu_resolver(tmp_path).load(rmsnorm_spec())


def test_opentelemetry_is_not_imported_for_those_who_do_not_use_it(tmp_path: Path) -> None:
    code = f"""
    import sys
    from tests.kit import cpu_resolver, rmsnorm_spec
    from pathlib import Path
    cpu_resolver(Path({str(tmp_path)!r})).load(rmsnorm_spec())
    print([name for name in sys.modules if name.startswith("opentelemetry")])
    """
    out, _ = finish(fork(code))
    assert out == "[]\n"
