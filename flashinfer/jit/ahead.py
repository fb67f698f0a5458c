# SPDX-License-Identifier: Apache-2.0
"""Kernels that are found or compiled before anyone asks for them, several at a time: who asks waits for the slowest of
them instead of for their sum."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Optional, TypeVar

from flashinfer.jit.spec import KernelSpec

T = TypeVar("T")

_MAX_THREADS = 8  # a compile takes a processor and some 200 MB


class Ahead(Generic[T]):
    def __init__(self, find: Callable[[KernelSpec, str], T]) -> None:
        """find: runs in a thread of its own. What it raises is dropped: who asks for the kernel is told."""
        self._find = find
        self.forget()

    def forget(self) -> None:
        self._jobs: dict[KernelSpec, Future[Optional[T]]] = {}
        self._processors = threading.Semaphore(_num_threads())

    def knows(self, spec: KernelSpec) -> bool:
        return spec in self._jobs

    def start(self, spec: KernelSpec, reason: str) -> None:
        """`reason`: why it was not precompiled."""
        job: Future[Optional[T]] = Future()
        run = contextvars.copy_context().run
        thread = threading.Thread(
            target=run, args=(self._work, job, spec, reason), name="flashinfer-ahead", daemon=True
        )
        self._jobs[spec] = job  # before it begins: settle() has to see it
        try:
            thread.start()
        except RuntimeError:  # no thread begins while the interpreter ends, or in want of memory
            self._jobs.pop(spec, None)

    def take(self, spec: KernelSpec) -> Optional[T]:
        """What `find` found, once it has; None where it failed, or did not begin and now will not."""
        job = self._jobs.get(spec)
        found = None if job is None or job.cancel() else job.result()
        self._jobs.pop(spec, None)  # not sooner, nor where the wait was interrupted: settle() waits for it, too
        return found

    def settle(self) -> None:
        """Return once no thread is at work, and none will be: to end one in the middle, as a fork or the end of the
        process does, leaves the compiler's locks and memory as they are."""
        begun = [job for job in list(self._jobs.values()) if not job.cancel()]
        for job in begun:  # once all others are cancelled: the next would begin where one ends
            job.result()

    def _work(self, job: Future[Optional[T]], spec: KernelSpec, reason: str) -> None:
        with self._processors:
            if job.set_running_or_notify_cancel():
                found = None
                try:
                    found = self._find(spec, reason)
                except Exception:  # raised again, to whoever asks
                    pass
                finally:
                    job.set_result(found)


def _num_threads() -> int:
    """One processor is left to the thread that asks, which compiles too."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_THREADS, max(1, processors - 1))
