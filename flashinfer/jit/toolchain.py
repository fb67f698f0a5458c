# SPDX-License-Identifier: Apache-2.0
"""Compilers, behind one interface: a Source goes in, machine code and the compiler's log come out.

`Nvrtc` is the default for CUDA: a shared library that every CUDA build of torch brings, so no toolkit, nvcc, ninja or
g++ is needed to compile a kernel at run time. `Nvcc` produces the same cubins and serves debugging and comparison.
`HostCxx` is g++ or clang++ for the CPU target.

NVRTC, its headers and nvcc are located by NVIDIA's cuda-pathfinder: pip's packages first, then conda, then a toolkit;
then pip's packages outside of site-packages.
NVRTC's C interface is called through ctypes because it is nine functions that have been stable since CUDA 11, and the
alternative, cuda-bindings, is tied to one CUDA major version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashinfer import env, packages
from flashinfer.errors import CompileError, ToolchainMissing
from flashinfer.jit.source import Source, include_root

CUDA_HELP = (
    "install a CUDA build of torch, or NVIDIA's compiler packages: pip install 'flashinfer[cu13]' (driver >= 580) "
    "or 'flashinfer[cu12]'"
)
_PATHFINDER_MISSING = (
    "cuda-pathfinder, which finds NVRTC, its headers and nvcc, is not installed; "
    f"{packages.pip_install([packages.RUNTIME['cuda.pathfinder']])}, and {CUDA_HELP}"
)
HOST_HELP = f"install g++ or clang++ with OpenMP (apt-get install g++), or name a compiler in {env.CXX.name}"


@dataclass(frozen=True)
class Compiled:
    machine_code: bytes
    log: str


class Toolchain(Protocol):
    suffix: str  # of the artifact: ".cubin" or ".so"

    @property
    def identity(self) -> str:
        """Name and exact version; part of the JIT cache key. Raises ToolchainMissing."""

    def compile(self, source: Source) -> Compiled:
        """Raises CompileError with the compiler's log, or ToolchainMissing."""


def toolchain(kind: str) -> Toolchain:
    """The toolchain of a kind of target ("cuda" or "cpu") as the environment chooses it."""
    if kind == "cpu":
        return HostCxx(env.CXX.get())
    return Nvcc() if env.CUDA_TOOLCHAIN.get() == "nvcc" else Nvrtc()


def _compile_error(source: Source, log: str) -> CompileError:
    errors = [line.strip() for line in log.splitlines() if re.search(r"\berror\b", line)]
    first = errors[0] if errors else "the compiler gave no message"
    return CompileError(f"{source.spec.name} ({source.spec.target}) did not compile\n{log.strip()}\n{first}")


# ---------------------------------------------------------------------------------------------------------------- NVRTC


class Nvrtc:
    suffix = ".cubin"
    OPTIONS = ("-default-device", "--ptxas-options=-v")

    @property
    def identity(self) -> str:
        library = nvrtc_library()
        return f"nvrtc-{library.version}-{library.build}"

    def compile(self, source: Source) -> Compiled:
        library = nvrtc_library()
        options = [f"-arch={source.spec.target}", *source.flags, *self.OPTIONS]
        options += [f"-I{include_root()}", f"-I{cuda_include()}"]
        machine_code, log = library.compile(source.text, f"{source.entry}.cu", options)
        if machine_code is None:
            raise _compile_error(source, log)
        return Compiled(machine_code, log)


class _NvrtcLibrary:
    def __init__(self, path: str, found_via: str) -> None:
        self._lib = ctypes.CDLL(path)
        self.found_via = found_via  # "site-packages", "conda", "CUDA_PATH", …
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.path = path
        self.version = f"{major.value}.{minor.value}"
        # NVRTC states no patch level; the size of the file tells two builds of one release apart.
        self.build = os.path.getsize(path)

    def _check(self, name: str, *args: object) -> None:
        code = getattr(self._lib, name)(*args)
        if code != 0:
            raise ToolchainMissing(f"{name}: {self._lib.nvrtcGetErrorString(code).decode()} (NVRTC at {self.path})")

    def compile(self, text: str, name: str, options: Sequence[str]) -> tuple[bytes | None, str]:
        """The cubin, or None when compiling failed, and the log."""
        program = ctypes.c_void_p()
        self._check("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._lib.nvrtcCompileProgram(program, len(options), encoded)
            log = self._read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                return None, log or self._lib.nvrtcGetErrorString(failed).decode()
            return self._read("CUBIN", program), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


@functools.cache
def nvrtc_library() -> _NvrtcLibrary:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib("nvrtc")
    except ImportError as error:
        raise ToolchainMissing(_PATHFINDER_MISSING) from error
    except (RuntimeError, OSError) as error:  # pathfinder's own errors are RuntimeErrors
        library = _installed("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+")
        if library is None:
            raise ToolchainMissing(f"NVRTC, the compiler of CUDA kernels, was not found; {CUDA_HELP}") from error
        return _NvrtcLibrary(str(library), "distribution")
    return _NvrtcLibrary(found.abs_path, found.found_via)


@functools.cache
def cuda_include() -> Path:
    """The folder of cuda_fp16.h and its siblings. Raises ToolchainMissing."""
    try:
        from cuda.pathfinder import locate_nvidia_header_directory

        found = locate_nvidia_header_directory("cudart")
    except ImportError as error:
        raise ToolchainMissing(_PATHFINDER_MISSING) from error
    except (RuntimeError, OSError):
        found = None
    if found is not None and (Path(found.abs_path) / "cuda_fp16.h").is_file():
        return Path(found.abs_path)
    header = _installed("nvidia-cuda-runtime", r"cuda_fp16\.h")
    if header is None:
        raise ToolchainMissing(f"the CUDA headers (cuda_fp16.h) were not found; {CUDA_HELP}")
    return header.parent


def _installed(distribution: str, file_name: str) -> Path | None:
    """A file of one of pip's packages, in the build for either CUDA major, wherever sys.path has it.

    cuda-pathfinder looks in the interpreter's own site-packages alone. Where pip builds in isolation, or has installed
    with --target, they are elsewhere.
    """
    for name in (distribution, f"{distribution}-cu12"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if re.fullmatch(file_name, file.name) and path.is_file():
                return path
    return None


# ---------------------------------------------------------------------------------------------------- nvcc and host C++


class Nvcc:
    suffix = ".cubin"

    @property
    def identity(self) -> str:
        return _version_of(self.executable(), r"V(\d+\.\d+\.\d+)", "nvcc")

    def compile(self, source: Source) -> Compiled:
        arch = source.spec.target.removeprefix("sm_")
        flags = ["-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-lineinfo", "-Xptxas=-v", *source.flags]
        return _run(source, [self.executable(), *flags, f"-I{include_root()}"], ".cu", self.suffix)

    @staticmethod
    def executable() -> str:
        try:
            from cuda.pathfinder import find_nvidia_binary_utility
        except ImportError as error:
            raise ToolchainMissing(_PATHFINDER_MISSING) from error
        found = find_nvidia_binary_utility("nvcc") or shutil.which("nvcc")
        if found is None:
            raise ToolchainMissing(f"nvcc was not found; unset {env.CUDA_TOOLCHAIN.name} to compile with NVRTC")
        return found


class HostCxx:
    """g++ or clang++. The library it makes links libc and libm alone: OpenMP comes from the runtime torch has
    loaded."""

    suffix = ".so"

    def __init__(self, executable: str = "") -> None:
        self._chosen = executable

    @property
    def identity(self) -> str:
        executable = self.executable()
        return _version_of(executable, r"(\d+\.\d+\.\d+)", Path(executable).name) + _libc()

    def compile(self, source: Source) -> Compiled:
        flags = [*source.flags, "-shared", "-fPIC", "-nostdlib", f"-march={source.spec.target}", "-fvisibility=hidden"]
        if source.spec.target.startswith("x86-64-v"):
            # Noted in the library: on a lesser CPU the dynamic loader refuses it, where running it would be fatal.
            flags.append(f"-Wl,-z,{source.spec.target}")
        command = [self.executable(), *flags, f"-I{include_root()}"]
        return _run(source, command, ".cpp", self.suffix, ["-lm", "-lc", "-lgcc"])

    def executable(self) -> str:
        names = (self._chosen,) if self._chosen else ("g++", "clang++", "c++")
        for name in names:
            found = shutil.which(name)
            if found:
                return os.path.abspath(found)  # compilers run in a folder of their own
        raise ToolchainMissing(f"no C++ compiler was found (looked for {', '.join(names)}); {HOST_HELP}")


@functools.cache
def _libc() -> str:
    """The C library a kernel is linked with: containers that share a cache need not share it."""
    try:
        return "-" + (os.confstr("CS_GNU_LIBC_VERSION") or "libc").replace(" ", "-")
    except (AttributeError, OSError, ValueError):  # not Linux, or another C library
        return ""


@functools.cache
def _version_of(executable: str, pattern: str, name: str) -> str:
    try:
        text = subprocess.run(
            [executable, "--version"], capture_output=True, text=True, errors="replace", check=False
        ).stdout
    except OSError as error:
        raise ToolchainMissing(f"{executable} cannot be run: {error.strerror}") from error
    match = re.search(pattern, text)
    return f"{name}-{match[1] if match else 'unknown'}"


def _run(source: Source, command: list[str], extension: str, suffix: str, libraries: Sequence[str] = ()) -> Compiled:
    try:
        with tempfile.TemporaryDirectory(prefix="flashinfer-") as folder:
            text, output = Path(folder, source.entry + extension), Path(folder, source.entry + suffix)
            text.write_text(source.text, encoding="utf-8")
            command = [*command, str(text), "-o", str(output), *libraries]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=folder)
            log = done.stdout + done.stderr
            if done.returncode != 0:
                raise _compile_error(source, log or f"{command[0]}: error: exit status {done.returncode}, no message")
            return Compiled(output.read_bytes(), log)
    except OSError as error:
        raise CompileError(
            f"{source.spec.name} ({source.spec.target}) was not compiled; a compile needs room in the folder for "
            f"temporary files (TMPDIR) and {command[0]}\n{error}"
        ) from error
