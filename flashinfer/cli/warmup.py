# SPDX-License-Identifier: Apache-2.0
"""`flashinfer warmup`: have every kernel of a config in a store, so that afterwards nothing compiles."""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from flashinfer import env, families, log
from flashinfer.aot.worker import end_with
from flashinfer.cli import UsageError, _requests
from flashinfer.cli._text import count
from flashinfer.errors import FlashInferError
from flashinfer.jit import cache_dir
from flashinfer.jit.resolver import Resolver, make_resolver
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Hit


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "warmup",
        help="compile beforehand whatever a config needs on this machine",
        description="Compile into the JIT cache every kernel of a config that is not precompiled. Afterwards a process "
        "with the same cache directory and compiler compiles none of them. Records no misses.",
        examples=("warmup --config core", "warmup --config mine.toml --jobs 4"),
    )
    _requests.add_arguments(parser)
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="compiles at a time (default: one per CPU core, at most 8)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}; expected a positive number")
    specs = _requests.requested(args)
    resolver = make_resolver()
    if resolver.cache_dir != cache_dir.preferred():  # the warning of the temporary directory has said why
        raise FlashInferError(f"nothing would be kept; set {env.CACHE_DIR.name} to a writable folder")
    missing = [spec for spec in specs if not _answered(resolver, spec)]
    print(f"{count(len(specs), 'kernel')}: {len(specs) - len(missing)} ready, {len(missing)} to compile")
    if not missing:
        return 0
    started = time.perf_counter()
    failures = _compile_all(missing, args.jobs or min(8, os.cpu_count() or 1))
    for spec, error in failures:
        *report, first_error = error.splitlines()
        print(f"{spec.name} for {spec.target} failed: {first_error}", file=sys.stderr)
        for line in report:
            if line.startswith("source and log: "):
                print(f"  {line}", file=sys.stderr)
    lost = [spec for spec in missing if not _answered(resolver, spec)]
    done = count(len(missing) - len(lost), "kernel")
    print(f"{done} compiled in {time.perf_counter() - started:.1f} s into {resolver.jit.root}")
    if lost:
        why = (
            "see the errors above"
            if failures
            else "the cache was cleared or the sources changed meanwhile; run it again"
        )
        raise FlashInferError(f"{count(len(lost), 'kernel')} would still be compiled at run time; {why}")
    return 0


def _answered(resolver: Resolver, spec: KernelSpec) -> bool:
    return any(isinstance(answer, Hit) for _, answer in resolver.explain(spec))


def _compile_all(specs: Sequence[KernelSpec], jobs: int) -> list[tuple[KernelSpec, str]]:
    """Compile in processes, since NVRTC compiles one kernel at a time in each. Returns what failed, with the error."""
    on_terminal = sys.stderr.isatty()
    # On a terminal the bar says it all; elsewhere the log lines are the progress.
    quiet = on_terminal and env.LOG_LEVEL.get() == "info"
    failures = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(specs)), context, _begin, (quiet,)) as pool:
        bar = _Bar(len(specs), on_terminal)
        running = {pool.submit(_compile, spec): spec for spec in specs}
        try:
            for future in as_completed(running):
                spec, error = running[future], future.result()
                if error is not None:
                    failures.append((spec, error))
                bar.advance(spec)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()
    return failures


def _begin(quiet: bool) -> None:
    """What each compile process does first."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.sentinel)  # also where it is killed; a pool's processes would wait for work for ever
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # which has put them into a background group, and they log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the pool
    families.register_all()
    if quiet:
        log.logger().setLevel(logging.WARNING)


def _compile(spec: KernelSpec) -> str | None:
    try:
        _resolver().ensure(spec)
    except Exception as error:  # the other kernels are compiled all the same
        return str(error)
    return None


_resolver = functools.cache(make_resolver)


class _Bar:
    """`[####----] 12/40  ETA 8 s  rmsnorm sm_90a` on one line of stderr; nothing when that is no terminal."""

    _WIDTH = 24

    def __init__(self, total: int, visible: bool) -> None:
        self._total, self._visible, self._done = total, visible, 0
        self._started = time.perf_counter()
        self._draw("")

    def advance(self, spec: KernelSpec) -> None:
        self._done += 1
        self._draw(f"{spec.family} {spec.target}")

    def close(self) -> None:
        if self._visible:
            sys.stderr.write("\n")

    def _draw(self, last: str) -> None:
        if not self._visible:
            return
        filled = self._WIDTH * self._done // self._total
        eta = ""
        if 0 < self._done < self._total:
            left = (time.perf_counter() - self._started) / self._done * (self._total - self._done)
            eta = f"  ETA {left:.0f} s"
        bar = "#" * filled + "-" * (self._WIDTH - filled)
        sys.stderr.write(f"\r\033[K[{bar}] {self._done}/{self._total}{eta}  {last}")
        sys.stderr.flush()
