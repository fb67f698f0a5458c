# SPDX-License-Identifier: Apache-2.0
"""What compiling a set takes: ninja, a progress bar, and a compiler for each kind of target. Not torch."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Optional

from flashinfer import env, packages
from flashinfer import target as targets
from flashinfer.errors import DriverError, ToolchainMissing
from flashinfer.jit import driver, toolchain


def check(target_names: Iterable[str]) -> None:
    """Raises ToolchainMissing naming all that compiling for these lacks on this machine, and how to get it."""
    kinds = {targets.kind(name) for name in target_names}
    if not kinds:
        return
    requirements = missing()
    others = []  # what pip does not install, and how to get it
    if "cuda" in kinds and env.CUDA_TOOLCHAIN.get() == "nvrtc":
        requirements += _nvrtc_lacks()
    elif "cuda" in kinds:
        others += _lacks(toolchain.Nvcc.executable)
    if "cpu" in kinds:
        others += _lacks(toolchain.HostCxx(env.CXX.get()).executable)
    if requirements:
        others.insert(0, (f"no {packages.names(requirements)}", packages.pip_install(requirements)))
    if others:
        whats, steps = zip(*others)
        raise ToolchainMissing(
            f"building takes more than is here: {'; '.join(whats)}. Next step: {'; '.join(steps)}. Torch is not needed"
        )


NATIVE = "native"


def target_names(text: str) -> list[str]:
    """The targets of a list that somebody typed; `native` is this machine's: of its GPUs, or of its CPU without one.

    Raises UnsupportedConfig for what is no target.
    """
    return targets.named(",".join(",".join(_native()) if name.strip() == NATIVE else name for name in text.split(",")))


def _native() -> list[str]:
    try:
        found = driver.capabilities()
    except (OSError, DriverError):  # no driver, or none that works
        found = []
    return [targets.of_capability(*capability) for capability in found] or [targets.host()]


def requirements(text: str) -> list[str]:
    """What pip has to install for a build for these targets (see `target_names`) in an environment that is empty."""
    found = [*packages.BUILD.values(), *(text for module, text in packages.RUNTIME.items() if module != "torch")]
    if any(targets.kind(name) == "cuda" for name in target_names(text)) and env.CUDA_TOOLCHAIN.get() == "nvrtc":
        found += packages.CU12 if _is_driver_of_cuda_12() else (packages.NVRTC, packages.CUDA_HEADERS)
    return found


def _is_driver_of_cuda_12() -> bool:
    try:
        return driver.version()[0] == 12
    except (OSError, DriverError):  # the set is for another machine
        return False


def missing() -> list[str]:
    """What any build takes and pip has to install."""
    tool = [packages.BUILD["ninja"]] if ninja() is None else []
    modules = ["tqdm", *(["tomli"] if "tomli" in packages.RUNTIME else [])]
    return tool + [packages.requirement(module) or module for module in modules if packages.is_missing(module)]


def ninja() -> Optional[str]:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def _nvrtc_lacks() -> list[str]:
    pathfinder, parts = (
        "cuda.pathfinder",
        {packages.NVRTC: toolchain.nvrtc_library, packages.CUDA_HEADERS: toolchain.cuda_include},
    )
    if not packages.is_missing(pathfinder):
        return [text for text, find in parts.items() if _lacks(find)]
    # Which alone finds those of a CUDA toolkit. Without it, pip's are known by name.
    return [packages.RUNTIME[pathfinder], *(text for text in parts if not _is_installed(packages.names([text])))]


def _is_installed(distribution: str) -> bool:
    """In the build for either CUDA major."""
    for name in (distribution, f"{distribution}-cu12"):
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _lacks(find: Callable[[], object]) -> list[tuple[str, str]]:
    """What a look for a compiler says is missing, and the next step; nothing where it is found."""
    try:
        find()
        return []
    except ToolchainMissing as error:
        what, _, step = str(error).partition("; ")
        return [(what, step)]
