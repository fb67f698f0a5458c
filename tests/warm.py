# SPDX-License-Identifier: Apache-2.0
"""Processes of Python that find torch imported, which takes longer than what most of them are for: each is forked from
one that imported torch and did nothing else. What it imports, reads and leaves behind besides is its own.

What has to begin before torch does is none of them: a library that is preloaded, the encoding of the streams, or an
import that is itself the question.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

_forks = multiprocessing.get_context("forkserver")


class Process:
    """`python ARGUMENTS…` as subprocess.Popen has it, with both outputs as text, as far as tests ask."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str | Path = ".") -> None:
        _forks.set_forkserver_preload(["torch"])
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        given = list(arguments), dict(env), os.path.abspath(cwd), list(map(str, self._outputs))
        self._process = _forks.Process(target=_run, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def errors(self) -> str:
        """What it has written to stderr so far."""
        path = self._outputs[1]
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Once; the process may have been killed."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        self._folder.cleanup()
        return out, err


def run(arguments: Sequence[str], env: Mapping[str, str], cwd: str | Path = ".") -> subprocess.CompletedProcess[str]:
    process = Process(arguments, env, cwd)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


def _run(arguments: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """In the child."""
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None  # TMPDIR is asked for again
    kind, *rest = arguments
    sys.argv = arguments if kind not in ("-c", "-m") else [kind, *rest[1:]]
    first = "" if kind in ("-c", "-m") else os.path.dirname(os.path.abspath(kind))
    sys.path = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    try:
        if kind == "-c":
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    finally:
        # A process of multiprocessing ends without them.
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
