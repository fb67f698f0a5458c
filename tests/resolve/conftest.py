# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer import env
from flashinfer.cli import main


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, no companion, and no setting of the caller's."""
    for name in [name for name in os.environ if name.startswith("FLASHINFER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("flashinfer.jit.stores.AotStore.roots", lambda self: list(env.AOT_PATH.get()))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main(argv)
        except SystemExit as exit_:  # argparse
            code = int(str(exit_.code))
        out, err = capfd.readouterr()
        return code, out, err

    return run
