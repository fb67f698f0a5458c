"""What the C++ headers launch on GPUs is what Python launches: on one that is not there, byte by byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.kit import made_once
from tests.cpp.kit import compile_program
from tests.kit import ROOT, python_path


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        compile_program(ROOT / "tests" / "cpp" / "pretended_driver.cpp", folder / "libcuda.so.1", "-shared", "-fPIC")

    return made_once(tmp_path_factory, "driver", make)


@pytest.mark.parametrize(
    ("capability", "num_sms"),
    [(90, 132), pytest.param(80, 108, marks=pytest.mark.slow), pytest.param(120, 170, marks=pytest.mark.slow)],
)
def test_launches(capability: int, num_sms: int, driver: Path, c_library: Path, tmp_path: Path) -> None:
    variables = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": python_path(),
        "PRETENDED_LAUNCHES": str(tmp_path / "launches.txt"),
        "PRETENDED_CAPABILITY": str(capability),
        "PRETENDED_SMS": str(num_sms),
        "FLASHINFER_DISABLE_JIT": "1",
        "FLASHINFER_RECORD_MISSES": "0",
    }
    command = [sys.executable, "-m", "tests.cpp.launches", str(c_library), str(tmp_path / "set")]
    done = subprocess.run(
        [*command, variables["PRETENDED_LAUNCHES"]], env={**os.environ, **variables}, capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches alike" in done.stdout
