# SPDX-License-Identifier: Apache-2.0
"""How a build finds the headers: CMake, pkg-config, `flashinfer cpp`; the C example; benchmark programs, and the same
in Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashinfer import families, target
from flashinfer.cli import cpp as cli_cpp
from flashinfer.cli import main
from flashinfer.families.attention.decode import DECODE_PLAN, decode
from flashinfer.jit.stores import Registry
from flashinfer.version import __version__
from tests.cpp.kit import compile_program, entry_of, pretended_gpu, run_program, write_set
from tests.cpp.launches import idle_code
from tests.kit import ROOT

BENCHMARKS = ("single_decode", "single_prefill", "batch_decode", "batch_prefill")
CMAKE = """
cmake_minimum_required(VERSION 3.16)
project(mine LANGUAGES CXX)
find_package(flashinfer {version} REQUIRED CONFIG)
message("found ${{flashinfer_VERSION}}")
file(WRITE main.cpp "#include <flashinfer/registry.hpp>
int main() {{ return flashinfer::candidates(\\"sm_90a\\").size() == 2 ? 0 : 1; }}")
add_executable(mine main.cpp)
target_link_libraries(mine PRIVATE flashinfer::flashinfer)
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out.strip()


def cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    return subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_cmake_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = printed(capsys, "cpp", "--cmake")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE.format(version=__version__))
    done = cmake("-S", tmp_path, "-B", tmp_path / "build", f"-Dflashinfer_DIR={where}")
    assert done.returncode == 0, done.stderr
    assert f"found {__version__}" in done.stderr
    done = cmake("--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    run_program(tmp_path / "build" / "mine")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE.format(version="99.0"))
    assert cmake("-S", tmp_path, "-B", tmp_path / "later", f"-Dflashinfer_DIR={where}").returncode != 0


def test_pkg_config(capsys: pytest.CaptureFixture[str]) -> None:
    folder, flags = printed(capsys, "cpp", "--pkg-config"), printed(capsys, "cpp", "--flags").split()
    text = (Path(folder) / "flashinfer.pc").read_text()
    assert f"\nVersion: {__version__}\n" in text
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "flashinfer"], env={"PKG_CONFIG_PATH": folder, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = done.stdout.split()
    assert [Path(flag[2:]).resolve() for flag in found[:2]] == [Path(flag[2:]) for flag in flags]
    assert found[2:] == ["-ldl"]


def test_c_example(c_library: Path, host_set: Path, tmp_path: Path) -> None:
    source = ROOT / "examples" / "cpp" / "rmsnorm.c"
    assert len(source.read_text().splitlines()) <= 36
    links = (str(c_library), f"-Wl,-rpath,{c_library.parent}")
    program = compile_program(source, tmp_path / "rmsnorm", compiler="gcc", links=links)
    first, last, second = map(float, run_program(program, host_set).split())
    scale = (sum(i * i for i in range(1, 65)) / 64) ** 0.5
    assert first == pytest.approx(2 / scale, abs=1e-4) and last == pytest.approx(128 / scale, abs=1e-4)
    assert second == pytest.approx(-2.0, abs=1e-4)


def test_everything_at_once(
    host_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_AOT_PATH", str(host_set))
    assert printed(capsys, "cpp", "--sets").split(":")[0] == str(host_set)
    assert [line.split()[0] for line in printed(capsys, "cpp").splitlines()] == [
        "flags", "cmake", "pkg-config", "source", "sets",
    ]  # fmt: skip


def test_no_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_cpp.AotStore, "roots", lambda store: [])
    assert main(["cpp", "--sets"]) == 1
    assert "no set of kernels is installed. Next step: " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture(scope="module")
def bench_decode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = ROOT / "cpp" / "bench" / "batch_decode.cpp"
    return compile_program(source, tmp_path_factory.mktemp("bench") / "bench_batch_decode")


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", text)) - {"--help", "--set", "--peer"}


def test_options_are_those_of_python(bench_decode: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "batch_decode", "--help"])
    assert options_in(run_program(bench_decode, "--help")) == options_in(capsys.readouterr().out)
    for wrong in (["--batch-size", "0"], ["--kv-len", "9" * 20], ["--no-such"], ["--kv-len"], ["--qo-len", "3"]):
        done = subprocess.run([str(bench_decode), *wrong], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "bench_batch_decode:" in done.stderr


def test_both_time_the_same_case(bench_decode: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.register_all()
    spec = decode(target.host(), q_dtype="fp32", kv_dtype="fp32", head_dim=64, group_size=2)
    chosen = ["--device", "cpu", "--batch-size", "3", "--kv-len", "70", "--num-qo-heads", "4", "--num-kv-heads", "2"]
    chosen += ["--head-dim", "64", "--page-size", "4", "--dtype", "fp32", "--repeats", "3"]
    root = write_set(tmp_path / "set", [spec])
    by_cpp = json.loads(run_program(bench_decode, "--set", root, *chosen, "--json"))
    by_python = json.loads(printed(capsys, "bench", "batch_decode", *chosen, "--json"))
    assert all(by_cpp[name] == by_python[name] for name in ("benchmark", "case", "bytes", "flops"))
    assert by_cpp["us"] > 0 and by_python["us"]["flashinfer"] > 0
    assert re.search(
        r"^\| 3 x 1 on 70, 4/2, d64, p4, fp32 \| [\d.]+ \| [\d.]+ \|",
        run_program(bench_decode, "--set", root, *chosen),
        re.M,
    )


def test_programs_time_a_graph(bench_decode: Path, driver: Path, tmp_path: Path) -> None:
    """Of the calls on all sets of buffers, which is launched twice before it is timed: no launch lies in between."""
    families.register_all()
    specs = [decode("sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=64, group_size=2), DECODE_PLAN.spec("sm_90a")]
    root = tmp_path / "set"
    Registry.write(root, [entry_of(root, spec, idle_code(spec)) for spec in specs])
    chosen = ["--set", root, "--device", "cuda", "--kv-len", "70", "--num-qo-heads", "4", "--num-kv-heads", "2"]
    chosen += ["--head-dim", "64", "--repeats", "3", "--json"]
    log, copies = tmp_path / "launches.txt", 32
    found = json.loads(run_program(bench_decode, *chosen, **pretended_gpu(driver, log)))
    run = ["decode"] * copies
    wanted = ["decode_plan", *run, "capture begins", *run, "capture ends", *["graph"] * 5]
    assert [line.partition(" grid ")[0] for line in log.read_text().splitlines()] == wanted
    streams = {line.partition(" stream ")[2].split()[0] for line in log.read_text().splitlines() if " stream " in line}
    assert len(streams) == 2  # the plan is on the default one, which cannot be captured
    assert found["us"] == pytest.approx(1000 / copies, abs=1e-3)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_bench_in_python(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every benchmark, and itself as the peer; of a folder without a library, the reason."""
    chosen = ["--device", "cpu", "--kv-len", "16", "--num-qo-heads", "4", "--num-kv-heads", "2", "--head-dim", "64"]
    chosen += ["--dtype", "fp32", "--repeats", "2", *(["--qo-len", "8"] if name.endswith("prefill") else [])]
    peer = ["--peer", str(ROOT)] if name == "batch_decode" else []
    output = printed(capsys, "bench", name, *chosen, *peer)
    assert f"{name}, {target.host()}" in output and len(output.splitlines()) == (4 if peer else 3)


def test_bench_of_a_peer_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--device", "cpu", "--kv-len", "16", "--num-qo-heads", "4", "--num-kv-heads", "2", "--head-dim", "64"]
    assert main(["bench", "batch_decode", *chosen, "--dtype", "fp32", "--repeats", "1", "--peer", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no flashinfer" in capsys.readouterr().err


@pytest.mark.slow
def test_cmake_builds_everything(tmp_path: Path) -> None:
    done = cmake("-S", ROOT / "cpp", "-B", tmp_path, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    assert done.returncode == 0, done.stderr
    done = cmake("--build", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in BENCHMARKS:
        assert "--kv-len" in run_program(tmp_path / f"bench_{name}", "--help")
    assert sys.platform == "linux" and (tmp_path / "libflashinfer_c.so").exists() and (tmp_path / "engine").exists()
