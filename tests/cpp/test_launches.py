# SPDX-License-Identifier: Apache-2.0
"""What the C++ headers launch on GPUs is what Python launches: on one that is not there, byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer import target
from tests.cpp.kit import pretended_gpu
from tests.kit import ROOT, python_path


@pytest.mark.parametrize(
    ("capability", "num_sms"),
    [(90, 132), pytest.param(80, 108, marks=pytest.mark.slow), pytest.param(120, 170, marks=pytest.mark.slow)],
)
def test_launches(
    capability: int, num_sms: int, driver: Path, c_library: Path, recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    variables = {
        **pretended_gpu(driver, tmp_path / "launches.txt", capability, num_sms),
        "PYTHONPATH": python_path(),
        "FLASHINFER_DISABLE_JIT": "1",
        "FLASHINFER_CACHE_DIR": str(tmp_path),
        "FLASHINFER_NVRTC": str(tmp_path / "nowhere"),
        "FLASHINFER_RECORD_MISSES": "0",
    }
    command = [sys.executable, "-m", "tests.cpp.launches", str(c_library), str(tmp_path / "set")]
    done = subprocess.run(
        [*command, variables["PRETENDED_LAUNCHES"], recipes(target.of_capability(*divmod(capability, 10)))],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches alike" in done.stdout
