# SPDX-License-Identifier: Apache-2.0
"""What goes into the distribution `flashinfer-aot`, which setuptools packs (see packing.py).

The set is the folder FLASHINFER_AOT_SET names, else the package folder beside this file, where
`scripts/build_aot.py --out flashinfer_aot/flashinfer_aot` puts it. Packed is what its registry names, checked file by
file.

Variables of the build:
    FLASHINFER_AOT_SET             folder of the set to pack
    FLASHINFER_AOT_LOCAL_VERSION   `cu130` makes version 0.1.0+cu130; `auto` takes the CUDA version of the compiler
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import build_meta

import packing
from packing import copied, files_of, write_sdist

PACKAGE = "flashinfer_aot"
_SOURCES = ("pyproject.toml", "setup.py", "README.md", f"{PACKAGE}/__init__.py")
_HOW = "Build one first: scripts/build_aot.py --config core --target sm_80,sm_90a --out flashinfer_aot/flashinfer_aot"

Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    directory = str(Path(metadata_directory).absolute())
    with copied(files_of(here(), *_SOURCES)):
        return build_meta.prepare_metadata_for_build_wheel(directory)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    directory = str(Path(wheel_directory).absolute())
    with copied({**files_of(here(), *_SOURCES), **_packed()}):
        return build_meta.build_wheel(directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Finds the set where it lies, once it is built."""
    return build_meta.build_editable(str(Path(wheel_directory).absolute()))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    files = {**files_of(here(), *_SOURCES, "build_backend.py", "packing.py"), **_packed()}
    return write_sdist(files, Path(sdist_directory).absolute())


def here() -> Path:
    return Path(__file__).resolve().parent


def set_folder() -> Path:
    chosen = os.environ.get("FLASHINFER_AOT_SET")
    return Path(chosen).expanduser().resolve() if chosen else here() / PACKAGE


def read_registry() -> dict[str, Any] | None:
    """The registry of the set; None where none has been built. Raises ValueError for a file that is none."""
    registry = packing.read_registry(set_folder())
    if registry is None and "FLASHINFER_AOT_SET" in os.environ:
        raise FileNotFoundError(f"FLASHINFER_AOT_SET: there is no {set_folder() / packing.REGISTRY}")
    return registry


def version() -> str:
    """That of the sources the set was built from, which must be those of this checkout, if it is one."""
    if (here() / "PKG-INFO").exists():  # an sdist: what it was made as
        return re.findall(r"^Version: (.*)$", (here() / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)[0]
    registry, checkout = read_registry(), _checkout_version()
    if registry is not None and checkout is not None and Version(registry["version"]) != Version(checkout):
        raise ValueError(
            f"the kernels in {set_folder()} were built from version {registry['version']}, this checkout is "
            f"{checkout}; run scripts/build_aot.py again, with --refresh or --exact where it says that others are kept"
        )
    base = checkout if registry is None else registry["version"]
    if base is None:
        raise FileNotFoundError(f"no registry.json in {set_folder()}, and no flashinfer/version.py in {here().parent}")
    local = os.environ.get("FLASHINFER_AOT_LOCAL_VERSION", "")
    if local == "auto":
        local = _cuda_version(registry)
    return f"{base}+{local}" if local else base


def _checkout_version() -> str | None:
    path = here().parent / "flashinfer" / "version.py"
    match = re.search(r'__version__ = "([^"]+)"', path.read_text()) if path.exists() else None
    return match[1] if match else None


def _cuda_version(registry: dict[str, Any] | None) -> str:
    """`cu130` when the cubins come from CUDA 13.0; empty when there are none. Raises ValueError for a mixture."""
    found = {entry.get("cuda") for entry in (registry or {"kernels": []})["kernels"]} - {None}
    if len(found) > 1:
        raise ValueError(f"the set holds kernels of CUDA {' and '.join(sorted(found))}; build one set per version")
    return "".join(f"cu{text.replace('.', '')}" for text in found)


def _packed() -> dict[str, Path]:
    """The files of the set, by their place in the distribution."""
    registry = read_registry()
    if registry is None:
        raise FileNotFoundError(f"there is no set to pack: no registry.json in {set_folder()}. {_HOW}")
    if not registry["kernels"]:
        raise ValueError(f"the set in {set_folder()} holds no kernel; a wheel of it would only hide that. {_HOW}")
    return {f"{PACKAGE}/{place}": path for place, path in packing.files_of_set(set_folder(), registry).items()}
