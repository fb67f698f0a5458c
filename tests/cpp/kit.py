# SPDX-License-Identifier: Apache-2.0
"""What the tests of the C++ headers share: sets of kernels as a build writes them, programs compiled by g++, and the C
interface through ctypes, on tensors of torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flashinfer import families
from flashinfer.jit import KernelSpec, default_resolver, description
from flashinfer.jit.source import render
from flashinfer.jit.stores import Entry, Registry
from tests.kit import ROOT

INCLUDES = ("-I", str(ROOT / "include"), "-I", str(ROOT / "csrc"))
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Werror", *INCLUDES)
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.int32: 5,
    torch.int64: 6,
}


def compile_program(source: Path, out: Path, *flags: str, compiler: str = "g++", links: Sequence[str] = ()) -> Path:
    """By g++ alone, as the docs tell a user to."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    standard = FLAGS if compiler == "g++" else ("-std=c99", "-Wall", "-Wextra", "-Werror", *INCLUDES)
    done = subprocess.run(
        [compiler, *standard, *flags, str(source), *links, "-ldl", "-o", str(out)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def run_program(program: Path, *arguments: object, **variables: str) -> str:
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pretended_gpu(driver: Path, launches: Path, capability: int = 90, num_sms: int = 132) -> dict[str, str]:
    """Variables of a process whose GPU is that of pretended_driver.cpp."""
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH")])),
        "PRETENDED_LAUNCHES": str(launches),
        "PRETENDED_CAPABILITY": str(capability),
        "PRETENDED_SMS": str(num_sms),
    }


def entry_of(root: Path, spec: KernelSpec, machine_code: bytes) -> Entry:
    """Lays the machine code of a kernel into the folder of a set; what the registry says of it."""
    source, sha256 = render(spec), hashlib.sha256(machine_code).hexdigest()
    path = root / "kernels" / spec.target / f"{spec.family}-{sha256[:20]}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(machine_code)
    return Entry(
        spec.name, spec.family, dict(spec.args), spec.target, source.digest, str(path.relative_to(root)), sha256,
        len(machine_code), "any", launch=description.launch(source),
    )  # fmt: skip


def write_set(root: Path, specs: Iterable[KernelSpec]) -> Path:
    """A set of these kernels, compiled where the cache has them not."""
    families.register_all()
    root.mkdir(parents=True, exist_ok=True)
    entries = [entry_of(root, spec, default_resolver().ensure(spec).machine_code) for spec in specs]
    Registry.write(root, entries)
    return root


# --------------------------------------------------------------------------------------------------------- C interface


class CTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
    ]


class PageTable(ctypes.Structure):
    _fields_ = [("indptr", CTensor), ("indices", CTensor), ("last_page_len", CTensor)]


class Workspace(ctypes.Structure):
    _fields_ = [
        ("ints", ctypes.c_void_p),
        ("int_bytes", ctypes.c_size_t),
        ("floats", ctypes.c_void_p),
        ("float_bytes", ctypes.c_size_t),
    ]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "page_size", "q", "kv", "o")
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("is_causal", ctypes.c_int32),
        ("sm_scale", ctypes.c_double),
        ("window_left", ctypes.c_int64),
        ("logits_soft_cap", ctypes.c_double),
        ("sinks", ctypes.c_void_p),
        *[(name, ctypes.c_double) for name in ("q_scale", "k_scale", "v_scale")],
    ]


class MlaShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32) for name in ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "q", "kv")
    ]


class RopeOptions(ctypes.Structure):
    _fields_ = [
        ("rotary_dim", ctypes.c_int32),
        ("interleave", ctypes.c_int32),
        *[(name, ctypes.c_double) for name in ("scale", "theta", "low_freq_factor", "high_freq_factor")],
        ("old_context_len", ctypes.c_int64),
    ]


class SampleOptions(ctypes.Structure):
    _fields_ = [
        ("are_logits", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k_first", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("row_indices", ctypes.POINTER(CTensor)),
    ]


def tensor(x: torch.Tensor) -> CTensor:
    return CTensor(
        x.data_ptr(), DTYPES[x.dtype], x.dim(), (ctypes.c_int64 * 5)(*x.shape), (ctypes.c_int64 * 5)(*x.stride())
    )


def page_table(*parts: torch.Tensor) -> PageTable:
    return PageTable(*map(tensor, parts))


def options(**given: Any) -> Options:
    return Options(**{"window_left": -1, "q_scale": 1.0, "k_scale": 1.0, "v_scale": 1.0, **given})


class CError(Exception):
    """What a function returned, and the text of it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _passed(value: Any) -> Any:
    """Structs by address, floats as double, other than those that are ctypes already."""
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


class Api:
    """The library of cpp/c_api.cpp. Tensors and structs go by address; a null stands for None."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path.resolve()))
        self.library.flashinfer_last_error.restype = ctypes.c_char_p
        self.library.flashinfer_kernels_target.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        held = [tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        passed = [_passed(value) for value in held]
        status = getattr(self.library, f"flashinfer_{name}")(*passed)
        if status != 0:
            raise CError(status, self.library.flashinfer_last_error().decode())

    def open(self, roots: Sequence[Path] | None, device: int = -1, recipes: Path | None = None) -> Kernels:
        handle = ctypes.c_void_p()
        text = None if roots is None else ":".join(map(str, roots)).encode()
        if recipes is None:
            self.call("kernels_open", text, device, ctypes.byref(handle))
        else:
            self.call("kernels_open_jit", text, device, str(recipes).encode(), ctypes.byref(handle))
        return Kernels(self, handle)


class Kernels:
    """Opened ones, and what runs on them: `kernels.rmsnorm(…)` is `flashinfer_rmsnorm(kernels, …, stream null)`."""

    def __init__(self, api: Api, handle: ctypes.c_void_p) -> None:
        self.api, self.handle = api, handle

    @property
    def target(self) -> str:
        name: bytes = self.api.library.flashinfer_kernels_target(self.handle)
        return name.decode()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.api.call(name, self.handle, *arguments, None)

    def make(self, name: str, workspace: Workspace) -> Kernels:
        """One of batch_decode, batch_prefill and mla: `made.plan(…)`, `made.run(…)`."""
        handle = ctypes.c_void_p()
        self.api.call(f"{name}_new", self.handle, workspace, ctypes.byref(handle))
        return _Planned(self.api, handle, name)


class _Planned(Kernels):
    def __init__(self, api: Api, handle: ctypes.c_void_p, name: str) -> None:
        super().__init__(api, handle)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.api.call(f"{self.name}_{name}", self.handle, *arguments, None)
