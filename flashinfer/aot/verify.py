# SPDX-License-Identifier: Apache-2.0
"""Checking a set: every file against the registry, the registry against the running package, and the machine code
against the target it claims.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashinfer import families
from flashinfer import target as targets
from flashinfer.aot import elf, kernel_set
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry, Registry


@dataclass(frozen=True)
class Problem:
    """One finding. A stale kernel is whole, but other than this package would compile; it is never used."""

    what: str  # the file, or the kernel
    why: str
    stale: bool = False


def verify(registry: Registry) -> list[Problem]:
    """All that is wrong with a set; an empty list when it is sound and every kernel of it can be used."""
    families.register_all()
    problems = []
    for entry in registry.entries:
        problems += [Problem(entry.file, why) for why in damage(registry.root, entry)]
        problems += [Problem(f"{entry.name} ({entry.target})", why, stale=True) for why in drift(entry)]
    known = {entry.file for entry in registry.entries}
    known |= {built.entry.file for built, _ in kernel_set.results(registry.root) if built is not None}  # not ended yet
    for path in sorted((registry.root / "kernels").rglob("*")):
        name = path.relative_to(registry.root).as_posix()
        if path.is_file() and name not in known:
            problems.append(Problem(name, "is not in the registry"))
    return problems


def findings(root: Path, entry: Entry) -> Iterator[str]:
    """Why the running package would not use a kernel of a set, damage first; nothing when it would."""
    yield from damage(root, entry)
    yield from drift(entry)


def damage(root: Path, entry: Entry) -> Iterator[str]:
    """What is wrong with the file of a kernel."""
    path = root / entry.file
    if not path.resolve().is_relative_to(root.resolve()):
        yield "lies outside the folder of the registry"
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        yield f"is unreadable: {error.strerror}"
        return
    if len(content) != entry.bytes:
        yield f"has {len(content)} bytes; the registry says {entry.bytes}"
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        yield "sha256 differs from the registry's"
    try:
        code = elf.inspect(content)
    except ValueError as error:
        yield str(error)
        return
    yield from _wrong_target(code, entry.target)
    if entry.family not in code.functions:
        yield f"defines no function {entry.family}; it has {', '.join(sorted(code.functions)) or 'none'}"


def _wrong_target(code: elf.MachineCode, target: str) -> Iterator[str]:
    try:
        is_cuda = targets.kind(target) == "cuda"
    except UnsupportedConfig as error:
        yield str(error)
        return
    machine = "cuda" if is_cuda else "x86-64" if target.startswith("x86") else "arm64"
    if code.machine != machine:
        yield f"is machine code for {code.machine}; the registry says {target}"
    elif is_cuda and code.capability != targets.capability(target):
        major, minor = code.capability or (0, 0)
        yield f"is machine code for sm_{major}{minor}; the registry says {target}"
    elif code.target is not None and not _allowed(code.target, target, is_cuda):
        yield f"was compiled for {code.target}; the registry says {target}"


def _allowed(noted: str, target: str, is_cuda: bool) -> bool:
    return noted == target if is_cuda else noted in targets.candidates(target)


def drift(entry: Entry) -> Iterator[str]:
    """How the kernel differs from what this package would compile for the same request."""
    try:
        spec = KernelSpec.from_dict({"family": entry.family, "args": entry.args, "target": entry.target})
        source = render(spec)
    except UnsupportedConfig as error:
        yield f"this version has no such kernel: {error}"
        return
    if spec.name != entry.name:
        yield f"its arguments say {spec.name}"
    if source.digest != entry.digest:
        yield "digest differs: it was built from other sources"
