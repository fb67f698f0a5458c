# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/ that are followed to the letter: a block of code under a heading that names a file is that file."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from flashinfer.jit.source import include_root
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def programs(page: str) -> list[str]:
    """Its blocks of Python, in order."""
    return [block for kind, block in _FENCE.findall((ROOT / "docs" / page).read_text()) if kind == "python"]


def sections(page: str) -> dict[str, list[str]]:
    """Heading -> its blocks of code."""
    text = (ROOT / "docs" / page).read_text()
    parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)[1:]
    return {heading: [block for _, block in _FENCE.findall(body)] for heading, body in zip(parts[::2], parts[1::2])}


def files(page: str) -> dict[str, str]:
    """File -> what the page puts into it."""
    found = {}
    for heading, blocks in sections(page).items():
        name = re.search(r"`([^`\s]+\.\w+)`$", heading)
        if name and blocks:
            found[name[1]] = blocks[0]
    return found


def follow(folder: Path, added: dict[str, str], program: str) -> str:
    """Run a program that is given a folder with a copy of csrc/ and these files; returns what it prints."""
    shutil.copytree(include_root(), folder / "csrc")
    for name, text in added.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = warm.run(["-c", program, str(folder)], os.environ, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
