# SPDX-License-Identifier: Apache-2.0
"""What the tests of the resolver share: a small kernel, a compiler whose every use is counted, processes of their own,
file systems that are full or read-only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flashinfer import target
from flashinfer.aot.records import Rows
from flashinfer.families.layout import fast_divisor
from flashinfer.families.norm import RMSNORM
from flashinfer.jit import KernelSpec
from flashinfer.jit.loader import Kernel
from flashinfer.jit.misses import Miss
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import Source
from flashinfer.jit.stores import AotStore
from flashinfer.jit.toolchain import Compiled, HostCxx
from tests import warm

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 300.0  # for what takes seconds at most on a machine that has nothing else to do


def rmsnorm_spec(hidden_size: int = 64, on: str | None = None) -> KernelSpec:
    """A kernel that compiles in a tenth of a second."""
    on = on or target.host()
    return RMSNORM.spec(on, dtype="fp32", hidden_size=hidden_size, vec_size=4, add_residual=False, gemma=False)


def rmsnorm_values(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> dict[str, int | float | bytes]:
    """What a kernel of `rmsnorm_spec` is launched with, for contiguous rows."""
    num_rows, hidden_size = x.shape
    return {
        **{"input": x.data_ptr(), "residual": 0, "weight": weight.data_ptr(), "bias": 0, "output": out.data_ptr()},
        **dict.fromkeys(("input_row_stride", "residual_row_stride", "output_row_stride"), hidden_size),
        **dict.fromkeys(("input_group_stride", "residual_group_stride", "output_group_stride"), hidden_size),
        **{"num_rows": num_rows, **fast_divisor("rows_per_group", 1), "eps": 1e-6},
    }


def run_rmsnorm(kernel: Kernel, hidden_size: int = 64) -> None:
    """Launch a CPU kernel of `rmsnorm_spec` and compare with the definition."""
    x, weight = torch.randn(2, hidden_size), torch.randn(hidden_size)
    out = torch.full_like(x, torch.nan)
    kernel.on(None)((1, 1, 1), 0, rmsnorm_values(x, weight, out))
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(out, expected)


class CountingCxx(HostCxx):
    """The host compiler, counting its compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.num_compiles = 0
        self._lock = threading.Lock()

    def compile(self, source: Source) -> Compiled:
        with self._lock:
            self.num_compiles += 1
        return super().compile(source)


def cpu_resolver(cache: Path, compiler: HostCxx | None = None) -> Resolver:
    """A resolver of its own: no AOT registry, the given cache directory."""
    return Resolver(AotStore(roots=[]), cache, lambda kind: compiler or HostCxx())


def miss_records(cache: Path) -> list[Miss]:
    """What processes recorded below a folder, in the order of its files. Every line has to be a record."""
    rows = Rows([cache])
    found = [Miss(**row) for row, _ in rows]
    assert rows.broken == 0
    return found


def only_artifact(cache: Path) -> Path:
    """The one folder of a JIT cache that holds one kernel and nothing unfinished."""
    folders = [path for path in (cache / "jit").iterdir() if path.is_dir()]
    assert len(folders) == 1, folders
    assert sorted(file.name for file in folders[0].iterdir()) == ["kernel.so", "log.txt", "source.cpp", "spec.json"]
    return folders[0]


def set_field(path: Path, name: str, value: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


# ------------------------------------------------------------------------------------------------------------ processes


def compiler_script(folder: Path) -> tuple[Path, Path]:
    """A compiler for FLASHINFER_CXX and the file to which it adds a line per compile, which is then held as long as the
    file COMPILE_HELD and the process that asked exist."""
    script, uses = folder / "counting-g++", folder / "uses"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then exec g++ --version; fi
echo $$ >> "{uses}"
while [ -e "${{COMPILE_HELD:-}}" ]; do kill -0 $PPID || exit; sleep 0.02; done
exec g++ "$@"
"""
    )
    script.chmod(0o755)
    return script, uses


def spawn(code: str, **variables: str | Path | None) -> subprocess.Popen[str]:
    """Run Python code in a process with these environment variables; None removes one. No AOT registry answers it."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=_environment(variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def fork(code: str, **variables: str | Path | None) -> warm.Process:
    """The same in a process that finds torch imported."""
    return warm.Process(["-c", textwrap.dedent(code)], _environment(variables))


def python_path() -> str:
    """For processes: this checkout, then what this process was told of, where packages may be that a test needs."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _environment(variables: Mapping[str, str | Path | None]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLASHINFER_")}
    found = {**kept, "PYTHONPATH": python_path(), "FLASHINFER_DISABLE_AOT": "1", **variables}
    return {name: str(value) for name, value in found.items() if value is not None}


def finish(process: subprocess.Popen[str] | warm.Process) -> tuple[str, str]:
    """Wait for a process that has to succeed; its stdout and stderr."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------------- file systems


@contextmanager
def mounted_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; skips the test where mounting is not permitted."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a mounted folder read-only, for root too."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
