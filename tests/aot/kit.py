# SPDX-License-Identifier: Apache-2.0
"""What the tests of AOT sets share: small configs, builds of them, and damage to what was built."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest

from flashinfer import target
from flashinfer.aot import build, verify
from flashinfer.aot.config import read_specs
from flashinfer.cli import main
from flashinfer.errors import ToolchainMissing
from flashinfer.jit.stores import Registry
from flashinfer.jit.toolchain import cuda_include, toolchain
from tests.kit import ROOT, python_path

HOST = target.host()
# Another level of this architecture, for which its compiler compiles as well.
OTHER = next(
    level for level in ("x86-64-v3", "x86-64-v2", "armv8.2-a", "armv8-a") if level[:3] == HOST[:3] and level != HOST
)
BOTH = {(64, HOST), (128, HOST)}  # what the set `host_set` holds, as `kernels_of` says it
CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all workers of a run; to be read, not changed."""
    own = factory.getbasetemp()  # of a worker: a folder in that of the run
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"aot-{name}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            folder.mkdir()  # fails where making it has failed before
            make(folder)
            (folder / "whole").touch()
    return folder


def rmsnorm_rows(*hidden_sizes: int, vec_size: int = 4) -> str:
    """A config of the kernels of `kit.rmsnorm_spec`."""
    row = '[[kernel]]\nfamily = "rmsnorm"\ndtype = "fp32"\nhidden_size = {}\nvec_size = {}\n'
    return "\n".join(row.format(size, vec_size) + "add_residual = false\ngemma = false\n" for size in hidden_sizes)


def write_config(folder: Path, text: str, name: str = "config.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def build_set(config: Path, out: Path, *target_names: str, **how: Any) -> build.Report:
    """What a build into `out` reports; `how` are keywords of `build`."""
    return build.build(read_specs([config], target_names or [HOST]), out, **how)


def command(config: Path, out: Path, *options: str) -> list[str]:
    """Arguments of `flashinfer aot build` and scripts/build_aot.py that build a set for this machine."""
    return ["--config", str(config), "--target", HOST, "--out", str(out), *options]


def run_cli(*argv: str | Path) -> int:
    return main([str(arg) for arg in argv])


def run_script(argv: Sequence[str], **variables: str | Path) -> subprocess.Popen[str]:
    """scripts/build_aot.py in a process of its own."""
    return run([sys.executable, str(ROOT / "scripts" / "build_aot.py"), *argv], **variables)


def run(argv: Sequence[str], **variables: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        env={**os.environ, "PYTHONPATH": python_path(), **{name: str(value) for name, value in variables.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """Shells start what runs behind them with SIGINT ignored, which is handed down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def registry_of(root: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((root / "registry.json").read_text())
    return data


def change_registry(root: Path, **changes: Any) -> None:
    (root / "registry.json").write_text(json.dumps({**registry_of(root), **changes}))


def change_entries(root: Path, **changes: Any) -> None:
    """The same change in every entry of a registry."""
    change_registry(root, kernels=[{**entry, **changes} for entry in registry_of(root)["kernels"]])


def artifacts(root: Path) -> list[Path]:
    return sorted(path for path in (root / "kernels").rglob("*") if path.is_file())


def copy_set(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def has_nvrtc() -> bool:
    try:
        return bool(toolchain("cuda").identity and cuda_include())
    except ToolchainMissing:
        return False


def failing_compiler(folder: Path, action: str) -> Path:
    """A compiler for FLASHINFER_CXX that does `action` instead when the kernel has hidden_size 65."""
    script = folder / "failing-g++"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then exec g++ --version; fi
for last in "$@"; do case "$last" in *.cpp) source=$last;; esac; done
if grep -q "kHiddenSize = 65;" "$source"; then {action}; fi
exec g++ "$@"
"""
    )
    script.chmod(0o755)
    return script


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file of a folder and its content; None for a folder. The lock, which any reader may leave, is left out."""
    paths = [path for path in sorted(root.rglob("*")) if path.name != "build.jsonl.lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def kernels_of(root: Path) -> set[tuple[int, str]]:
    """(hidden_size, target) of each kernel of a set."""
    return {(entry["args"]["hidden_size"], entry["target"]) for entry in registry_of(root)["kernels"]}


def assert_sound(root: Path) -> None:
    assert not verify.verify(Registry(root))
