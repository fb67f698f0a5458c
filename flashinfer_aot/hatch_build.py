"""What goes into the distribution `flashinfer-aot` (hatchling runs this; see pyproject.toml).

The set is the folder FLASHINFER_AOT_SET names, else the package folder beside this file, where
`scripts/build_aot.py --out flashinfer_aot/flashinfer_aot` puts it. Packed is what its registry names, checked file by
file.

Variables of the build:
    FLASHINFER_AOT_SET             folder of the set to pack
    FLASHINFER_AOT_LOCAL_VERSION   `cu130` makes version 0.1.0+cu130; `auto` takes the CUDA version of the compiler
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "flashinfer_aot"
# machine of a CPU kernel's target -> as platform tags spell it
_ARCHITECTURES = {"x86-64": "x86_64", "armv8": "aarch64"}

_HOW = "Build one first: scripts/build_aot.py --config core --target sm_80,sm_90a --out flashinfer_aot/flashinfer_aot"


def here() -> Path:
    return Path(__file__).resolve().parent


def set_folder() -> Path:
    chosen = os.environ.get("FLASHINFER_AOT_SET")
    return Path(chosen).expanduser().resolve() if chosen else here() / PACKAGE


def read_registry() -> dict[str, Any] | None:
    """The registry of the set; None where none has been built. Raises ValueError for a file that is none."""
    path = set_folder() / "registry.json"
    if not path.exists():
        if "FLASHINFER_AOT_SET" in os.environ:
            raise FileNotFoundError(f"FLASHINFER_AOT_SET: there is no {path}")
        return None
    try:
        registry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = registry["format"] == 1 and isinstance(registry["version"], str)
        whole = whole and all({"file", "sha256", "target"} <= entry.keys() for entry in registry["kernels"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not the registry of a set; delete it and run scripts/build_aot.py again")
    return registry


def version() -> str:
    """That of the sources the set was built from, which must be those of this checkout, if it is one."""
    registry, checkout = read_registry(), _checkout_version()
    if registry is not None and checkout is not None and registry["version"] != checkout:
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


class Kernels(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # finds the set where it lies, once it is built
            return
        registry = read_registry()
        if registry is None:
            raise FileNotFoundError(f"there is no set to pack: no registry.json in {set_folder()}. {_HOW}")
        if not registry["kernels"]:
            raise ValueError(f"the set in {set_folder()} holds no kernel; a wheel of it would only hide that. {_HOW}")
        included = build_data["force_include"]
        included[str(set_folder() / "registry.json")] = f"{PACKAGE}/registry.json"
        if (set_folder() / "registry.json.sig").is_file():
            included[str(set_folder() / "registry.json.sig")] = f"{PACKAGE}/registry.json.sig"
        for entry in registry["kernels"]:
            included[str(_checked(entry))] = f"{PACKAGE}/{entry['file']}"
        if self.target_name == "wheel":
            build_data["tag"] = _tag(registry)
            build_data["pure_python"] = build_data["tag"].endswith("-any")


def _checked(entry: dict[str, Any]) -> Path:
    path = (set_folder() / entry["file"]).resolve()
    if not path.is_relative_to(set_folder()):
        raise ValueError(f"the registry names a file outside its folder: {entry['file']}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ValueError(
            f"{path} is not the file the registry describes (sha256 differs); run scripts/build_aot.py again"
        )
    return path


def _tag(registry: dict[str, Any]) -> str:
    """Cubins run wherever their GPU does; CPU libraries tie the wheel to Linux on their architecture."""
    machines = set()
    for entry in registry["kernels"]:
        for prefix, machine in _ARCHITECTURES.items():
            if entry["target"].startswith(prefix):
                machines.add(machine)
    if len(machines) > 1:
        raise ValueError(f"the set holds CPU libraries for {' and '.join(sorted(machines))}; build one set for each")
    return f"py3-none-linux_{machines.pop()}" if machines else "py3-none-any"
