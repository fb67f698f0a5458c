# SPDX-License-Identifier: Apache-2.0
"""Where machine code is found again: the AOT registries and the on-disk JIT cache.

A store answers `find(spec)` with a `Hit`, or with a `Rejected` that says why not in words fit for a log line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from flashinfer import env, log
from flashinfer import target as targets
from flashinfer.errors import DriverError
from flashinfer.jit import description, driver, trust
from flashinfer.jit.source import Source, render
from flashinfer.jit.spec import KernelSpec
from flashinfer.version import __version__

REGISTRY_FORMAT = 1
PRECOMPILED = Path(__file__).resolve().parent.parent / "precompiled"  # of an install with FLASHINFER_ENABLE_AOT=1
PARTIAL = ".partial-"  # begins the name of a folder of the JIT cache that is not complete


@dataclass(frozen=True)
class Hit:
    source: Source  # of the machine code: its target may be older than the requested one
    machine_code: bytes
    path: Path | None
    store: str  # "aot", "jit-cache" or "jit-compile"


@dataclass(frozen=True)
class Rejected:
    reason: str


Answer = Union[Hit, Rejected]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of another in one step; where that fails, nothing is left of it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------------ AOT


@dataclass(frozen=True)
class Entry:
    """One precompiled kernel of a registry."""

    name: str
    family: str
    args: dict[str, Any]
    target: str
    digest: str
    file: str  # relative to the registry
    sha256: str
    bytes: int
    compiler: str
    cuda: str | None = None  # CUDA version of the compiler; the driver must be of the same major version or newer
    launch: dict[str, Any] | None = None  # for hosts that are not Python (description.py); of older builds None


_ENTRY_TYPES = {
    **dict.fromkeys(("name", "family", "target", "digest", "file", "sha256", "compiler"), str),
    "args": dict,
    "bytes": int,
}


def _entry(raw: Any) -> Entry:
    """Checked here, so that a damaged registry is found when it is opened and not in the middle of a request."""
    try:
        entry = Entry(**raw)
    except TypeError as error:
        raise ValueError(f"entry {raw!r:.60}: {error}") from None
    for field, expected in _ENTRY_TYPES.items():
        if not isinstance(getattr(entry, field), expected):
            raise ValueError(f"entry {entry.name!r:.60}: {field} is {getattr(entry, field)!r:.40}")
    if entry.cuda is not None and not re.fullmatch(r"\d+\.\d+", str(entry.cuda)):
        raise ValueError(f"entry {entry.name!r:.60}: cuda is {entry.cuda!r:.40}")
    if not isinstance(entry.launch, (dict, type(None))):
        raise ValueError(f"entry {entry.name!r:.60}: launch is {entry.launch!r:.40}")
    return entry


class Registry:
    """A registry.json and the machine code beside it."""

    def __init__(self, root: Path, trusted: Path | None = None) -> None:
        """Raises OSError or ValueError when there is no readable registry; trust.Untrusted, a ValueError, when it is
        not signed with a trusted key."""
        self.root = root
        try:
            self.content = (root / "registry.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError("it holds no registry.json; expected the folder of a set that was built") from None
        self.signer = None if trusted is None else trust.check(root, self.content, trusted)
        data = json.loads(self.content.decode("utf-8"))
        number = data.get("format") if isinstance(data, dict) else None
        if number != REGISTRY_FORMAT:
            raise ValueError(f"registry format {number!r:.40}; expected {REGISTRY_FORMAT}")
        if not isinstance(data.get("version"), str) or not isinstance(data.get("kernels"), list):
            raise ValueError("version or kernels is missing")
        self.version: str = data["version"]
        self.entries = [_entry(raw) for raw in data["kernels"]]
        self._index = {(entry.name, entry.target): entry for entry in self.entries}
        self._targets: dict[str, list[str]] = {}
        for entry in self.entries:
            self._targets.setdefault(entry.name, []).append(entry.target)

    @staticmethod
    def write(root: Path, entries: list[Entry], version: str = __version__) -> None:
        """Replace the registry of a folder, atomically. `version` is that of the sources of its kernels."""
        data = {
            "format": REGISTRY_FORMAT,
            "version": version,
            "layouts": description.layouts(entry.family for entry in entries),
            "kernels": [vars(entry) for entry in sorted(entries, key=lambda entry: (entry.name, entry.target))],
        }
        with replacing(root / "registry.json") as partial:
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            with contextlib.suppress(OSError):
                (root / trust.SIGNATURE).unlink(missing_ok=True)  # of what the registry was

    def find(self, spec: KernelSpec) -> Answer:
        available = self._targets.get(spec.name)
        if available is None:
            return Rejected("not in registry")
        reasons = []
        for target in targets.candidates(spec.target):
            entry = self._index.get((spec.name, target))
            if entry is not None:
                answer = self._check(entry, spec.with_target(target))
                if isinstance(answer, Hit):
                    return answer
                reasons.append(answer.reason)
        return Rejected(
            "; ".join(reasons) or f"no machine code for {spec.target}, only for {', '.join(sorted(available))}"
        )

    def _check(self, entry: Entry, spec: KernelSpec) -> Answer:
        source = render(spec)
        if source.digest != entry.digest:
            return self._stale()
        if entry.cuda is not None and source.kind == "cuda" and (too_old := _driver_too_old(entry.cuda)):
            return Rejected(too_old)
        path = self.root / entry.file
        try:
            machine_code = path.read_bytes()
        except OSError as error:
            return Rejected(f"{entry.file} is unreadable: {error.strerror}")
        if hashlib.sha256(machine_code).hexdigest() != entry.sha256:
            return Rejected(f"sha256 mismatch of {entry.file}")
        # A signature speaks of the bytes that were read: a CPU library is loaded from a copy of them, not its file.
        return Hit(source, machine_code, path if self.signer is None else None, "aot")

    def _stale(self) -> Rejected:
        if self.version == __version__:
            return Rejected("digest differs (built from other sources)")
        log.warn_once(
            f"the precompiled kernels in {self.root} are of version {self.version}, flashinfer is {__version__}; those "
            f"whose sources changed are compiled at run time instead. Fix: pip install 'flashinfer-aot=={__version__}'"
        )
        return Rejected(f"version {self.version} ≠ {__version__}")


def _driver_too_old(needed: str) -> str | None:
    try:
        found = driver.version()
    except (OSError, DriverError):
        return None  # no GPU here: the kernel is for another machine (a dry run), which has its own driver
    if found[0] >= int(needed.split(".")[0]):
        return None
    return f"needs driver ≥ {needed}, found {found[0]}.{found[1]}"


class AotStore:
    """Registries in the order they are asked: FLASHINFER_AOT_PATH, what the package itself brought, flashinfer_aot."""

    def __init__(self, roots: list[Path] | None = None) -> None:
        self._roots = roots
        self._unusable: list[str] = []

    @cached_property
    def registries(self) -> list[Registry]:
        if env.DISABLE_AOT.get():
            return []
        found, unusable, trusted = [], [], env.AOT_TRUST.get()
        for root in self.roots():
            try:
                found.append(Registry(root, trusted))
            except (OSError, ValueError) as error:
                what = "trusted" if isinstance(error, trust.Untrusted) else "usable"
                log.warn_once(f"the kernel registry in {root} is not {what} and is ignored: {error}")
                unusable.append(f"the kernel registry in {root} is not {what}: {error}")
        self._unusable = unusable
        return found

    def roots(self) -> list[Path]:
        if self._roots is not None:
            return self._roots
        companion = importlib.util.find_spec("flashinfer_aot")
        installed = [PRECOMPILED]
        if companion is not None and companion.origin is not None:
            installed.append(Path(companion.origin).parent)
        return [*env.AOT_PATH.get(), *(root for root in installed if (root / "registry.json").exists())]

    def find(self, spec: KernelSpec) -> Answer:
        if env.DISABLE_AOT.get():
            return Rejected(f"AOT is disabled ({env.DISABLE_AOT.name})")
        reasons: dict[str, None] = {}
        for registry in self.registries:
            answer = registry.find(spec)
            if isinstance(answer, Hit):
                return answer
            reasons[answer.reason] = None
        return Rejected("; ".join([*reasons, *self._unusable]) or "flashinfer_aot is not installed")


# ------------------------------------------------------------------------------------------------------------ JIT cache


class JitCache:
    """`<root>/<digest prefix>-<compiler>/{kernel.cubin|kernel.so, spec.json, source.cu|source.cpp, log.txt}`.

    A folder is complete or absent: it is filled under a private name and published by one rename. spec.json holds the
    sha256 of the machine code, so that damage is found before it is loaded.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.also_read: tuple[Path, ...] = ()  # caches that cannot be written, such as one baked into an image
        self._refused: dict[Path, str] = {}  # folder -> why its machine code, whole as it is, does not load here

    def folder(self, source: Source, compiler: str) -> Path:
        return self.root / f"{source.digest[:32]}-{compiler}"

    def find(self, source: Source, compiler: str | None) -> Answer:
        """Look a source up. Without a compiler at hand (None), any compiler's machine code for it will do."""
        answer: Answer = Rejected("not in JIT cache")
        name = f"{source.digest[:32]}-"
        for root in (self.root, *self.also_read):
            for folder in sorted(root.glob(f"{name}*")) if compiler is None else [root / f"{name}{compiler}"]:
                answer = self._read(source, folder)
                if isinstance(answer, Hit):
                    return answer
        return answer

    def refuse(self, folder: Path, reason: str) -> None:
        """Have a folder's machine code rejected from now on, until it is replaced."""
        self._refused[folder] = reason

    def _read(self, source: Source, folder: Path) -> Answer:
        if folder in self._refused:
            return Rejected(self._refused[folder])
        try:
            meta = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
            digest, sha256, path = meta["digest"], meta["sha256"], folder / meta["file"]
            machine_code = path.read_bytes()
        except FileNotFoundError:
            return Rejected("not in JIT cache")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Rejected(f"{folder} is unreadable: {error}")
        if digest != source.digest:
            return Rejected(f"digest differs in {folder}")
        if hashlib.sha256(machine_code).hexdigest() != sha256:
            return Rejected(f"sha256 mismatch in {folder}")
        with contextlib.suppress(OSError):
            os.utime(folder)  # what `gc` calls recently used
        return Hit(source, machine_code, path, "jit-cache")

    def publish(self, source: Source, compiler: str, suffix: str, machine_code: bytes, compiler_log: str) -> Path:
        """Write a compiled kernel; returns the file of its machine code. Raises OSError when the cache cannot be
        written.

        When two processes publish the same kernel, the first rename wins and both find a complete folder.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.folder(source, compiler)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            file = f"kernel{suffix}"
            meta = {
                **source.spec.to_dict(),
                "digest": source.digest,
                "file": file,
                "sha256": hashlib.sha256(machine_code).hexdigest(),
                "compiler": compiler,
                "flags": list(source.flags),
            }
            _write_durably(partial / file, machine_code)
            (partial / f"source{'.cu' if source.kind == 'cuda' else '.cpp'}").write_text(source.text, encoding="utf-8")
            (partial / "log.txt").write_text(compiler_log, encoding="utf-8")
            _write_durably(partial / "spec.json", json.dumps(meta, indent=1).encode())
            partial.chmod(0o755)
            try:
                partial.rename(folder)
            except OSError:
                if isinstance(self._read(source, folder), Rejected):  # damaged or refused: take its place
                    self.remove(folder)
                    partial.rename(folder)
                    self._refused.pop(folder, None)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder / file

    def folders(self) -> Iterator[Path]:
        """Complete kernels, least recently used first."""
        complete = [path.parent for path in self.root.glob("*/spec.json") if not path.parent.name.startswith(".")]
        yield from sorted(complete, key=_last_used)

    def remove(self, folder: Path) -> None:
        """Take a kernel out, under a private name first: a process looking it up finds all of it or nothing."""
        doomed = self.root / f"{PARTIAL}{folder.name}-{os.getpid()}-{threading.get_ident()}"
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(doomed)
            if doomed.is_dir():
                shutil.rmtree(doomed, ignore_errors=True)
            else:
                doomed.unlink()

    def leftovers(self, older_than: float) -> Iterator[Path]:
        """What killed processes left behind: unfinished folders untouched for so many seconds, and lock files."""
        for path in self.root.glob(f"{PARTIAL}*"):
            if time.time() - _last_used(path) > older_than:
                yield path
        yield from self.root.glob(".*.lock")


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed by another process meanwhile
        return 0.0


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
