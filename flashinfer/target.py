# SPDX-License-Identifier: Apache-2.0
"""Targets: what machine code is made for.

A target is a compute capability with its suffix (`sm_80`, `sm_90a`, `sm_100f`) or a CPU instruction-set level
(`x86-64-v3`, `armv8.2-a`). `candidates` lists the targets whose machine code runs on a given one, best first:

- a cubin runs on its own major version with an equal or higher minor;
- an `a` (architecture-specific) cubin runs on exactly its own capability;
- an `f` (family-specific) cubin runs on its major version with an equal or higher minor;
- CPU levels include the ones below them.
"""

from __future__ import annotations

import functools
import platform
import re
from typing import TYPE_CHECKING

from flashinfer import env
from flashinfer.errors import UnsupportedConfig

if TYPE_CHECKING:
    import torch

_CPU_LEVELS = (
    ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"),
    ("armv8-a", "armv8.2-a"),
)
X86_FLAGS = {
    "x86-64-v2": {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
ARM_FLAGS = {"armv8.2-a": {"asimdhp", "fphp"}}
_CUDA = re.compile(r"sm_(\d+)(\d)([af]?)")
# GPUs that exist, from the oldest that the compilers of CUDA 13 know. `a` is there from 9.0 on, `f` from 10.0 on.
_CAPABILITIES = (75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)


def kind(target: str) -> str:
    """`"cuda"` or `"cpu"`; raises UnsupportedConfig for a name that is neither."""
    if _CUDA.fullmatch(target):
        return "cuda"
    if any(target in levels for levels in _CPU_LEVELS):
        return "cpu"
    known = ", ".join(level for levels in _CPU_LEVELS for level in levels)
    raise UnsupportedConfig(
        f"target {target!r} is unknown; expected sm_<capability>[a|f] (sm_80, sm_90a) or one of {known}"
    )


def named(text: str) -> list[str]:
    """The targets of a list that somebody typed, such as `"sm_80,sm_90a"`, each once and in its order.

    Raises UnsupportedConfig for an empty list, and for a name that is well-formed and of no GPU (`sm_99`, `sm_80a`). A
    GPU that is there is served as its driver describes it, whether this list knows it or not.
    """
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise UnsupportedConfig(f"target {text!r} names no target; expected for example sm_80,sm_90a,x86-64-v3")
    for name in names:
        if kind(name) == "cuda" and name not in _gpus():
            raise UnsupportedConfig(f"target {name!r} is unknown; expected one of {', '.join(_gpus())}")
    return names


@functools.cache
def _gpus() -> tuple[str, ...]:
    suffixes = [(number, "" if number < 90 else "a" if number < 100 else "af") for number in _CAPABILITIES]
    return tuple(f"sm_{number}{suffix}" for number, more in suffixes for suffix in ("", *more))


def capability(target: str) -> tuple[int, int]:
    """`"sm_90a"` -> `(9, 0)`."""
    match = _CUDA.fullmatch(target)
    if match is None:
        raise UnsupportedConfig(f"target {target!r} is not a CUDA target")
    return int(match[1]), int(match[2])


def launches_dependent(target: str) -> bool:
    """Whether a kernel can be started while the one before it still runs (programmatic dependent launch)."""
    return kind(target) == "cuda" and capability(target) >= (9, 0)


@functools.cache
def candidates(target: str) -> tuple[str, ...]:
    """Targets whose machine code runs on `target`, best first."""
    if kind(target) == "cpu":
        levels = next(levels for levels in _CPU_LEVELS if target in levels)
        return tuple(reversed(levels[: levels.index(target) + 1]))
    major, minor = capability(target)
    names = [f"sm_{major}{minor}a"] if target.endswith("a") else []
    for lower in range(minor, -1, -1):
        if major >= 10 and not target[-1].isdigit():
            names.append(f"sm_{major}{lower}f")
        names.append(f"sm_{major}{lower}")
    return tuple(names)


@functools.cache
def _of_gpu(index: int) -> str:
    import torch

    return of_capability(*torch.cuda.get_device_capability(index))


def of_capability(major: int, minor: int) -> str:
    """The target of a GPU: `(9, 0)` -> `"sm_90a"`."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def of_device(device: torch.device) -> str:
    """The target of a torch device: its exact capability (with `a` from Hopper on), or this machine's CPU level."""
    if device.type == "cuda":
        import torch

        return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return host()
    raise UnsupportedConfig(f"device {device} is not supported; expected a cuda or cpu device")


@functools.cache
def host() -> str:
    """The highest CPU level this machine has, or FLASHINFER_CPU_TARGET."""
    chosen = env.CPU_TARGET.get()
    if chosen:
        if kind(chosen) != "cpu":
            raise UnsupportedConfig(f"{env.CPU_TARGET.name}={chosen!r}: expected a CPU level such as x86-64-v3")
        return chosen
    arm = platform.machine() in ("aarch64", "arm64")
    level, steps = ("armv8-a", ARM_FLAGS) if arm else ("x86-64", X86_FLAGS)
    flags = _cpu_flags()
    for name, needed in steps.items():
        if not needed <= flags:
            break
        level = name
    return level


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()  # not Linux: the baseline level is always right
