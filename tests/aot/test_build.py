# SPDX-License-Identifier: Apache-2.0
"""Building sets of precompiled kernels: what is compiled, limits, and kernels that do not compile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashinfer.aot import build, worker
from flashinfer.aot.config import read_specs
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.stores import AotStore, Registry
from tests.aot.kit import (
    HOST,
    artifacts,
    build_set,
    change_registry,
    command,
    failing_compiler,
    registry_of,
    rmsnorm_rows,
    run_cli,
    run_script,
    write_config,
)
from tests.kit import PATIENCE_SECONDS, CountingCxx, finish, rmsnorm_spec, run_rmsnorm, spawn


@pytest.fixture
def config(host_set: Path) -> Path:
    """What `host_copy` was built from."""
    return host_set.parent / "config.toml"


def test_built_set_answers(host_set: Path, tmp_path: Path) -> None:
    compiler = CountingCxx()
    resolver = Resolver(AotStore([host_set]), tmp_path, lambda kind: compiler)
    run_rmsnorm(resolver.load(rmsnorm_spec()))
    assert compiler.num_compiles == 0


def test_nothing_to_do_the_second_time(config: Path, host_copy: Path) -> None:
    before = (host_copy / "registry.json").read_bytes()
    assert build_set(config, host_copy).num_compiled == 0
    assert (host_copy / "registry.json").read_bytes() == before


def test_damaged_artifact_alone_is_rebuilt(config: Path, host_copy: Path) -> None:
    path = artifacts(host_copy)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert build_set(config, host_copy).num_compiled == 1
    assert path.read_bytes() == whole, "compiling is reproducible"


@pytest.mark.parametrize("what", ["digest", "compiler"])
def test_kernels_of_other_sources_or_compilers_are_rebuilt(what: str, config: Path, host_copy: Path) -> None:
    first, second = registry_of(host_copy)["kernels"]
    change_registry(host_copy, kernels=[{**first, what: "another"}, second])
    (host_copy / worker.RESULTS).unlink()  # which would tell
    assert build_set(config, host_copy).num_compiled == 1
    assert registry_of(host_copy)["kernels"] == [first, second]


def test_results_cut_short_by_a_crash_cost_one_compile(config: Path, host_copy: Path) -> None:
    (host_copy / "registry.json").unlink()
    results = host_copy / worker.RESULTS
    results.write_bytes(results.read_bytes()[:-20])
    assert build_set(config, host_copy).num_compiled == 1
    assert len(Registry(host_copy).entries) == 2


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, rmsnorm_rows(64, 128))
    assert run_cli("aot", "build", *command(config, tmp_path / "set", "--dry-run")) == 0
    assert "2 kernels: 0 up to date, 2 to compile" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()


def test_max_bytes_fails_an_overrun_and_keeps_the_old_registry(
    host_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "check_forecast", lambda *_: None)  # it is found out in the end alone
    before = (host_copy / "registry.json").read_bytes()
    larger = write_config(host_copy.parent, rmsnorm_rows(64, 128, 192))
    assert run_cli("aot", "build", *command(larger, host_copy, "--max-bytes", "40K")) == 1
    assert "--max-bytes allows 40960" in capsys.readouterr().err
    assert (host_copy / "registry.json").read_bytes() == before
    assert run_cli("aot", "verify", host_copy) == 0, "what the failed build had compiled is no stranger"
    assert run_cli("aot", "build", *command(larger, host_copy, "--max-bytes", "1M", "--jobs", "1")) == 0
    assert "0 compiled" in capsys.readouterr().out, "and is kept"


# ----------------------------------------------------------------------------------------------------------- failures


def test_failing_kernel_does_not_lose_the_others(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(65, 66, vec_size=1)), tmp_path / "set"
    compiler = failing_compiler(tmp_path, "echo 'kernel.cpp:1: error: no good' >&2; exit 1")
    process = run_script(command(config, out), FLASHINFER_CXX=compiler)
    text, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert f"failed: {_name(65)} ({HOST})" in errors
    assert "kernel.cpp:1: error: no good" in errors
    assert "failed" in text
    assert {entry.args["hidden_size"] for entry in Registry(out).entries} == {66}


def test_dead_compile_process_is_reported(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(65, 66, vec_size=1)), tmp_path / "set"
    compiler = failing_compiler(tmp_path, "kill -9 $PPID; sleep 1")
    process = run_script(command(config, out, "--jobs", "1"), FLASHINFER_CXX=compiler)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert f"failed: {_name(65)}" in errors and "its compile process died" in errors
    assert {entry.args["hidden_size"] for entry in Registry(out).entries} == {66}


def test_a_set_of_failures_alone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, rmsnorm_rows(65, vec_size=1))
    monkeypatch.setenv("FLASHINFER_CXX", str(failing_compiler(tmp_path, "exit 1")))
    assert run_cli("aot", "build", *command(config, tmp_path / "set")) == 1
    assert not (tmp_path / "set" / "registry.json").exists()


def _name(hidden_size: int) -> str:
    return f"rmsnorm-dtype=fp32-hidden_size={hidden_size}-vec_size=1-add_residual=0-gemma=0"


# ------------------------------------------------------------------------------------------------------------ processes


def test_jobs_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_available_memory", lambda: 3 << 29)
    assert build.default_jobs() == 1
    monkeypatch.setattr(build, "_available_memory", lambda: 0)
    assert build.default_jobs() == 1
    monkeypatch.setattr(build, "_available_memory", lambda: None)
    assert build.default_jobs() >= 1


def test_batches_hold_every_kernel_once() -> None:
    for count in (1, 2, 13, 100, 1000):
        requests = [
            rmsnorm_spec(size + 1) if (size + 1) % 4 == 0 else rmsnorm_spec(4 * size + 4) for size in range(count)
        ]
        batches = build._batches(requests, num_jobs=4)
        assert sorted(spec for batch in batches for spec in batch) == sorted(requests)
        assert all(batches) and max(map(len, batches)) <= 16


def test_compile_processes_start_without_torch() -> None:
    finish(
        spawn(
            """
            import sys
            from flashinfer import families
            from flashinfer.aot import worker
            families.register_all()
            assert "torch" not in sys.modules
            """
        )
    )


def test_paths_of_every_spelling(tmp_path: Path) -> None:
    """ninja and the shell between read the path of the set too."""
    out = tmp_path / 'a set: of $HOME\'s & "more" (ü)'
    report = build.build(read_specs([write_config(tmp_path, rmsnorm_rows(64))], [HOST]), out)
    assert not report.failures and Registry(out).entries[0].args["hidden_size"] == 64
    assert json.loads((out / worker.RESULTS).read_text())["entry"]["target"] == HOST
