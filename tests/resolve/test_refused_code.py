# SPDX-License-Identifier: Apache-2.0
"""Machine code that is whole by its checksum and does not load: the next source answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashinfer import target
from flashinfer.errors import FlashInferError, KernelMissing
from flashinfer.jit import KernelSpec, driver, loader
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import Source, render
from flashinfer.jit.stores import AotStore, Entry, Registry
from flashinfer.jit.toolchain import Compiled, Nvrtc
from tests.kit import (
    CountingCxx,
    cpu_resolver,
    miss_records,
    only_artifact,
    rmsnorm_spec,
    rmsnorm_values,
    run_rmsnorm,
    set_field,
)


def _forge(folder: Path, machine_code: bytes) -> None:
    """Machine code of another system, with a checksum that fits."""
    (artifact,) = folder.glob("kernel.*")
    artifact.unlink()  # this process may have the file mapped
    artifact.write_bytes(machine_code)
    set_field(folder / "spec.json", "sha256", hashlib.sha256(machine_code).hexdigest())


def test_a_cached_library_that_does_not_load(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    """It is compiled again and replaced: a cache shared with another system, which has another loader."""
    compiler, spec = CountingCxx(), rmsnorm_spec()
    cpu_resolver(tmp_path, compiler).ensure(spec)
    folder = only_artifact(tmp_path)
    _forge(folder, b"machine code of another system")
    resolver = cpu_resolver(tmp_path, compiler)
    run_rmsnorm(resolver.load(spec))
    assert compiler.num_compiles == 2 and resolver.answered_by[spec] == "jit-compile"
    (warning,) = warnings()
    assert f"{folder / 'kernel.so'} does not load and is ignored: " in warning
    (miss,) = miss_records(tmp_path / "misses")
    assert miss.resolved_by == "jit-compile"
    run_rmsnorm(cpu_resolver(tmp_path, compiler).load(spec))
    assert compiler.num_compiles == 2, "it has been replaced"


def test_nothing_else_than_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = rmsnorm_spec()
    cpu_resolver(tmp_path).ensure(spec)
    _forge(only_artifact(tmp_path), b"machine code of another system")
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    with pytest.raises(KernelMissing, match=r"JIT cache: not loadable: (.|\n)*flashinfer warmup --config"):
        cpu_resolver(tmp_path).load(spec)


def test_a_compiler_whose_output_does_not_load(tmp_path: Path) -> None:
    class Foreign(CountingCxx):
        def compile(self, source: Source) -> Compiled:
            return Compiled(b"machine code of another system", "")

    for _ in range(2):  # the second time it comes from the cache
        with pytest.raises(FlashInferError, match=r"compiled just now, does not load.*flashinfer doctor"):
            cpu_resolver(tmp_path, Foreign()).load(rmsnorm_spec())


def test_a_cubin_that_ends_early_is_no_whole_elf_file() -> None:
    """The driver may loop for ever on one, so it is not asked."""
    code = _rmsnorm_cubin("sm_90a")
    assert driver.is_whole_elf(code)
    assert not any(driver.is_whole_elf(code[:length]) for length in (*range(0, len(code) - 8, 97), len(code) - 8))


REFUSED_CUBINS: dict[str, Callable[[bytes], bytes]] = {
    "not a cubin": lambda code: b"machine code of another system",
    "empty": lambda code: b"",
    "truncated": lambda code: code[: len(code) // 2],
    "of another architecture": lambda code: _rmsnorm_cubin("sm_120a"),
    "without the kernel": lambda code: code.replace(b"rmsnorm\0", b"rmsmorn\0"),
}


def _rmsnorm_cubin(on: str) -> bytes:
    return Nvrtc().compile(render(rmsnorm_spec(on=on))).machine_code


def _run_on_gpu(kernel: loader.Kernel) -> None:
    x, weight = torch.randn(2, 64, device="cuda"), torch.randn(64, device="cuda")
    out = torch.full_like(x, torch.nan)
    launcher = kernel.on(0)
    launcher((2, 1, 1), torch.cuda.current_stream().cuda_stream, rmsnorm_values(x, weight, out))
    torch.testing.assert_close(out, x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["aot", "jit-cache"])
@pytest.mark.parametrize("name", REFUSED_CUBINS)
def test_a_cubin_that_the_driver_refuses(
    name: str, store: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    """The next source takes its place; the reason is logged and recorded; torch's context survives."""
    spec = rmsnorm_spec(on=target.of_device(torch.device("cuda:0")))
    cubin = REFUSED_CUBINS[name](_rmsnorm_cubin(spec.target))
    resolver = Resolver(AotStore([_registry(tmp_path, spec, cubin)] if store == "aot" else []), tmp_path / "cache")
    if store == "jit-cache":
        hit = resolver.ensure(spec)
        assert hit.path is not None
        _forge(hit.path.parent, cubin)
    kernel = resolver.load(spec)
    assert resolver.answered_by[spec] == store
    _run_on_gpu(kernel)
    _run_on_gpu(resolver.load(spec))
    assert resolver.answered_by[spec] == "jit-compile"
    (warning,) = warnings()
    assert "does not load and is ignored: cuda:0: " in warning
    *_, miss = miss_records(tmp_path / "cache" / "misses")
    assert miss.resolved_by == "jit-compile"
    assert miss.reason.startswith("not loadable: cuda:0: " if store == "aot" else "flashinfer_aot is not installed")


def _registry(root: Path, spec: KernelSpec, machine_code: bytes) -> Path:
    """An AOT set of one kernel."""
    (root / "kernel.cubin").write_bytes(machine_code)
    checksum, digest = hashlib.sha256(machine_code).hexdigest(), render(spec).digest
    file, size = "kernel.cubin", len(machine_code)
    entry = Entry(spec.name, spec.family, dict(spec.args), spec.target, digest, file, checksum, size, "any")
    Registry.write(root, [entry])
    return root
