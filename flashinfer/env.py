# SPDX-License-Identifier: Apache-2.0
"""Every environment variable this library reads, declared once: name, type, default, meaning.

Nothing is read at import. A setting is read when it is needed (`env.CACHE_DIR.get()`), and an unparsable value is an
error that names the variable rather than a silent default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from flashinfer.errors import InvalidSetting

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    name: str
    parse: Callable[[str], T]
    default: T
    doc: str

    def get(self) -> T:
        """The value in force. Raises InvalidSetting."""
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise InvalidSetting(f"{self.name}={text!r}: {error}") from None


def _boolean(text: str) -> bool:
    try:
        return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
    except KeyError:
        raise ValueError("expected 0, 1, true or false") from None


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text.lower()

    return parse


def _sanitizers(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip().lower() for part in text.split(","))
    if not set(chosen) <= {"address", "undefined"}:
        raise ValueError("expected address, undefined or both, separated by a comma")
    return tuple(sorted(set(chosen)))


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(os.pathsep) if part)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()  # absolute: the process may change its directory later
    except RuntimeError:
        raise ValueError("there is no home directory to stand for ~; give the whole path") from None


CACHE_DIR: Setting[Path | None] = Setting(
    "FLASHINFER_CACHE_DIR",
    _path,
    None,
    "Where JIT artifacts and miss records live (default: the user cache directory).",
)
AOT_PATH: Setting[tuple[Path, ...]] = Setting(
    "FLASHINFER_AOT_PATH",
    _paths,
    (),
    "Folders with a registry.json, searched before the installed flashinfer_aot (in-house kernel sets).",
)
AOT_TRUST: Setting[Path | None] = Setting(
    "FLASHINFER_AOT_TRUST",
    _path,
    None,
    "A public key, or a folder of them (*.pem): sets that none of them has signed are not used.",
)
DISABLE_AOT = Setting("FLASHINFER_DISABLE_AOT", _boolean, False, "Ignore every AOT registry.")
DISABLE_JIT = Setting("FLASHINFER_DISABLE_JIT", _boolean, False, "Never compile: a kernel no store holds is an error.")
RECORD_MISSES = Setting(
    "FLASHINFER_RECORD_MISSES", _boolean, True, "Write a record of each request AOT did not answer."
)
TAG = Setting(
    "FLASHINFER_TAG", str, "", "Which model this process serves, such as llama-3-8b/prefill: noted in miss records."
)
LOG_LEVEL = Setting(
    "FLASHINFER_LOG_LEVEL", _choice("debug", "info", "warning", "error"), "info", "Level of the `flashinfer` logger."
)
CHECK_INDICES = Setting(
    "FLASHINFER_CHECK_INDICES",
    _boolean,
    False,
    "Check the values of index tensors on a GPU too, which waits for the device: a wrong index becomes an error.",
)
CUDA_TOOLCHAIN = Setting(
    "FLASHINFER_CUDA_TOOLCHAIN",
    _choice("nvrtc", "nvcc"),
    "nvrtc",
    "Compiler of CUDA kernels. Its name and version are part of the JIT cache key.",
)
CXX = Setting("FLASHINFER_CXX", str, "", "Host C++ compiler of CPU kernels (default: g++, then clang++, then c++).")
CPU_TARGET = Setting("FLASHINFER_CPU_TARGET", str, "", "CPU instruction set to build for (default: this machine's).")
SANITIZE: Setting[tuple[str, ...]] = Setting(
    "FLASHINFER_SANITIZE",
    _sanitizers,
    (),
    "Sanitizers to compile CPU kernels with: address, undefined. Part of their digests; see docs/testing.md.",
)

# Read while the package is installed (docs/packaging.md), and by nothing that is imported.
OF_INSTALLING = ("FLASHINFER_ENABLE_AOT", "FLASHINFER_AOT_CONFIG", "FLASHINFER_AOT_TARGETS")

ALL: tuple[Setting[object], ...] = tuple(value for value in globals().values() if isinstance(value, Setting))
