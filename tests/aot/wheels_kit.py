# SPDX-License-Identifier: Apache-2.0
"""Wheels, sdists, indexes and environments without a network, as pip makes them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path

from tests.kit import PATIENCE_SECONDS, ROOT

PROJECT_URL, FORK_URL = "https://github.com/owner/name", "https://github.com/fork/name"
PURE, MACHINE = "py3-none-any", f"py3-none-linux_{os.uname().machine}"


def packing_variables() -> dict[str, str]:
    """Bytecode of what packs is kept for the next process, that of build backends not beside them in the project. The
    repository's address is not that of whoever runs the tests."""
    bytecode = Path(os.environ["FLASHINFER_CACHE_DIR"]) / "bytecode"
    return {"PYTHONPYCACHEPREFIX": str(bytecode), "FLASHINFER_PROJECT_URL": PROJECT_URL}


def pip(*args: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run pip as if no configuration file and no variable of it existed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FLASHINFER_"))}
    clean.update(PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1", **(environment or {}))
    command = [sys.executable, "-m", "pip", *map(str, args)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(project: Path, folder: Path, **variables: str | Path) -> Path:
    """The wheel pip makes of a project folder or sdist."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**packing_variables(), **{name: str(value) for name, value in variables.items()}}
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, project, environment=environment)
    return only_wheel(folder)


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def sdist_of(project: Path, folder: Path, **variables: str | Path) -> Path:
    return built_by_hook("build_sdist", project, folder, **variables)


def built_by_hook(hook: str, project: Path, folder: Path, **variables: str | Path) -> Path:
    """What the build backend's hook makes of a project: build_sdist, build_editable."""
    code = f"import sys; sys.path.insert(0, ''); from build_backend import {hook}; {hook}(sys.argv[1])"
    environment = {**os.environ, **packing_variables(), **{name: str(value) for name, value in variables.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(
        command, cwd=project, env=environment, check=True, timeout=PATIENCE_SECONDS, capture_output=True, text=True
    )
    (made,) = folder.iterdir()
    return made


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesHeaderParser().parsebytes(file.read(name))


def bare_wheel(
    project: str, folder: Path, *requires: str, version: str = "99.0", modules: tuple[str, ...] = ()
) -> Path:
    """A wheel of that name with nothing but these modules inside, each of which says whose it is."""
    stem = f"{project.replace('-', '_')}-{version}"
    path = folder / f"{stem}-{PURE}.whl"
    metadata = [f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}"]
    contents = {
        **{module: f"owner = {project!r}\n" for module in modules},
        f"{stem}.dist-info/METADATA": "\n".join([*metadata, *(f"Requires-Dist: {text}" for text in requires), ""]),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {PURE}\n",
    }
    contents[f"{stem}.dist-info/RECORD"] = "".join(f"{name},,\n" for name in [*contents, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as file:
        for name, text in contents.items():
            file.writestr(name, text)
    return path


def build_index(*files: Path, out: Path, stand_ins: tuple[str, ...] = ()) -> str:
    options = [text for pin in stand_ins for text in ("--stand-in", pin)]
    command = [sys.executable, ROOT / "scripts" / "build_index.py", *files, "--out", out, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS).stdout


class Environment:
    """A virtual environment without pip."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self.borrowed = folder / "borrowed"

    @property
    def site(self) -> Path:
        return next((self.borrowed.parent / "lib").glob("python*/site-packages"))

    def make(self, borrows: bool = True) -> None:
        folder = self.borrowed.parent
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=PATIENCE_SECONDS
        )
        # What the outer environment has, torch above all, but nothing of ours that may be installed there.
        self.borrowed.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "flashinfer" not in entry.name and borrows:
                (self.borrowed / entry.name).symlink_to(entry)

    def install(self, *args: str | Path) -> None:
        pip("--python", self.python, "install", "--quiet", *args)

    def run(self, *args: str | Path, cwd: Path, **variables: str) -> str:
        """Run with the torch of the environment these tests run in, found after everything installed here."""
        search_path = os.pathsep.join([str(self.site), str(self.borrowed)])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FLASHINFER_")}
        done = subprocess.run(
            [str(self.python), *map(str, args)],
            env={**clean, "PYTHONPATH": search_path, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
