# SPDX-License-Identifier: Apache-2.0
"""From why kernels were missed to what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashinfer import env
from flashinfer.aot.config import ConfigError, read_specs
from flashinfer.aot.records import Tally
from flashinfer.errors import UnsupportedConfig
from flashinfer.version import __version__

NOT_INSTALLED = "flashinfer_aot is not installed"
ADD = "Add these kernels to the precompiled set"
INSTALL = 'pip install "flashinfer[aot]"'
# What a reason begins with -> the next step. A reason may name several registries; the first step that fits counts.
_STEPS = (
    (NOT_INSTALLED, INSTALL),
    ("AOT is disabled", f"Unset {env.DISABLE_AOT.name}"),
    ("needs driver", "Update the driver, or install the flashinfer-aot that was built for CUDA 12"),
    (r"the kernel registry in [^;]* is not trusted: signatures cannot", 'pip install "flashinfer[trust]"'),
    (
        r"the kernel registry in [^;]* is not trusted",
        f"flashinfer aot sign, or a set that a key of {env.AOT_TRUST.name} has signed",
    ),
    (
        r"sha256 mismatch|\S+ is unreadable|the kernel registry in",
        "flashinfer aot verify, then install the set again (your own: flashinfer aot build --refresh --out DIR)",
    ),
    (
        "version |digest differs",
        f"pip install 'flashinfer-aot=={__version__}' (your own set: flashinfer aot build --refresh --out DIR)",
    ),
    ("not loadable", "flashinfer doctor; then build the set anew for these machines"),
    ("no machine code for", ADD),
    ("not in registry", ADD),
)


@dataclass
class Step:
    what: str
    reasons: list[str]  # most seconds first
    seconds: float
    kernels: list[Tally]


def steps(kernels: Iterable[Tally]) -> list[Step]:
    """The next steps, most seconds first. A kernel that several reasons speak of is under each step."""
    found: dict[str, Step] = {}
    by_reason: dict[str, float] = {}
    for kernel in kernels:
        for reason, seconds in kernel.reasons.items():
            step = found.setdefault(next_step(reason), Step(next_step(reason), [], 0.0, []))
            step.seconds += seconds
            by_reason[reason] = by_reason.get(reason, 0.0) + seconds
            if reason not in step.reasons:
                step.reasons.append(reason)
            if not step.kernels or step.kernels[-1] is not kernel:
                step.kernels.append(kernel)
    for step in found.values():
        step.reasons.sort(key=lambda reason: -by_reason[reason])
    return sorted(found.values(), key=lambda step: -step.seconds)


def next_step(reason: str) -> str:
    for pattern, step in _STEPS:
        if re.search(rf"(?:^|; )(?:{pattern})", reason):
            return step
    return ADD


def in_core(kernels: Sequence[Tally]) -> list[Tally]:
    """Those that the core set has, which is what flashinfer-aot ships."""
    core: set[tuple[str, str]] = set()
    for target in {kernel.spec["target"] for kernel in kernels}:
        try:
            core.update((spec.name, target) for spec in read_specs(["core"], [target]))
        except (ConfigError, UnsupportedConfig):  # a target of a later version
            continue
    return [kernel for kernel in kernels if (kernel.name, kernel.spec["target"]) in core]
