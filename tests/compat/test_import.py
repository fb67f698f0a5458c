# SPDX-License-Identifier: Apache-2.0
"""Importing is free: no file, no environment variable, no CUDA call, no time."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import pytest

import flashinfer
from tests.kit import finish, spawn

# Imports the package, and what serving engines import, after torch; says what that cost and touched.
WATCHED = """
import builtins, json, os, sys, time
begin = time.process_time()
import torch
of_torch = time.process_time() - begin

read = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)
real = os.environ
watched = Watched.__new__(Watched)
watched.__dict__.update(real.__dict__)
os.environ = watched
os.getenv = watched.get

written, started = [], []
def audit(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(str(path))
    elif event in ("os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"):
        written.append(f"{event} {args[0]}")
    elif event in ("subprocess.Popen", "os.fork", "ctypes.dlopen"):
        started.append(f"{event} {args[0]}")
sys.dont_write_bytecode = True
sys.addaudithook(audit)

begin = time.process_time()
import flashinfer
alone = time.process_time() - begin
begin = time.process_time()
for name in MODULES:
    __import__("flashinfer." + name)
operators = time.process_time() - begin
touched = {"read": list(read), "written": list(written), "started": list(started)}

# The traps themselves work.
import flashinfer.env, ctypes
try:
    flashinfer.env.LOG_LEVEL.get()
except ValueError:
    pass
assert read[-1] == "FLASHINFER_LOG_LEVEL", read
open(os.devnull, "w").close()
assert written[-1] == os.devnull
ctypes.CDLL(None)
assert started

print(json.dumps({
    **touched,
    "alone_ms": alone * 1e3,
    "operators_ms": operators * 1e3,
    "torch_ms": of_torch * 1e3,
    "cuda": torch.cuda.is_initialized(),
    "threads": len(__import__("threading").enumerate()),
}))
"""


def watched_import(home: Path, modules: list[str]) -> dict[str, object]:
    code = f"MODULES = {modules!r}\n" + WATCHED
    out, err = finish(spawn(code, HOME=home, FLASHINFER_CACHE_DIR=None, FLASHINFER_LOG_LEVEL="not a level"))
    assert err == ""
    report: dict[str, object] = json.loads(out)
    return report


def operator_modules() -> list[str]:
    """Every public module of an operator."""
    return sorted({module for module in flashinfer._EXPORTS.values() if _exists(module)})


def _exists(module: str) -> bool:
    return any(found.name == module for found in pkgutil.iter_modules(flashinfer.__path__))


def test_import_costs_and_touches_nothing(tmp_path: Path) -> None:
    """The time is that of the processor, beside what torch takes in the same process: others may be at work."""
    report = watched_import(tmp_path, operator_modules())
    assert report["read"] == [], "environment variables"
    assert report["written"] == [], "files"
    assert report["started"] == [], "processes and libraries"
    assert report["cuda"] is False
    assert report["threads"] == 1
    assert list(tmp_path.iterdir()) == []
    alone, operators, torch = (float(str(report[f"{what}_ms"])) for what in ("alone", "operators", "torch"))
    print(f"import flashinfer: {alone:.1f} ms; every operator module: {operators:.1f} ms; torch: {torch:.0f} ms")
    assert alone <= torch / 50
    assert operators <= torch / 5, "of all modules, loaded on first use"


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, flashinfer.cli; print('torch' in sys.modules)"
    out, _ = finish(spawn(code))
    assert out.strip() == "False"


def test_kernel_families_do_not_import_torch() -> None:
    """The compile processes of an AOT build start quickly."""
    code = "import sys; from flashinfer import families; families.register_all(); print('torch' in sys.modules)"
    out, _ = finish(spawn(code))
    assert out.strip() == "False"


def test_public_names_are_found_on_first_use() -> None:
    assert callable(flashinfer.rmsnorm)
    assert "rmsnorm" in dir(flashinfer)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_operator'"):
        _ = flashinfer.no_such_operator


def test_spawned_processes_find_what_tests_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_on_the_path.py").write_text("name = 'found'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, _ = finish(spawn("import only_on_the_path, tests.kit; print(only_on_the_path.name)"))
    assert out.strip() == "found"
