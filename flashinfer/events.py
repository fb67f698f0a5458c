# SPDX-License-Identifier: Apache-2.0
"""What this library tells an application about itself: where its kernels came from and what that cost.

Everything here happens once per kernel and process, when it is asked for first. A kernel in use reports nothing, counts
nothing and looks nothing up.

    events.counters()               # {"hits": 31, "misses": 2, "compiles": 1, "miss_seconds": 0.4, …}
    stop = events.subscribe(print)  # every Event from now on; stop() ends it

Where the application has imported `opentelemetry.trace`, a miss is also a span, `flashinfer.miss`, with its compile in
it, `flashinfer.compile`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from flashinfer import env, locks, log
from flashinfer.version import __version__

__all__ = ["Event", "counters", "current_tag", "subscribe", "tag"]

_MAX_TAG = 200

_tag: ContextVar[str] = ContextVar("flashinfer_tag", default="")


# ---------------------------------------------------------------------------------------------------------------- tags


@contextlib.contextmanager
def tag(name: str) -> Iterator[None]:
    """Name the model, or the role, that kernels are asked for by: records of misses, and events, carry it.

        with flashinfer.tag("llama-3-8b/prefill"):
            model(batch)

    The innermost name counts. It holds in this thread, or asyncio task, alone; FLASHINFER_TAG names a whole process.
    Nothing reads it but a request for a kernel that the process does not have yet.

    Raises:
        TypeError: the name is no str.
        ValueError: it is empty, longer than 200 characters, or not printable.
    """
    if not isinstance(name, str):
        raise TypeError(f'tag: name is a {type(name).__name__}; expected a str such as "llama-3-8b/prefill"')
    if not name or len(name) > _MAX_TAG or not name.isprintable():
        raise ValueError(f"tag: name is {name!r:.60}; expected 1 to {_MAX_TAG} printable characters")
    token = _tag.set(name)
    try:
        yield
    finally:
        _tag.reset(token)


def current_tag() -> str:
    """The tag in force; "" without one."""
    return _tag.get() or env.TAG.get()


# -------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Event:
    """A kernel that the process did not have yet was asked for.

    Attributes:
        kind: "hit": it was precompiled. "miss": it was not. "compile": one has ended, of a miss that follows, of
            `flashinfer warmup`, or of a kernel that will be asked for soon: in the background, and a miss only then.
        kernel: name, as commands print it.
        target: what it was asked for on, such as "sm_90a".
        store: where it came from: "aot", "jit-cache" or "jit-compile"; "failed": an exception follows.
        seconds: of a hit or a miss all that it took; of a compile those of the compiler.
        reason: why it was not precompiled.
        compiled: seconds of a miss in the compiler.
        waited: seconds of a miss until another process had compiled it.
        bytes: of machine code.
        model: `flashinfer.tag`.
    """

    kind: str
    kernel: str
    target: str
    store: str
    seconds: float
    reason: str = ""
    compiled: float = 0.0
    waited: float = 0.0
    bytes: int = 0
    model: str = ""


Callback = Callable[[Event], None]

_COUNTERS = (
    *("hits", "misses", "compiles", "failures"),
    *("miss_seconds", "compile_seconds", "wait_seconds", "compiled_bytes"),
)
_lock = locks.lock()
_counts: dict[str, float] = dict.fromkeys(_COUNTERS, 0)
_callbacks: tuple[Callback, ...] = ()


def subscribe(callback: Callback) -> Callable[[], None]:
    """Have a function called with every event from now on, in the thread that asked for the kernel and before it gets
    it, or that compiled it in the background. Returns a function that ends this. An exception of the callback is
    logged, once, and goes no further.

    Raises:
        TypeError: the callback cannot be called.
    """
    global _callbacks
    if not callable(callback):
        raise TypeError(f"subscribe: callback is a {type(callback).__name__}; expected a function of one Event")

    def call(event: Event) -> None:  # of its own, so that one callback may be subscribed twice
        callback(event)

    with _lock:
        _callbacks = (*_callbacks, call)

    def unsubscribe() -> None:
        global _callbacks
        with _lock:
            _callbacks = tuple(other for other in _callbacks if other is not call)

    return unsubscribe


def counters() -> dict[str, float]:
    """Sums of this process; none ever falls.

    - hits, misses: kernels that were precompiled, and that were not
    - compiles: those of this process, of misses and of `flashinfer warmup`, failed ones included
    - failures: misses that ended in an exception
    - miss_seconds: lost to misses; compile_seconds in the compiler, wait_seconds waiting for another process
    - compiled_bytes: of machine code
    """
    with _lock:
        return dict(_counts)


def emit(event: Event) -> None:
    """Count an event and call the callbacks."""
    with _lock:
        if event.kind == "hit":
            _counts["hits"] += 1
        elif event.kind == "miss":
            _counts["misses"] += 1
            _counts["failures"] += event.store == "failed"
            _counts["miss_seconds"] += event.seconds
            _counts["wait_seconds"] += event.waited
        else:
            _counts["compiles"] += 1
            _counts["compile_seconds"] += event.seconds
            _counts["compiled_bytes"] += event.bytes
        callbacks = _callbacks
    for callback in callbacks:
        try:
            callback(event)
        except Exception as error:
            log.warn_once(f"a callback of flashinfer.events failed: {type(error).__name__}: {error}")


def after_fork() -> None:
    """A child counts from zero."""
    _counts.update(dict.fromkeys(_COUNTERS, 0))


def span(name: str, **attributes: str) -> AbstractContextManager[Any]:
    """A span of OpenTelemetry around a block, current in it, that notes an exception; its value is None where the
    application has not imported `opentelemetry.trace`."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:  # whoever collects spans has imported it; importing it for others would cost them its time
        return contextlib.nullcontext()
    noted = {f"flashinfer.{key}": value for key, value in attributes.items() if value}
    try:
        started: AbstractContextManager[Any] = trace.get_tracer("flashinfer", __version__).start_as_current_span(
            name, attributes=noted
        )
        return started
    except Exception as error:
        log.warn_once(f"no span of OpenTelemetry: {type(error).__name__}: {error}")
        return contextlib.nullcontext()
