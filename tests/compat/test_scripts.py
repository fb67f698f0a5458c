"""The environment that scripts/ make, where python3 and pip are stand-ins: a run that is killed leaves nothing behind
that the next one trips over."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = ("pyproject.toml", "setup.py", "build_backend.py", "packing.py", "scripts/common.sh", "flashinfer/version.py")
# As `python3 -m venv` does, pip is left alone where it looks installed, whether or not its script was written.
PYTHON = """#!/bin/sh
echo "$0 $*" >>log
mkdir -p "$3/bin" "$3/lib" && touch "$3/pyvenv.cfg"
[ -e "$3/lib/pip" ] && exit
touch "$3/lib/pip"
if [ -e kill_venv ]; then rm kill_venv; kill -9 $PPID; exit; fi
printf '#!/bin/sh\\necho "pip $*" >>log\\nif [ -e kill_pip ]; then rm kill_pip; kill -9 $PPID; fi\\n' >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in KEY:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text(PYTHON)
    (tools / "python3").chmod(0o755)
    return tmp_path


def ensure_env(checkout: Path) -> int:
    command = f". scripts/common.sh; PATH={checkout}/tools:$PATH; ensure_env"
    return subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, check=False).returncode


def test_an_environment_is_made_once(checkout: Path) -> None:
    assert ensure_env(checkout) == 0
    log = (checkout / "log").read_text()
    assert log.count("pip install") == 2
    assert ensure_env(checkout) == 0
    assert (checkout / "log").read_text() == log
    (checkout / "packing.py").write_text("# changed")
    (checkout / ".venv/mine").touch()
    assert ensure_env(checkout) == 0
    assert (checkout / "log").read_text().count("pip install") == 4
    assert (checkout / ".venv/mine").exists(), "an environment that is whole is brought up to date, not made anew"


@pytest.mark.parametrize("where", ["kill_venv", "kill_pip"])
def test_a_killed_run_is_taken_up(checkout: Path, where: str) -> None:
    (checkout / where).touch()
    assert ensure_env(checkout) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert ensure_env(checkout) == 0
    assert (checkout / ".venv/bin/pip").exists()


def test_an_environment_of_somebody_else_is_added_to(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    for name in ("pyvenv.cfg", "mine"):
        (checkout / ".venv" / name).touch()
    assert ensure_env(checkout) == 0
    assert (checkout / ".venv/mine").exists()
