# SPDX-License-Identifier: Apache-2.0
"""Answers kernel requests. The only place where the order is written:

    process table -> AOT registries -> JIT cache -> JIT compile

Whatever AOT did not answer is logged and recorded (misses.py).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flashinfer import env, events, locks, log
from flashinfer import target as targets
from flashinfer.errors import CompileError, FlashInferError, KernelMissing, ToolchainMissing
from flashinfer.events import Event
from flashinfer.jit import cache_dir, loader, misses
from flashinfer.jit.ahead import Ahead
from flashinfer.jit.loader import Kernel
from flashinfer.jit.misses import Spent
from flashinfer.jit.source import Source, render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Answer, AotStore, Hit, JitCache
from flashinfer.jit.toolchain import Compiled, Toolchain, toolchain

_HEARTBEAT_SECONDS = 10.0
_LOCK_TIMEOUT_SECONDS = 60.0


class Resolver:
    def __init__(
        self,
        aot: AotStore,
        cache_dir: Path,
        find_toolchain: Callable[[str], Toolchain] = toolchain,
    ) -> None:
        self.aot = aot
        self.cache_dir = cache_dir
        self.jit = JitCache(cache_dir / "jit")
        self.misses = misses.MissLog(cache_dir / "misses")
        self.answered_by: dict[KernelSpec, str] = {}  # of each kernel in use: "aot", "jit-cache" or "jit-compile"
        self._find_toolchain = find_toolchain
        self._table: dict[KernelSpec, Kernel] = {}
        self._locks: dict[KernelSpec, threading.Lock] = {}
        self._at_work: set[tuple[KernelSpec, int]] = set()  # and the thread that resolves it
        self._ahead = Ahead(self._look_ahead)

    def load(self, spec: KernelSpec) -> Kernel:
        """The kernel of a spec. Raises KernelMissing, ToolchainMissing or CompileError."""
        kernel = self._table.get(spec)
        return kernel if kernel is not None else self._load_once(spec)

    def holds(self, spec: KernelSpec) -> bool:
        """Whether the process has loaded it."""
        return spec in self._table

    def expect(self, requests: Iterable[KernelSpec]) -> None:
        """Kernels that will be asked for soon: what no store holds is compiled in the background meanwhile, several at
        a time. It counts as a miss once it is asked for. Raises nothing."""
        for spec in requests:
            if spec in self._table or self._ahead.knows(spec) or env.DISABLE_JIT.get():
                continue
            answer = self.aot.find(spec)
            if not isinstance(answer, Hit):
                _settle_before_fork_and_exit()
                self._ahead.start(spec, answer.reason)

    def ensure(self, spec: KernelSpec) -> Hit:
        """Have a kernel in a store, compiling it if none has it. Neither loads it nor counts it as a miss. Raises like
        `load`."""
        answer = self.aot.find(spec)
        return answer if isinstance(answer, Hit) else self._find_or_compile(spec, answer.reason, Spent())

    def explain(self, spec: KernelSpec) -> list[tuple[str, Answer]]:
        """What each store would answer, in order. Compiles and records nothing."""
        source = render(spec)
        return [("aot", self.aot.find(spec)), ("jit-cache", self.jit.find(source, self._compiler(source.kind)))]

    def settle(self) -> None:
        """Before a fork, and before the process ends."""
        self._ahead.settle()

    def after_fork(self) -> None:
        """Forget threads of the parent process, which do not exist in this one, and locks that they may have held."""
        self._locks, self._at_work = {}, set()
        self._ahead.forget()
        self.misses.after_fork()
        events.after_fork()

    # ---------------------------------------------------------------------------------------------------- once per spec

    def _load_once(self, spec: KernelSpec) -> Kernel:
        if (spec, threading.get_ident()) in self._at_work:  # and would wait for itself
            raise FlashInferError(
                f"{spec.name} for {spec.target} is asked for in the middle of a request for it, by a callback of "
                "flashinfer.events or a signal handler; ask once that request has returned"
            )
        with self._locks.setdefault(spec, threading.Lock()), self._working_on(spec):
            kernel = self._table.get(spec)
            return kernel if kernel is not None else self._resolve(spec)

    @contextlib.contextmanager
    def _working_on(self, spec: KernelSpec) -> Iterator[None]:
        mark = spec, threading.get_ident()
        self._at_work.add(mark)
        try:
            yield
        finally:
            self._at_work.discard(mark)

    def _resolve(self, spec: KernelSpec) -> Kernel:
        started = time.perf_counter()
        answer = self.aot.find(spec)
        if not isinstance(answer, Hit):
            return self._resolve_miss(spec, answer.reason)
        kernel = self._use(spec, answer, "")
        if self.answered_by[spec] == "aot":  # the hit may have been refused
            seconds, num_bytes = time.perf_counter() - started, len(answer.machine_code)
            tag = events.current_tag()
            events.emit(Event("hit", spec.name, spec.target, "aot", seconds, bytes=num_bytes, model=tag))
        return kernel

    def _resolve_miss(self, spec: KernelSpec, reason: str) -> Kernel:
        started = time.perf_counter()
        resolved_by, num_bytes, spent = "failed", 0, Spent()
        with self._span("flashinfer.miss", spec, reason) as span:
            try:
                hit = self._found_ahead(spec, spent) or self._find_or_compile(spec, reason, spent)
                kernel = self._use(spec, hit, reason)
                resolved_by, num_bytes = self.answered_by[spec], len(hit.machine_code)  # the hit may have been refused
                return kernel
            finally:
                spent.seconds = time.perf_counter() - started
                if span is not None:
                    span.set_attribute("flashinfer.resolved_by", resolved_by)
                if env.RECORD_MISSES.get():
                    self.misses.record(spec, reason, resolved_by, spent, num_bytes)
                self._tell("miss", spec, reason, resolved_by, spent.seconds, num_bytes, spent)

    def _span(self, name: str, spec: KernelSpec, reason: str) -> contextlib.AbstractContextManager[Any]:
        model = events.current_tag()
        return events.span(name, kernel=spec.name, target=spec.target, reason=reason, model=model)

    def _tell(
        self, kind: str, spec: KernelSpec, reason: str, store: str, seconds: float, num_bytes: int, spent: Spent
    ) -> None:
        of_miss = {"compiled": spent.compiled, "waited": spent.waited} if kind == "miss" else {}
        tag = events.current_tag()
        events.emit(Event(kind, spec.name, spec.target, store, seconds, reason, bytes=num_bytes, model=tag, **of_miss))

    def _use(self, spec: KernelSpec, hit: Hit, reason: str) -> Kernel:
        """`reason`: why AOT did not answer, if it did not."""
        self.answered_by[spec] = hit.store
        instead = functools.partial(self._instead_of, spec, hit, reason)
        kernel = self._table[spec] = loader.load(hit.source, hit.machine_code, hit.path, instead)
        return kernel

    def _instead_of(self, spec: KernelSpec, refused: Hit, reason: str, why: str) -> Kernel:
        """The kernel from the source after the one whose machine code was refused."""
        if refused.store == "jit-compile":
            raise FlashInferError(
                f"{spec.name} for {spec.target}, compiled just now, does not load: {why}; `flashinfer doctor` tries "
                "compiler and driver"
            )
        log.warn_once(f"{spec.name}: {refused.path or 'its machine code'} does not load and is ignored: {why}")
        if refused.store == "aot":
            return self._resolve_miss(spec, f"not loadable: {why}")
        assert refused.path is not None
        self.jit.refuse(refused.path.parent, f"not loadable: {why}")
        return self._resolve_miss(spec, reason)

    def _look_ahead(self, spec: KernelSpec, reason: str) -> tuple[Hit, Spent]:
        """In another thread."""
        spent = Spent()
        with self._working_on(spec):
            return self._find_or_compile(spec, reason, spent, ahead=True), spent

    def _found_ahead(self, spec: KernelSpec, spent: Spent) -> Hit | None:
        started = time.perf_counter()
        found = self._ahead.take(spec)
        if found is None:
            return None
        hit, ahead = found
        lost = time.perf_counter() - started  # the rest went by while nobody waited
        spent.compiled = min(ahead.compiled, lost)
        spent.waited = min(ahead.waited, lost - spent.compiled)
        return hit

    def _find_or_compile(self, spec: KernelSpec, reason: str, spent: Spent, ahead: bool = False) -> Hit:
        source = render(spec)
        compiler = self._compiler(source.kind)
        cached = self.jit.find(source, compiler)
        if isinstance(cached, Hit):
            log.logger().info("%s %s: from the JIT cache; AOT: %s", spec.name, spec.target, reason)
            return cached
        if not ahead:  # when a graph is being captured nobody waits for it, and to ask disturbs the capture
            self._require_jit(spec, reason, cached.reason)
        with self._compile_lock(spec, source, spent):
            cached = self.jit.find(source, compiler)  # another process may have been faster
            return cached if isinstance(cached, Hit) else self._compile(source, reason, spent)

    def _compiler(self, kind: str) -> str | None:
        try:
            return self._find_toolchain(kind).identity
        except ToolchainMissing:
            return None

    def _require_jit(self, spec: KernelSpec, aot_reason: str, cache_reason: str) -> None:
        if env.DISABLE_JIT.get():
            why = f"compiling is disabled ({env.DISABLE_JIT.name})"
        elif _capturing(spec):
            why = (
                "a CUDA graph is being captured, which a compile would stall; call the operator once before the capture"
            )
        else:
            return
        row = misses.to_toml([spec.to_dict()])
        raise KernelMissing(
            f"{spec.name} for {spec.target} is not available: AOT: {aot_reason}; JIT cache: {cache_reason}; {why}.\n"
            f"To have it beforehand, put these lines into a file for `flashinfer warmup --config FILE` (this machine) "
            f"or `flashinfer aot build --config FILE` (an AOT set):\n{row}"
        )

    def _compile(self, source: Source, reason: str, spent: Spent) -> Hit:
        spec = source.spec
        compiler = self._find_toolchain(source.kind)
        try:
            identity = compiler.identity
        except ToolchainMissing as error:
            raise ToolchainMissing(
                f"{spec.name} for {spec.target} has to be compiled (AOT: {reason}), but {error}; or install "
                "precompiled kernels that hold it: pip install 'flashinfer[aot]'"
            ) from error
        say = log.logger().info
        say("compiling %s for %s; AOT: %s", spec.name, spec.target, reason)
        started = time.perf_counter()
        store, num_bytes = "failed", 0
        with self._span("flashinfer.compile", spec, reason), _heartbeat(spec.name, started):
            try:
                compiled = compiler.compile(source)
                store, num_bytes = "jit-compile", len(compiled.machine_code)
            except CompileError as error:
                raise self._with_log_path(error, source) from None
            finally:
                spent.compiled = time.perf_counter() - started
                self._tell("compile", spec, reason, store, spent.compiled, num_bytes, spent)
        path = self._publish(source, identity, compiler.suffix, compiled)
        say("compiled %s for %s in %.2f s, %d bytes", spec.name, spec.target, spent.compiled, num_bytes)
        return Hit(source, compiled.machine_code, path, "jit-compile")

    def _publish(self, source: Source, compiler: str, suffix: str, compiled: Compiled) -> Path | None:
        try:
            return self.jit.publish(source, compiler, suffix, compiled.machine_code, compiled.log)
        except OSError as error:
            log.warn_once(
                f"the JIT cache {self.jit.root} cannot be written ({error.strerror}); compiled kernels live in this "
                f"process only. Free space (`flashinfer cache gc --max-size 1G`) or set {env.CACHE_DIR.name}"
            )
            return None

    def _with_log_path(self, error: CompileError, source: Source) -> CompileError:
        folder = self.cache_dir / "failed" / source.digest[:32]
        *report, first_error = str(error).splitlines()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"source{'.cu' if source.kind == 'cuda' else '.cpp'}").write_text(source.text, encoding="utf-8")
            (folder / "log.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
        except OSError:
            return error
        return CompileError("\n".join([*report, f"source and log: {folder}", first_error]))

    @contextlib.contextmanager
    def _compile_lock(self, spec: KernelSpec, source: Source, spent: Spent) -> Iterator[None]:
        """Keep other processes from compiling the same kernel meanwhile. Only saves work: failing to lock is no
        error."""
        import filelock

        path = self.jit.root / f".{source.digest[:32]}.lock"
        with contextlib.ExitStack() as held:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(str(path))
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except filelock.Timeout:
                    log.logger().info("waiting for another process to compile %s for %s", spec.name, spec.target)
                    started = time.perf_counter()
                    try:
                        held.enter_context(lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS))
                    finally:
                        spent.waited = time.perf_counter() - started
            except (OSError, NotImplementedError):  # Timeout is an OSError; some file systems have no locks
                pass
            yield


def _capturing(spec: KernelSpec) -> bool:
    if targets.kind(spec.target) == "cpu":
        return False
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _heartbeat(name: str, started: float) -> Iterator[None]:
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(_HEARTBEAT_SECONDS):
            log.logger().info("still compiling %s (%.0f s)", name, time.perf_counter() - started)

    with contextlib.suppress(RuntimeError):  # no thread begins while the interpreter ends, or in want of memory
        threading.Thread(target=beat, daemon=True, name="flashinfer-heartbeat").start()
    try:
        yield
    finally:
        finished.set()


# ---------------------------------------------------------------------------------------------------- the process's own


_resolver: Resolver | None = None
_resolver_lock = locks.lock()


def default_resolver() -> Resolver:
    """The process's resolver, made on first use from the environment."""
    global _resolver
    if _resolver is None:
        with _resolver_lock:
            if _resolver is None:
                _resolver = make_resolver()
    return _resolver


@functools.cache
def _settle_before_fork_and_exit() -> None:
    import filelock  # noqa: F401  its own handler stops who holds a lock, and the last one registered runs first

    def settle() -> None:
        if _resolver is not None:
            _resolver.settle()

    atexit.register(settle)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=settle)


def make_resolver() -> Resolver:
    """A resolver from the environment."""
    usable, preferred = cache_dir.usable(), cache_dir.preferred()
    made = Resolver(AotStore(), usable)
    if preferred is not None and preferred != usable:
        made.jit.also_read = (preferred / "jit",)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.after_fork)
    return made
