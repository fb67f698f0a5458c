# SPDX-License-Identifier: Apache-2.0
"""The order of the stores, what is compiled when, and what is said about it."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import re
import shutil
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flashinfer import env, target
from flashinfer.errors import CompileError, InvalidSetting, KernelMissing, UnsupportedConfig
from flashinfer.families.norm import RMSNORM, NormParams
from flashinfer.jit import resolver as resolver_module
from flashinfer.jit import source, toolchain
from flashinfer.jit import spec as specs
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import Source, render
from flashinfer.jit.stores import AotStore, Hit, Rejected
from flashinfer.jit.toolchain import Compiled, HostCxx, Nvrtc
from tests.kit import CountingCxx, cpu_resolver, only_artifact, rmsnorm_spec, run_rmsnorm, wait_until


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines this library has logged in the test so far."""
    caplog.set_level(logging.INFO, logger="flashinfer")
    return lambda: [record.getMessage() for record in caplog.records]


# ------------------------------------------------------------------------------------------------------------ the order


def test_compiles_once_then_answers_from_table_and_cache(tmp_path: Path) -> None:
    compiler, spec = CountingCxx(), rmsnorm_spec()
    first = cpu_resolver(tmp_path, compiler)
    kernel = first.load(spec)
    run_rmsnorm(kernel)
    assert first.load(rmsnorm_spec()) is kernel
    run_rmsnorm(cpu_resolver(tmp_path, compiler).load(spec))  # another process's table is empty
    assert compiler.num_compiles == 1
    only_artifact(tmp_path)


def test_explain_compiles_and_writes_nothing(tmp_path: Path) -> None:
    compiler, spec = CountingCxx(), rmsnorm_spec()
    resolver = cpu_resolver(tmp_path / "cache", compiler)
    assert resolver.explain(spec) == [
        ("aot", Rejected("flashinfer_aot is not installed")),
        ("jit-cache", Rejected("not in JIT cache")),
    ]
    assert compiler.num_compiles == 0
    assert not (tmp_path / "cache").exists()
    resolver.load(spec)
    (_, answer) = resolver.explain(spec)[1]
    assert isinstance(answer, Hit) and answer.store == "jit-cache"


def test_ensure_fills_the_cache_and_is_no_miss(tmp_path: Path) -> None:
    compiler, spec = CountingCxx(), rmsnorm_spec()
    assert cpu_resolver(tmp_path, compiler).ensure(spec).store == "jit-compile"
    assert cpu_resolver(tmp_path, compiler).ensure(spec).store == "jit-cache"
    assert compiler.num_compiles == 1
    assert not (tmp_path / "misses").exists()


def test_threads_that_race_for_one_kernel_compile_it_once(tmp_path: Path) -> None:
    compiler = CountingCxx()
    resolver = cpu_resolver(tmp_path, compiler)
    together, kernels = threading.Barrier(8), []

    def load() -> None:
        together.wait()
        kernels.append(resolver.load(rmsnorm_spec(96)))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8 and len(set(map(id, kernels))) == 1
    assert compiler.num_compiles == 1


def test_threads_that_race_for_the_resolver_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "_resolver", None)
    together, found = threading.Barrier(8), []

    def get() -> None:
        together.wait()
        found.append(resolver_module.default_resolver())

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_warm_load_costs_a_dictionary_hit(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Of the processor's time, in the best of a few measurements: others may be at work beside them."""
    resolver, spec, number = cpu_resolver(tmp_path), rmsnorm_spec(), 20_000
    table = {spec: resolver.load(spec)}

    def seconds(look: Callable[[], object]) -> float:
        return min(timeit.repeat(look, timer=time.process_time, number=number, repeat=5)) / number

    warm, hit = seconds(lambda: resolver.load(spec)), seconds(lambda: table.get(spec))
    record_property("warm_load_ns", round(warm * 1e9))
    print(f"warm resolver.load: {warm * 1e9:.0f} ns, a dictionary's {hit * 1e9:.0f}")
    assert warm < 3 * hit


def test_equal_arguments_of_another_type_are_the_same_kernel() -> None:
    args = {"dtype": "fp32", "hidden_size": 64, "vec_size": 4, "add_residual": False, "gemma": True}
    loose = RMSNORM.spec(target.host(), **{**args, "hidden_size": 64.0, "add_residual": 0, "gemma": 1})
    assert render(loose) == render(RMSNORM.spec(target.host(), **args))


# ----------------------------------------------------------------------------------------------------------- log lines


def test_log_lines_of_a_compile(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    spec = rmsnorm_spec()
    cpu_resolver(tmp_path).load(spec)
    compiling, compiled = messages()
    assert compiling == f"compiling {spec.name} for {target.host()}; AOT: flashinfer_aot is not installed"
    name, on = re.escape(spec.name), re.escape(target.host())
    assert re.fullmatch(rf"compiled {name} for {on} in \d+\.\d\d s, \d+ bytes", compiled), compiled
    cpu_resolver(tmp_path).load(spec)
    assert messages()[2] == f"{spec.name} {target.host()}: from the JIT cache; AOT: flashinfer_aot is not installed"


def test_heartbeat_while_a_compile_is_slow(
    tmp_path: Path, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def beats() -> list[str]:
        return [line for line in messages() if line.startswith("still compiling")]

    class SlowCxx(HostCxx):
        def compile(self, source: Source) -> Compiled:
            wait_until(lambda: len(beats()) >= 3)
            return super().compile(source)

    monkeypatch.setattr(resolver_module, "_HEARTBEAT_SECONDS", 0.1)
    cpu_resolver(tmp_path, SlowCxx()).load(rmsnorm_spec())
    assert re.fullmatch(rf"still compiling {re.escape(rmsnorm_spec().name)} \(\d+ s\)", beats()[0])


# -------------------------------------------------------------------------------------------------------- no compiling


def test_disabled_jit_says_what_every_store_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    compiler = CountingCxx()
    with pytest.raises(KernelMissing) as error:
        cpu_resolver(tmp_path, compiler).load(rmsnorm_spec())
    message = str(error.value)
    for part in (
        rmsnorm_spec().name,
        "AOT: flashinfer_aot is not installed",
        "JIT cache: not in JIT cache",
        "FLASHINFER_DISABLE_JIT",
        '[[kernel]]\nfamily = "rmsnorm"\ndtype = "fp32"\nhidden_size = 64\n',
        "flashinfer warmup --config",
    ):
        assert part in message, message
    assert compiler.num_compiles == 0


def test_disabled_jit_still_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_resolver(tmp_path).load(rmsnorm_spec())
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    run_rmsnorm(cpu_resolver(tmp_path).load(rmsnorm_spec()))


def test_disabled_aot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_AOT", "true")
    (_, answer) = Resolver(AotStore(), tmp_path).explain(rmsnorm_spec())[0]
    assert answer == Rejected("AOT is disabled (FLASHINFER_DISABLE_AOT)")


# ------------------------------------------------------------------------------------------------------ compile errors


@pytest.fixture
def own_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of csrc/ to change."""
    copy = tmp_path / "csrc"
    shutil.copytree(source.include_root(), copy)
    monkeypatch.setattr(source, "include_root", lambda: copy)
    monkeypatch.setattr(toolchain, "include_root", lambda: copy)
    _forget_headers()
    yield copy
    _forget_headers()


def _forget_headers() -> None:
    for cached in (source.transitive_includes, source._read_header, source.header_digest):
        cached.cache_clear()


def test_compile_error_ends_with_the_first_error_and_names_the_log(own_headers: Path, tmp_path: Path) -> None:
    with open(own_headers / "cpu/norm/rmsnorm.h", "a") as file:
        file.write("\nint one = nonsense;\nint two = rubbish;\n")
    with pytest.raises(CompileError) as error:
        cpu_resolver(tmp_path / "cache").load(rmsnorm_spec())
    *report, last = str(error.value).splitlines()
    assert "error" in last and "nonsense" in last and "rubbish" not in last
    folder = Path(next(line for line in report if line.startswith("source and log: ")).partition(": ")[2])
    assert "nonsense" in (folder / "log.txt").read_text()
    assert (folder / "source.cpp").read_text() == render(rmsnorm_spec()).text
    assert not list((tmp_path / "cache" / "jit").glob("[!.]*")), "a failed compile leaves no kernel behind"


def test_compile_error_of_nvrtc_ends_with_the_first_error(own_headers: Path) -> None:
    _require_nvrtc()
    with open(own_headers / "norm/rmsnorm.cuh", "a") as file:
        file.write("\n__device__ int one = nonsense;\n__device__ int two = rubbish;\n")
    with pytest.raises(CompileError) as error:
        Nvrtc().compile(render(rmsnorm_spec(on="sm_90a")))
    last = str(error.value).splitlines()[-1]
    assert "error" in last and "nonsense" in last


def test_compiler_that_dies_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\nif [ "$1" = --version ]; then exec g++ --version; fi\nkill -9 $$\n')
    script.chmod(0o755)
    with pytest.raises(CompileError, match="exit status -9, no message"):
        cpu_resolver(tmp_path, HostCxx(str(script))).load(rmsnorm_spec())


@pytest.mark.parametrize("on", ["cpu", "sm_80"])
def test_drift_of_the_parameter_struct_is_a_compile_error(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python mirror of a struct with two fields swapped, and with one too many."""
    if on != "cpu":
        _require_nvrtc()
    fields = list(NormParams._fields_)
    swapped = [fields[0], fields[2], fields[1], *fields[3:]]
    longer = [*fields, ("extra", ctypes.c_int64)]
    for drifted in (swapped, longer):
        mirror = type("NormParams", (ctypes.Structure,), {"_fields_": drifted})
        drifting = tuple(dataclasses.replace(twin, params=mirror) for twin in RMSNORM.implementations)
        monkeypatch.setitem(specs._families, "rmsnorm", dataclasses.replace(RMSNORM, implementations=drifting))
        rendered = render(rmsnorm_spec(on=target.host() if on == "cpu" else on))
        compiler = HostCxx() if on == "cpu" else Nvrtc()
        with pytest.raises(CompileError, match="extra" if drifted is longer else "the Python mirror differs"):
            compiler.compile(rendered)


def _require_nvrtc() -> None:
    try:
        Nvrtc().identity  # noqa: B018
        toolchain.cuda_include()
    except toolchain.ToolchainMissing as error:
        pytest.skip(str(error))


# -------------------------------------------------------------------------------------------------------------- digests


def test_digest_follows_headers_at_any_depth(own_headers: Path) -> None:
    spec = rmsnorm_spec()
    before = render(spec).digest
    assert "common.h" in source.transitive_includes("cpu/norm/rmsnorm.h"), "included by cpu/types.h and norm/params.h"
    _change(own_headers / "common.h")
    assert render(spec).digest != before


def test_digest_ignores_headers_of_other_kernels(own_headers: Path) -> None:
    before = render(rmsnorm_spec()).digest
    _change(own_headers / "norm/layernorm.cuh")
    _change(own_headers / "norm/rmsnorm.cuh")  # of the CUDA kernel
    assert render(rmsnorm_spec()).digest == before


def test_changed_header_misses_the_cache(own_headers: Path, tmp_path: Path) -> None:
    compiler = CountingCxx()
    cpu_resolver(tmp_path, compiler).load(rmsnorm_spec())
    _change(own_headers / "common.h")
    cpu_resolver(tmp_path, compiler).load(rmsnorm_spec())
    assert compiler.num_compiles == 2


def _change(header: Path) -> None:
    header.write_text(header.read_text() + "\n// changed\n")
    _forget_headers()


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FLASHINFER_DISABLE_JIT", "yes", "FLASHINFER_DISABLE_JIT='yes': expected 0, 1, true or false"),
        ("FLASHINFER_DISABLE_AOT", "2", "FLASHINFER_DISABLE_AOT='2': expected 0, 1, true or false"),
        ("FLASHINFER_RECORD_MISSES", "off", "FLASHINFER_RECORD_MISSES='off': expected 0, 1, true or false"),
        ("FLASHINFER_LOG_LEVEL", "loud", "expected one of debug, info, warning, error"),
        ("FLASHINFER_CUDA_TOOLCHAIN", "clang", "expected one of nvrtc, nvcc"),
        ("FLASHINFER_SANITIZE", "address,thread", "expected address, undefined or both"),
    ],
)
def test_settings_are_strict(name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = next(setting for setting in env.ALL if setting.name == name)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSetting, match=re.escape(expected)):
        setting.get()
    monkeypatch.setenv(name, "")
    assert setting.get() == setting.default


def test_cpu_target_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, expected in (("pentium", "is unknown"), ("sm_90a", "expected a CPU level")):
        monkeypatch.setenv("FLASHINFER_CPU_TARGET", wrong)
        target.host.cache_clear()
        with pytest.raises(UnsupportedConfig, match=expected):
            target.host()
    monkeypatch.undo()
    target.host.cache_clear()


# --------------------------------------------------------------------------------------------------- CUDA graph capture


@pytest.fixture
def cold_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """A resolver with nothing in any store, in charge of the operators."""
    from flashinfer import norm

    cold = Resolver(AotStore(roots=[]), tmp_path)
    monkeypatch.setattr(resolver_module, "_resolver", cold)
    norm._memo.clear()
    return cold


@pytest.mark.gpu
def test_a_miss_during_capture_is_an_error_that_leaves_capturing_possible(cold_gpu: Resolver) -> None:
    import flashinfer

    x, weight = torch.randn(4, 320, device="cuda"), torch.randn(320, device="cuda")
    out = torch.empty_like(x)
    torch.cuda.synchronize()
    broken = torch.cuda.CUDAGraph()
    with (
        pytest.raises(KernelMissing, match=r"CUDA graph is being captured.*before the capture"),
        torch.cuda.graph(broken),
    ):
        flashinfer.rmsnorm(x, weight, out=out)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the failure has poisoned neither the stream nor the context
        torch.add(x, 1.0, out=out)
    graph.replay()
    torch.testing.assert_close(out, x + 1.0)

    flashinfer.rmsnorm(x, weight, out=out)  # what the message advises
    expected = out.clone()
    warm = torch.cuda.CUDAGraph()
    with torch.cuda.graph(warm):
        flashinfer.rmsnorm(x, weight, out=out)
    out.fill_(torch.nan)
    warm.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_the_capture_itself_survives_a_caught_miss(cold_gpu: Resolver) -> None:
    """A caller may fall back to another implementation within the same capture."""
    import flashinfer

    x, weight = torch.randn(4, 352, device="cuda"), torch.randn(352, device="cuda")
    out = torch.empty_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(KernelMissing):
            flashinfer.rmsnorm(x, weight, out=out)
        torch.mul(x, 2.0, out=out)
    graph.replay()
    torch.testing.assert_close(out, x * 2.0)


@pytest.mark.gpu
def test_a_kernel_found_in_a_store_loads_during_capture(cold_gpu: Resolver) -> None:
    """Loading code is allowed within a capture, compiling is not."""
    import flashinfer
    from flashinfer import norm

    x, weight = torch.randn(4, 384, device="cuda"), torch.randn(384, device="cuda")
    out = torch.empty_like(x)
    flashinfer.rmsnorm(x, weight, out=out)
    expected = out.clone()
    cold_gpu._table.clear()  # as a new process: the kernel is on disk and on no device
    norm._memo.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashinfer.rmsnorm(x, weight, out=out)
    out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out, expected)
