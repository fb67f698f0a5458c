# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and measure another installation of flashinfer beside ours, over the same cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.kit import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bench_parallel
import results

# A benchmark of two cases, on flashinfer packages that say themselves how long they take. What stands in for torch
# spares each process the import.
BENCHMARK = """
import argparse
from common import print_failures, print_table, run, table, write_results
import flashinfer

def measure(args, times):
    for case in ("small", "large"):
        times.measure(case, "", flashinfer.microseconds, case, args.scale)

parser = argparse.ArgumentParser()
parser.add_argument("--scale", type=float, default=1.0)
args, ours, peers = run(parser, measure)
rows = [[case, ours.us(case), *(peer.us(case) for peer in peers)] for case in ("small", "large")]
print_table("Times", ["case", "us", *(peer.library for peer in peers)], rows)
print_failures(peers)
others = lambda case: {peer.library: peer.us(case) for peer in peers}
timed = [(case, ours.us(case), others(case), {"bytes": 64}) for case in ("small", "large")]
write_results(args, {"stub": table("us", timed)})
"""
OURS = """
__version__ = "1.0"
def microseconds(case, scale):
    return scale * {"small": 1.5, "large": 2.5}[case]
"""
TORCH = """
__version__ = "2.0"
class cuda:
    is_available = staticmethod(lambda: False)
"""
PEER = """
__version__ = "0.7"
def microseconds(case, scale):
    if case == "large":
        raise ValueError("no kernel for large\\nand a second line")
    return scale * 10.0
"""


def run(*command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """With another torch on the path in a process that has none yet."""
    environment = {**os.environ, "PYTHONPATH": path or str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    if not path:
        return warm.run(command, environment)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def install(folder: Path, package: str, distribution: str = "", name: str = "flashinfer") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(package)
    if distribution:
        (folder / f"{distribution}-9.dist-info").mkdir()
        (folder / f"{distribution}-9.dist-info" / "METADATA").write_text(f"Name: {distribution}\nVersion: 9\n")
    return folder


def table(output: str) -> list[list[str]]:
    """The cells of the first table: its header, then its rows."""
    lines = output[output.index("\n| ") + 1 :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [header, *rows]


@pytest.fixture
def stub(tmp_path: Path) -> tuple[str, str]:
    """The script, and the path on which it finds our side."""
    script = tmp_path / "bench_stub.py"
    script.write_text(BENCHMARK)
    torch = install(tmp_path / "torch", TORCH, name="torch")
    return str(script), os.pathsep.join(map(str, (install(tmp_path / "ours", OURS), ROOT / "benchmarks", torch)))


@pytest.mark.parametrize(("distribution", "label"), [("", "peer 0.7"), ("flashinfer_python", "upstream 0.7")])
def test_peer_columns(stub: tuple[str, str], tmp_path: Path, distribution: str, label: str) -> None:
    script, path = stub
    peer = install(tmp_path / "theirs", PEER, distribution)
    done = run(script, "--peer", str(peer), "--scale", "2", path=path)  # the peer gets the same arguments
    assert done.returncode == 0, done.stderr
    assert table(done.stdout) == [["case", "us", label], ["small", "3.00", "20.00"], ["large", "5.00", "-"]]
    assert f"- {label}, large: ValueError: no kernel for large\n" in done.stdout


def test_results_as_a_file(stub: tuple[str, str], tmp_path: Path) -> None:
    """The same figures as the table, what could not be timed as null, and of the peer's folder its name alone."""
    script, path = stub
    peer = install(tmp_path / "theirs", PEER, "flashinfer_python")
    done = run(script, "--peer", str(peer), "--json", str(tmp_path / "json"), "--commit", "0123abc", path=path)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "json").iterdir()
    assert f"written: {written}" in done.stdout
    (one,) = results.read(written).runs
    assert one.benchmark == "stub" and one.command == "benchmarks/bench_stub.py --peer theirs"
    assert one.versions["flashinfer"] == "1.0" and one.versions["torch"]
    assert str(tmp_path) not in written.read_text()
    assert one.tables["stub"].cases == {
        "small": results.Case(1.5, {"upstream 0.7": 10.0}, bytes=64),
        "large": results.Case(2.5, {"upstream 0.7": None}, bytes=64),
    }


def test_results_of_an_unknown_commit(stub: tuple[str, str], tmp_path: Path) -> None:
    """An exported tree, which git knows nothing of: no file without the commit."""
    script, path = stub
    left = shutil.ignore_patterns("__pycache__")  # where other tests write meanwhile
    shutil.copytree(ROOT / "benchmarks", tmp_path / "exported" / "benchmarks", ignore=left)
    path = path.replace(str(ROOT / "benchmarks"), str(tmp_path / "exported" / "benchmarks"))
    done = run(script, "--json", str(tmp_path / "json"), path=path)
    assert done.returncode != 0 and "name it with --commit" in done.stderr
    done = run(script, "--json", str(tmp_path / "json"), "--commit", "main", path=path)
    assert done.returncode != 0 and "commit is 'main'; expected" in done.stderr and "small" not in done.stdout
    assert run(script, "--json", str(tmp_path / "json"), "--commit", "0123abc", path=path).returncode == 0
    assert next((tmp_path / "json").iterdir()).stem.endswith("-0123abc")


def test_without_a_peer(stub: tuple[str, str]) -> None:
    done = run(stub[0], path=stub[1])
    assert table(done.stdout) == [["case", "us"], ["small", "1.50"], ["large", "2.50"]]


def test_an_empty_folder_is_no_peer(stub: tuple[str, str], tmp_path: Path) -> None:
    done = run(stub[0], "--peer", str(tmp_path), path=stub[1])
    assert done.returncode != 0
    assert "expected a folder that holds a package flashinfer" in done.stderr
    assert done.stdout == "", "said before anything is timed"


def test_a_peer_that_dies_is_an_error(stub: tuple[str, str], tmp_path: Path) -> None:
    peer = install(tmp_path / "theirs", PEER + "import os; os._exit(3)\n")
    done = run(stub[0], "--peer", str(peer), path=stub[1])
    assert done.returncode != 0 and "|" not in done.stdout


def test_our_own_failures_are_errors(stub: tuple[str, str], tmp_path: Path) -> None:
    ours = install(tmp_path / "broken", PEER)
    done = run(stub[0], path=f"{ours}{os.pathsep}{stub[1]}")
    assert done.returncode != 0 and "no kernel for large" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["bench_decode.py", "--only", "1 x 1024", "--no-host"],
        ["bench_prefill.py", "--only", "256 x 128", "--no-host"],
        ["bench_sampling.py", "--rows", "1", "--logits", "normal", "--vocab", "1000", "--no-host"],
        ["bench_elementwise.py", "--only", "append"],
        ["bench_gdn_decode.py", "--only", "norm"],
        pytest.param(["bench_gemm.py", "--only", "16 x 2112", "--no-host"], marks=pytest.mark.slow),
        ["bench_host.py", "--device", "cpu", "--only", "rmsnorm(out=)", "--no-start"],
    ],
    ids=lambda command: command[0],
)
def test_benchmarks_run_beside_themselves(command: list[str], tmp_path: Path) -> None:
    """Those with peers on the CPU target, this very tree being its own peer: no cell is empty, nothing fails, and the
    file holds what was printed."""
    script, *arguments = command
    wanted = ["--peer", str(ROOT), "--json", str(tmp_path), "--commit", "0123abc"]
    done = run(str(ROOT / "benchmarks" / script), *arguments, *wanted)
    assert done.returncode == 0, done.stderr
    header, *rows = table(done.stdout)
    column = next(index for index, name in enumerate(header) if "peer" in name)
    assert rows and all(float(row[column]) > 0 for row in rows), done.stdout
    assert "Error" not in done.stdout
    (one,) = results.read(next(tmp_path.iterdir())).runs
    cases = [case for measured in one.tables.values() for case in measured.cases.values()]
    assert cases and all(case.figure and any(name.startswith("peer") for name in case.peers) for case in cases)
    is_part = script not in ("bench_elementwise.py", "bench_gdn_decode.py")  # whose groups are tables of their own
    assert all(bool(measured.partial) == is_part for measured in one.tables.values())


def test_ranks_are_timed_beside_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one, as torchrun would start it."""
    script = str(ROOT / "benchmarks" / "bench_parallel.py")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    done = run(script, "--json", str(tmp_path), "--commit", "0123abc")
    assert done.returncode == 0, done.stderr
    (one,) = results.read(next(tmp_path.iterdir())).runs
    assert one.tables.keys() == {f"{kind}, 1 ranks" for kind in ("exchange", "decode", "latent", "ring")}
    assert all(case.figure for measured in one.tables.values() for case in measured.cases.values())


def test_more_ranks_are_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From what two wrote; as much as that where exchanges take no time."""
    free = {str(size): results.case(1e-9, {"all-to-all": 1e-9}, bytes=size) for size in (1 << 10, 1 << 30)}
    decode = {"decode, 1 x 1048576": results.case(500.0, {"one GPU": 960.0, "local": 480.0})}
    tables = {"exchange, 2 ranks": free, "decode, 2 ranks": decode}
    tables = {name: results.Table("us", cases) for name, cases in tables.items()}
    one = results.Run("parallel", "2026-11-30T12:00Z", "bench_parallel.py", None, {"torch": "2"}, tables)
    file = results.write(tmp_path, "NVIDIA H200", "0123abc", one)
    bench_parallel.predict(file, step_us=0.0)
    (_, row) = table(capsys.readouterr().out)
    assert row[:3] == ["decode, 1 x 1048576", "96.0%", "100%"] and float(row[3].strip("%")) >= 99


def test_compile_times_have_no_peers(tmp_path: Path) -> None:
    arguments = ["--config", "aot_configs/smoke.toml", "--limit", "1", "--json", str(tmp_path), "--commit", "0123abc"]
    done = run(str(ROOT / "benchmarks" / "bench_compile.py"), *arguments)
    assert done.returncode == 0, done.stderr
    (one,) = results.read(next(tmp_path.iterdir())).runs
    assert one.tables.keys() == {"compile sm_90a, fastest", "compile sm_90a, slowest"} and one.driver is None
