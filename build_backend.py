# SPDX-License-Identifier: Apache-2.0
"""The build backend of the distribution `flashinfer`: setuptools (see packing.py), and kernels where asked for.

Variables of the build:
    FLASHINFER_ENABLE_AOT    1 compiles kernels and installs them inside of the package
    FLASHINFER_AOT_CONFIG    which ones: core (the default), smoke or a TOML file
    FLASHINFER_AOT_TARGETS   for which targets: native (the default, those of this machine) or a list as sm_80,sm_90a
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta

from packing import copied, files_of, files_of_set, read_registry, write_sdist

ROOT = Path(__file__).resolve().parent
SET = "flashinfer/precompiled"  # flashinfer.jit.stores looks there
# Folders of the source tree that live inside the installed package. An editable install finds them where they are.
_PACKAGE_DATA = ("csrc", "aot_configs", "include", "cpp")
_PACKAGES = ("flashinfer", "flashinfer_tvm")
_METADATA = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "flashinfer/version.py")
_SDIST = (
    *_METADATA,
    *_PACKAGE_DATA,
    *_PACKAGES,
    "scripts",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "build_backend.py",
    "packing.py",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "flashinfer_aot/pyproject.toml",
    "flashinfer_aot/setup.py",
    "flashinfer_aot/build_backend.py",
    "flashinfer_aot/packing.py",
    "flashinfer_aot/README.md",
    "flashinfer_aot/flashinfer_aot/__init__.py",
)
_BOOLEANS = {"": False, "0": False, "1": True, "false": False, "true": True}

Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    if not _is_aot():
        return []
    from flashinfer.aot import tools

    return tools.requirements(_targets())


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    directory = str(Path(metadata_directory).absolute())
    with copied(files_of(ROOT, *_METADATA)):
        return build_meta.prepare_metadata_for_build_wheel(directory)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    directory = str(Path(wheel_directory).absolute())
    inside = {f"flashinfer/{place}": path for place, path in files_of(ROOT, *_PACKAGE_DATA).items()}
    files = {**files_of(ROOT, *_METADATA, *_PACKAGES), **inside}
    with tempfile.TemporaryDirectory(prefix="flashinfer-set-") as name:
        if _is_aot():
            folder = Path(name)
            _compile(folder)
            registry = read_registry(folder) or {"kernels": []}
            files |= {f"{SET}/{place}": path for place, path in files_of_set(folder, registry).items()}
        with copied(files):
            return build_meta.build_wheel(directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    if _is_aot():
        _compile(ROOT / SET)
    return build_meta.build_editable(str(Path(wheel_directory).absolute()))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return write_sdist(files_of(ROOT, *_SDIST), Path(sdist_directory))


def _is_aot() -> bool:
    text = os.environ.get("FLASHINFER_ENABLE_AOT", "")
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"FLASHINFER_ENABLE_AOT={text!r}: expected 0, 1, true or false")
    return _BOOLEANS[text.lower()]


def _targets() -> str:
    return os.environ.get("FLASHINFER_AOT_TARGETS") or "native"


def _compile(out: Path) -> None:
    """The set holds just what is asked for: that of an editable install is brought up to date by installing again."""
    config = os.environ.get("FLASHINFER_AOT_CONFIG") or "core"
    command = [sys.executable, "-m", "flashinfer", "aot", "build", "--config", config, "--target", _targets()]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "--exact", "--out", str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": search_path}, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"FLASHINFER_ENABLE_AOT=1, and compiling {config} for {_targets()} failed with exit status "
            f"{done.returncode}; the reason is printed above (pip shows it with -v). Without the variable the install "
            "compiles nothing"
        )
