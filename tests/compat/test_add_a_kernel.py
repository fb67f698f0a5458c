# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_kernel.md is followed to the letter: its blocks are written where it says, then compiled and run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.compat import pages

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
    added = pages.files("add_a_kernel.md")
    assert list(added) == [
        "csrc/toy/params.h",
        "csrc/toy/scale.cuh",
        "csrc/cpu/toy/scale.h",
        "flashinfer/families/toy.py",
        "flashinfer/toy.py",
    ]
    sections = pages.sections("add_a_kernel.md")
    added["tests/test_toy.py"], added["mine.toml"] = (
        sections["6. Test it against an oracle"][0],
        sections["7. Precompile it"][0],
    )
    added["tests/conftest.py"] = "from tests.conftest import *  # noqa: F403\n"
    printed = pages.follow(tmp_path, added, FOLLOW)
    assert re.search(r"\b[24] passed", printed), printed  # the cuda half skips without a GPU
