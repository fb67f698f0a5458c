"""Building sets of precompiled kernels: configs, resuming, failures, limits, and the check of what was built."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from flashinfer import families
from flashinfer.aot import build, elf, models, verify, worker
from flashinfer.aot.config import ConfigError, read_config, read_specs
from flashinfer.families import sampling
from flashinfer.jit import spec as specs
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore, Registry
from tests.aot.kit import (
    HOST,
    artifacts,
    build_set,
    change_entries,
    command,
    copy_set,
    has_nvrtc,
    registry_of,
    rmsnorm_rows,
    run_cli,
    run_script,
    write_config,
)
from tests.kit import ROOT, CountingCxx, finish, rmsnorm_spec, run_rmsnorm, spawn

CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

# -------------------------------------------------------------------------------------------------------------- configs

MODEL = """[[model]]
name = "tiny"
hidden_size = 256
num_qo_heads = 4
num_kv_heads = 2
head_dim = 64
intermediate_sizes = [512]
"""


def test_model_expands_to_its_kernels_once(tmp_path: Path) -> None:
    twice = write_config(tmp_path, MODEL + MODEL.replace("tiny", "twin"))
    found = read_specs([twice], ["sm_90a", "x86-64-v3"])
    assert len(found) == len(set(found))
    norms = {(spec.arg("dtype"), spec.arg("add_residual")) for spec in found if spec.family == "rmsnorm"}
    assert norms == {(dtype, add) for dtype in ("bf16", "fp16", "fp32") for add in (False, True)}
    assert {spec.arg("dtype") for spec in found if spec.family == "rmsnorm" and spec.target == "sm_90a"} == {
        "bf16",
        "fp16",
    }


def test_defaults_hold_where_a_row_is_silent(tmp_path: Path) -> None:
    path = write_config(tmp_path, '[defaults]\ndtypes = ["fp16"]\n' + MODEL + MODEL + 'dtypes = ["bf16"]\n')
    contents = [row.content for row in read_config(path)]
    assert [model.dtypes for model in contents if isinstance(model, models.Model)] == [("fp16",), ("bf16",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[model]\n", "config.toml: "),
        ("[[modle]]\n", "config.toml: unknown table modle; expected [defaults], [[model]] and [[kernel]]"),
        ("[model]\nname = 'x'\n", "config.toml: model is not a list of tables; write [[model]] above each row"),
        (
            MODEL + MODEL.replace("hidden_size", "hiden_size"),
            "config.toml:8: [[model]] row 2 (tiny): unknown key 'hiden_size'",
        ),
        (MODEL.replace("head_dim = 64\n", ""), "config.toml:1: [[model]] row 1 (tiny): head_dim is missing"),
        (MODEL.replace("256", "'256'"), "row 1 (tiny): hidden_size is '256'; expected int"),
        (MODEL.replace("256", "true"), "row 1 (tiny): hidden_size is True; expected int"),
        (MODEL.replace("256", "0"), "row 1 (tiny): hidden_size is 0; expected a positive number"),
        (MODEL.replace("[512]", "512"), "row 1 (tiny): intermediate_sizes is 512; expected a list of int"),
        (MODEL.replace("= 2", "= 3"), "row 1 (tiny): num_qo_heads is 4; expected a multiple of num_kv_heads 3"),
        (MODEL + "tensor_parallel = [3]\n", "row 1 (tiny): num_qo_heads [4] is not divisible by tensor_parallel 3"),
        (MODEL + "dtypes = ['bfloat']\n", "row 1 (tiny): dtypes has bfloat; expected fp16, bf16, fp32"),
        (MODEL.replace("64", "60"), "row 1 (tiny): decode: head_dim_qk=60 is not supported"),
        ("[defaults]\nname = 'x'\n", "config.toml: [defaults]: unknown key 'name'"),
        ("[[kernel]]\ndtype = 'fp32'\n", "config.toml:1: [[kernel]] row 1 (?): family is missing"),
        ("\n[[kernel]]\nfamily = 'nrom'\n", "config.toml:2: [[kernel]] row 1 (nrom): kernel family 'nrom' is unknown"),
        (rmsnorm_rows(64) + rmsnorm_rows(0), "config.toml:8: [[kernel]] row 2 (rmsnorm): rmsnorm: hidden_size=0"),
        (rmsnorm_rows(64).replace("gemma = false", ""), "rmsnorm: expected arguments dtype, hidden_size"),
    ],
)
def test_wrong_config_names_file_and_row(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_specs([write_config(tmp_path, text)], ["x86-64-v3"])
    assert message in str(caught.value)


def test_unknown_config_lists_those_that_come_along() -> None:
    with pytest.raises(ConfigError, match=r"nothing: no such config; expected a file, or one of core, smoke"):
        read_specs(["nothing"], ["sm_80"])


def test_core_is_legal_everywhere(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    found = read_specs(["core", "smoke"], [*CUDA_TARGETS, "x86-64-v3", "armv8.2-a"])
    digests = [render(spec).digest for spec in found]
    assert len(set(digests)) == len(digests)
    assert not caplog.records, "a kernel was left out for a target"


def test_core_answers_what_operators_ask_for() -> None:
    """Both sides compute their arguments apart: operators from tensors, the core set from shapes in a file."""
    out, _ = finish(spawn("from tests.aot import ask_core; ask_core.main()"))
    asked = {KernelSpec.from_dict(spec) for spec in json.loads(out)}
    core = set(read_specs(["core"], [HOST]))
    assert not sorted(spec.name for spec in asked - core)
    assert {spec.family for spec in core} <= {spec.family for spec in asked}, "families nobody asks for"


def test_core_holds_every_placement_of_a_row_of_the_vocabulary() -> None:
    """How many blocks share a row depends on the number of rows, which is known at run time alone."""
    core = {spec for spec in read_specs(["core"], ["sm_80", "sm_90a"]) if spec.family == "sample_row"}
    held = {(spec.target, spec.arg("cluster_size"), spec.arg("row_kib")) for spec in core}
    contents = [row.content for row in read_config(ROOT / "aot_configs" / "core.toml")]
    vocabularies = {model.vocab_size for model in contents if isinstance(model, models.Model)}
    for target_name, num_sms in (("sm_80", 108), ("sm_90a", 114), ("sm_90a", 132)):
        for vocab_size, num_rows, keeps_row in itertools.product(vocabularies, range(1, 600), (False, True)):
            place = sampling.placement("fp32", vocab_size, num_rows, num_sms, target_name, keeps_row)
            assert (target_name, place["cluster_size"], place["row_kib"]) in held, (vocab_size, num_rows)


# --------------------------------------------------------------------------------------------------------------- builds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two kernels for this machine, and its config.toml."""
    folder = tmp_path_factory.mktemp("built")
    report = build_set(write_config(folder, rmsnorm_rows(64, 128)), folder / "set")
    assert report.num_compiled == 2 and not report.failures
    return folder


@pytest.fixture
def again(built: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(config, folder) of a copy of that set, to go on from."""
    return built / "config.toml", copy_set(built / "set", tmp_path / "set")


def test_built_set_answers(built: Path, tmp_path: Path) -> None:
    compiler = CountingCxx()
    resolver = Resolver(AotStore([built / "set"]), tmp_path, lambda kind: compiler)
    run_rmsnorm(resolver.load(rmsnorm_spec()))
    assert compiler.num_compiles == 0


def test_nothing_to_do_the_second_time(again: tuple[Path, Path]) -> None:
    config, out = again
    before = (out / "registry.json").read_bytes()
    assert build_set(config, out).num_compiled == 0
    assert (out / "registry.json").read_bytes() == before


def test_damaged_artifact_alone_is_rebuilt(again: tuple[Path, Path]) -> None:
    config, out = again
    path = artifacts(out)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert build_set(config, out).num_compiled == 1
    assert path.read_bytes() == whole, "compiling is reproducible"


@pytest.mark.parametrize("what", ["digest", "compiler"])
def test_kernels_of_other_sources_or_compilers_are_rebuilt(what: str, again: tuple[Path, Path]) -> None:
    config, out = again
    first, second = map(json.loads, (out / worker.RESULTS).read_text().splitlines())
    first["entry"][what] = "another"
    (out / worker.RESULTS).write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    assert build_set(config, out).num_compiled == 1


def test_results_cut_short_by_a_crash_cost_one_compile(again: tuple[Path, Path]) -> None:
    config, out = again
    (out / "registry.json").unlink()
    results = out / worker.RESULTS
    results.write_bytes(results.read_bytes()[:-20])
    assert build_set(config, out).num_compiled == 1
    assert len(Registry(out).entries) == 2


def test_set_holds_what_is_asked_for_and_no_more(again: tuple[Path, Path]) -> None:
    _, out = again
    smaller = write_config(out.parent, rmsnorm_rows(128))
    assert build_set(smaller, out).num_compiled == 0
    assert [path.relative_to(out).as_posix() for path in artifacts(out)] == [
        entry["file"] for entry in registry_of(out)["kernels"]
    ]
    assert len(artifacts(out)) == 1


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, rmsnorm_rows(64, 128))
    assert run_cli("aot", "build", *command(config, tmp_path / "set", "--dry-run")) == 0
    assert "2 kernels: 0 up to date, 2 to compile" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()


def test_max_bytes_fails_an_overrun_and_keeps_the_old_registry(
    again: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = again
    before = (out / "registry.json").read_bytes()
    larger = write_config(out.parent, rmsnorm_rows(64, 128, 192))
    assert run_cli("aot", "build", *command(larger, out, "--max-bytes", "20K")) == 1
    assert "--max-bytes allows 20480" in capsys.readouterr().err
    assert (out / "registry.json").read_bytes() == before
    assert run_cli("aot", "build", *command(larger, out, "--max-bytes", "1M", "--jobs", "1")) == 0
    assert "0 compiled" in capsys.readouterr().out, "what the failed build had compiled is kept"


def test_misses_are_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolver = Resolver(AotStore([]), tmp_path / "cache", lambda kind: CountingCxx())
    resolver.load(rmsnorm_spec(hidden_size=320))
    (record,) = (tmp_path / "cache" / "misses").iterdir()
    unknown = json.loads(record.read_text())
    unknown["spec"]["family"] = "of a later version"
    with open(record, "a") as file:
        file.write(json.dumps(unknown) + "\n" + '{"spec": {"fam')
    assert read_specs([], [HOST, "sm_80"], [record]) == [rmsnorm_spec(hidden_size=320)], (
        "a miss on a CPU is one for CPUs"
    )
    assert any(f"{record}:2 is skipped" in line.getMessage() for line in caplog.records)


# ----------------------------------------------------------------------------------------------- failures, interruption


def failing_compiler(folder: Path, action: str) -> Path:
    """A compiler for FLASHINFER_CXX that does `action` instead when the kernel has hidden_size 65."""
    script = folder / "failing-g++"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then exec g++ --version; fi
for last in "$@"; do case "$last" in *.cpp) source=$last;; esac; done
if grep -q "kHiddenSize = 65;" "$source"; then {action}; fi
exec g++ "$@"
"""
    )
    script.chmod(0o755)
    return script


def test_failing_kernel_does_not_lose_the_others(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(64, 65, 66, vec_size=1)), tmp_path / "set"
    compiler = failing_compiler(tmp_path, "echo 'kernel.cpp:1: error: no good' >&2; exit 1")
    process = run_script(command(config, out), FLASHINFER_CXX=compiler)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"failed: {_name(65)} ({HOST})" in errors
    assert "kernel.cpp:1: error: no good" in errors
    assert "failed" in text
    assert {entry.args["hidden_size"] for entry in Registry(out).entries} == {64, 66}


def test_dead_compile_process_is_reported(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(64, 65, 66, vec_size=1)), tmp_path / "set"
    compiler = failing_compiler(tmp_path, "kill -9 $PPID; sleep 1")
    process = run_script(command(config, out, "--jobs", "1"), FLASHINFER_CXX=compiler)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"failed: {_name(65)}" in errors and "died without a word" in errors
    assert {entry.args["hidden_size"] for entry in Registry(out).entries} == {64, 66}


def test_interrupted_build_goes_on_where_it_was(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(64, 65, vec_size=1)), tmp_path / "set"
    compiler = failing_compiler(tmp_path, "sleep 60")
    process = run_script(command(config, out, "--jobs", "1"), FLASHINFER_CXX=compiler)
    deadline = time.monotonic() + 30
    while not (out / worker.RESULTS).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert not (out / "registry.json").exists()
    compiler = failing_compiler(tmp_path, ":")
    text, _ = finish(run_script(command(config, out), FLASHINFER_CXX=compiler))
    assert "2 kernels: 1 up to date, 1 to compile" in text
    assert not verify.verify(Registry(out))


def test_two_builds_of_one_folder(again: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, out = again
    with build._sole_writer(out):
        assert run_cli("aot", "build", *command(config, out)) == 1
    assert f"another build is writing to {out}" in capsys.readouterr().err


def _name(hidden_size: int) -> str:
    return f"rmsnorm-dtype=fp32-hidden_size={hidden_size}-vec_size=1-add_residual=0-gemma=0"


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


# --------------------------------------------------------------------------------------------------------------- verify


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_nvrtc():
        pytest.skip("needs NVRTC")
    folder = tmp_path_factory.mktemp("cubins")
    build_set(write_config(folder, rmsnorm_rows(64)), folder / "set", *CUDA_TARGETS, HOST)
    return folder / "set"


def test_verify_finds_a_sound_set_sound(cubins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", cubins) == 0
    assert f"{cubins}: 7 kernels, all sound" in capsys.readouterr().out


def test_list(cubins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "list", cubins) == 0
    assert "sm_90a" in capsys.readouterr().out
    assert run_cli("aot", "list", "--kernels", cubins) == 0
    assert rmsnorm_spec().name in capsys.readouterr().out


def test_commands_without_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", tmp_path) == 1
    assert "no usable registry" in capsys.readouterr().err


def problems(root: Path) -> list[str]:
    return [f"{problem.what}: {problem.why}" for problem in verify.verify(Registry(root))]


def swap_targets(root: Path, first: str, second: str) -> None:
    """Say in the registry that the machine code of each target is for the other."""
    data = registry_of(root)
    for entry in data["kernels"]:
        entry["target"] = {first: second, second: first}.get(entry["target"], entry["target"])
    (root / "registry.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("sm_80", "sm_90a", "is machine code for sm_80; the registry says sm_90a"),
        ("sm_100a", "sm_120a", "is machine code for sm_120; the registry says sm_100a"),
        ("sm_80", HOST, f"is machine code for cuda; the registry says {HOST}"),
        (HOST, "sm_86", "is machine code for x86-64; the registry says sm_86"),
    ],
)
def test_verify_reads_the_target_from_the_machine_code(
    first: str, second: str, message: str, cubins: Path, tmp_path: Path
) -> None:
    root = copy_set(cubins, tmp_path / "set")
    swap_targets(root, first, second)
    assert any(message in problem for problem in problems(root))


def test_verify_tells_architecture_specific_code_apart(cubins: Path, tmp_path: Path) -> None:
    """sm_90 and sm_90a are one number in the ELF header; the arguments ptxas notes tell which it was."""
    root = copy_set(cubins, tmp_path / "set")
    data = registry_of(root)
    for entry in data["kernels"]:
        entry["target"] = "sm_90" if entry["target"] == "sm_90a" else entry["target"]
    (root / "registry.json").write_text(json.dumps(data))
    assert any("was compiled for sm_90a; the registry says sm_90" in problem for problem in problems(root))


@pytest.mark.skipif(HOST not in ("x86-64-v3", "x86-64-v4"), reason="needs an x86 CPU with AVX2, and its linker's note")
def test_verify_reads_the_level_of_a_cpu_library(again: tuple[Path, Path]) -> None:
    _, root = again
    change_entries(root, target="x86-64-v2")
    assert any(f"was compiled for {HOST}; the registry says x86-64-v2" in problem for problem in problems(root))


@pytest.mark.parametrize(
    ("version", "flags", "target"),
    [
        (7, 0x00500550, "sm_80"),  # as NVRTC 12.9 writes them
        (7, 0x005A0D5A, "sm_90a"),
        (8, 0x0600640A, "sm_100a"),
        (8, 0x06006402, None),
    ],
)
def test_target_in_elf_headers_of_cuda_12(version: int, flags: int, target: str | None) -> None:
    header = bytearray(64)
    header[:9] = b"\x7fELF\x02\x01\x01\x33" + bytes([version])
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<I", header, 48, flags)
    code = elf.inspect(bytes(header))
    assert (code.machine, code.target) == ("cuda", target)
    assert code.capability == ((10, 0) if version == 8 else (8, 0) if target == "sm_80" else (9, 0))


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x01" + bytes(60), b"#!" * 40]
)
def test_no_machine_code(content: bytes) -> None:
    with pytest.raises(ValueError, match="ELF file"):
        elf.inspect(content)


def test_verify_finds_damage_and_strangers(again: tuple[Path, Path]) -> None:
    _, root = again
    first, second = artifacts(root)
    first.write_bytes(first.read_bytes()[:-500])
    second.unlink()
    (second.parent / "stranger.so").write_bytes(b"")
    found = problems(root)
    name = first.relative_to(root).as_posix()
    assert any(problem.startswith(f"{name}: has ") for problem in found)
    assert f"{name}: sha256 differs from the registry's" in found
    assert any(problem.startswith(f"{name}: the ELF file is cut short") for problem in found)
    assert f"{second.relative_to(root).as_posix()}: is unreadable: No such file or directory" in found
    assert any(problem.endswith("stranger.so: is not in the registry") for problem in found)


def test_verify_finds_other_sources_and_outside_files(again: tuple[Path, Path]) -> None:
    _, root = again
    change_entries(root, digest="0" * 64, file="../registry.json")
    found = problems(root)
    assert any("digest differs: it was built from other sources" in problem for problem in found)
    assert any("lies outside the folder of the registry" in problem for problem in found)


def test_every_family_is_known_by_name() -> None:
    families.register_all()
    for spec in read_specs(["core", "smoke"], ["sm_90a", HOST]):
        assert KernelSpec.from_dict(spec.to_dict()) == spec
        assert specs.family(spec.family).name == spec.family
