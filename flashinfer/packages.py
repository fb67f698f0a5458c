# SPDX-License-Identifier: Apache-2.0
"""The Python packages this library imports: what brings a module, and what to say where it is missing.

pyproject.toml declares the same. A machine that only builds sets may have been given fewer: none is taken for granted.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterable

# module -> what pip installs
RUNTIME = {
    "torch": "torch",
    "platformdirs": "platformdirs",
    "filelock": "filelock",
    "cuda.pathfinder": "cuda-pathfinder>=1.3",
    **({"tomli": "tomli"} if sys.version_info < (3, 11) else {}),
}
BUILD = {"ninja": "ninja", "tqdm": "tqdm"}
TRUST = {"cryptography": "cryptography>=3.4"}  # signatures of sets
TVM = {"tvm_ffi": "apache-tvm-ffi>=0.1.11,<0.2"}
# What any build of CUDA kernels needs where no torch brings it. Drivers before 580 want cubins of CUDA 12: extra cu12.
NVRTC, CUDA_HEADERS = "nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-runtime>=13,<14"
CU12 = ("nvidia-cuda-nvrtc-cu12>=12.8", "nvidia-cuda-runtime-cu12>=12.8")


def is_missing(module: str) -> bool:
    """Whether importing it would fail because it, or the package it is in, is not there."""
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        return True


def requirement(module: str) -> str | None:
    """What pip installs for a module of this list or one inside of it; None for any other."""
    for known, text in {**RUNTIME, **BUILD, **TRUST, **TVM}.items():
        if module == known or module.startswith(f"{known}.") or known.startswith(f"{module}."):
            return text
    return None


def pip_install(requirements: Iterable[str]) -> str:
    """The command, for a shell."""
    return f"pip install {shlex.join(requirements)}"


def names(requirements: Iterable[str]) -> str:
    """`["ninja", "cuda-pathfinder>=1.3"]` -> `ninja, cuda-pathfinder`."""
    return ", ".join(text.partition(">")[0] for text in requirements)
