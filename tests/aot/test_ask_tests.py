# SPDX-License-Identifier: Apache-2.0
"""What tests ask for on a GPU is noted without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kit import PATIENCE_SECONDS, ROOT, miss_records


def test_a_test_of_a_gpu_is_noted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.aot.ask_tests", "--ask", str(tmp_path / "misses")]
    command += ["-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/ops/test_norm.py", "-k", "test_layernorm"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=PATIENCE_SECONDS)
    found = {(record.spec["family"], record.spec["target"]) for record in miss_records(tmp_path)}
    assert found == {("layernorm", "sm_90a")}
