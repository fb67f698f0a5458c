"""docs/add_a_kernel.md is followed to the letter: its blocks are written where it says, then compiled and run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from flashinfer.jit.source import include_root

ROOT = Path(__file__).resolve().parents[2]
# What an edit of the source tree would do, for a tree beside it: the added files are found after the package's own.
FOLLOW = """
import sys
from pathlib import Path

import flashinfer.families
from flashinfer.jit import source
from flashinfer.jit.toolchain import Nvrtc

added = Path(sys.argv[1])
flashinfer.__path__.append(str(added / "flashinfer"))
flashinfer.families.__path__.append(str(added / "flashinfer" / "families"))
source.include_root = lambda: added / "csrc"

import pytest
from flashinfer.aot.config import read_specs

requested = read_specs([added / "mine.toml"], ["sm_80", "sm_90a"])
assert [spec.name for spec in requested] == ["scale-dtype=bf16"] * 2
import flashinfer.jit.toolchain as toolchain
toolchain.include_root = source.include_root
for spec in requested:
    assert Nvrtc().compile(source.render(spec)).machine_code.startswith(b"\\x7fELF")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", str(added / "tests" / "test_toy.py")]))
"""


def test_the_page_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add_a_kernel.md").read_text()
    blocks = dict(re.findall(r"^## \d\. [^\n]*`([^\s`]+)`\n.*?^```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert list(blocks) == [
        "csrc/toy/params.h",
        "csrc/toy/scale.cuh",
        "csrc/cpu/toy/scale.h",
        "flashinfer/families/toy.py",
        "flashinfer/toy.py",
    ]
    shutil.copytree(include_root(), tmp_path / "csrc")
    (tests_block,) = re.findall(r"^## 6.*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (toml_block,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    files = {**blocks, "tests/test_toy.py": tests_block, "mine.toml": toml_block}
    files["tests/conftest.py"] = "from tests.conftest import *  # noqa: F403\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[24] passed", done.stdout), done.stdout  # the cuda half skips without a GPU
