# SPDX-License-Identifier: Apache-2.0
"""FLASHINFER_SANITIZE: kernels that tell of stray accesses and of undefined behaviour, and are taken for no others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashinfer.jit.source import render
from tests.kit import rmsnorm_spec, spawn


def test_sanitizers_are_part_of_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for value in ("", "address", "undefined", "undefined,address"):
        monkeypatch.setenv("FLASHINFER_SANITIZE", value)
        digests.append(render(rmsnorm_spec()).digest)
    assert len(set(digests)) == 4
    monkeypatch.setenv("FLASHINFER_SANITIZE", "address,undefined")
    assert render(rmsnorm_spec()).digest == digests[-1]


def test_kernels_for_gpus_are_not_sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_SANITIZE", raising=False)
    plain = render(rmsnorm_spec(on="sm_80"))
    monkeypatch.setenv("FLASHINFER_SANITIZE", "address,undefined")
    assert render(rmsnorm_spec(on="sm_80")).digest == plain.digest


@pytest.mark.slow  # half a minute, most of it the interpreter under AddressSanitizer
def test_a_stray_access_is_reported(tmp_path: Path) -> None:
    """With the libraries that docs/testing.md preloads."""
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no sanitizer runtimes")
    process = spawn(
        f"""
        import pathlib, torch
        from tests.kit import cpu_resolver, rmsnorm_spec, rmsnorm_values
        x, weight = torch.randn(2, 64), torch.randn(64)
        out = torch.empty_like(x)
        values = rmsnorm_values(x, weight, out)
        launcher = cpu_resolver(pathlib.Path({str(tmp_path)!r})).load(rmsnorm_spec()).on(None)
        launcher((1, 1, 1), 0, values)
        print("what is right is let alone", flush=True)
        launcher((1, 1, 1), 0, {{**values, "num_rows": 3}})
        """,
        FLASHINFER_SANITIZE="address,undefined",
        LD_PRELOAD=" ".join(found),
        ASAN_OPTIONS="detect_leaks=0",
        OMP_NUM_THREADS="1",
    )
    out, err = process.communicate(timeout=600)
    assert out.strip() == "what is right is let alone", err
    assert process.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in err and "cpu/norm/rmsnorm.h" in err
