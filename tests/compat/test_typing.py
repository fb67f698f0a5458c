# SPDX-License-Identifier: Apache-2.0
"""What a user's type checker sees: every public name with its annotations, under `mypy --strict`."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flashinfer
from tests.kit import PATIENCE_SECONDS, ROOT

STUB = ROOT / "flashinfer" / "__init__.pyi"

CALLS = """
import torch

import flashinfer
from flashinfer.errors import FlashInferError, KernelMissing

x = torch.zeros(8, 64)
positions = torch.arange(8)
y: torch.Tensor = flashinfer.rmsnorm(x, x[0], eps=1e-5)
flashinfer.fused_add_rmsnorm(x, x, x[0])
z: torch.Tensor = flashinfer.silu_and_mul(x)
q, k = flashinfer.apply_rope_pos_ids(x, x, positions)
v: torch.Tensor = q + k
merged, lse = flashinfer.merge_state(x, x, x, x)
probs: torch.Tensor = flashinfer.top_k_renorm_probs(x, 10)
decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(x, kv_layout="NHD")
decode.plan(positions, positions, positions, 32, 8, 128, 16, q_data_type=torch.bfloat16)
prefill: flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper
prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(x)
try:
    result = decode.run(q, k)
except KernelMissing as error:
    known: FlashInferError = error
version: str = flashinfer.__version__
"""

MISTAKES = """
import torch

import flashinfer

x = torch.zeros(8, 64)
flashinfer.rmsnorm(x)
flashinfer.rmsnorm(x, x, eps="small")
flashinfer.BatchDecodeWithPagedKVCacheWrapper(x, 5)
flashinfer.no_such_operator(x)
n: int = flashinfer.silu_and_mul(x)
"""


def mypy(folder: Path, **programs: str) -> list[str]:
    """The errors in programs by name."""
    pytest.importorskip("mypy")
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    # The package is found as installed packages with py.typed are; of its own code nothing is reported.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "user"), *(f"{name}.py" for name in programs)]
    environment = {"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    *errors, ending = done.stdout.splitlines()
    assert "error" in ending or "Success" in ending, done.stdout + done.stderr
    return errors


def test_the_stub_has_every_public_name() -> None:
    """Without it a type checker sees `Any`: names are found by `__getattr__`."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                assert each.asname == each.name, "only so it is public"
                found[each.name] = (node.module or "").removeprefix("flashinfer").removeprefix(".")
    assert found == expected_names(), "python -m tests.compat.test_typing writes it anew"


def expected_names() -> dict[str, str]:
    """Public name -> the module it is in; "" for a module itself."""
    modules = dict.fromkeys(flashinfer._EXPORTS.values(), "")
    return {**modules, **flashinfer._EXPORTS, "__version__": "version"}


def write_stub() -> None:
    text = STUB.read_text().partition("\nfrom ")[0] + "\n"
    for name, module in sorted(expected_names().items(), key=lambda entry: entry[::-1]):
        text += f"from flashinfer{'.' if module else ''}{module} import {name} as {name}\n"
    STUB.write_text(text)
    for command in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
        subprocess.run(["ruff", *command, str(STUB)], cwd=ROOT, check=True)


def test_calls_of_users_pass_and_their_mistakes_do_not(tmp_path: Path) -> None:
    errors = mypy(tmp_path, calls=CALLS, mistakes=MISTAKES)
    places = {tuple(line.split(":")[:2]) for line in errors if ": error:" in line}
    assert places == {("mistakes.py", line) for line in ("7", "8", "9", "10", "11")}, errors


def is_ours(member: Any) -> bool:
    """Not inherited from Python, as an enum's are."""
    return str(getattr(member, "__module__", "")).startswith("flashinfer")


@pytest.mark.parametrize("name", flashinfer._EXPORTS)
def test_public_annotations_are_complete(name: str) -> None:
    public = getattr(flashinfer, name)
    functions: list[Any] = [public]
    if inspect.isclass(public):
        members = inspect.getmembers(public, callable)
        ours = [(attribute, member) for attribute, member in members if is_ours(member)]
        functions = [member for attribute, member in ours if attribute == "__init__" or attribute[0] != "_"]
    for function in functions:
        signature = inspect.signature(function)
        given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
        assert all(each.annotation is not each.empty for each in given), function
        assert signature.return_annotation is not signature.empty, function


if __name__ == "__main__":
    write_stub()
