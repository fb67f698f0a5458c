"""The benchmarks run, and measure another installation of flashinfer beside ours, over the same cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A benchmark of two cases, on flashinfer packages that say themselves how long they take.
BENCHMARK = """
import argparse
from common import print_failures, print_table, run
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
"""
OURS = """
__version__ = "1.0"
def microseconds(case, scale):
    return scale * {"small": 1.5, "large": 2.5}[case]
"""
PEER = """
__version__ = "0.7"
def microseconds(case, scale):
    if case == "large":
        raise ValueError("no kernel for large\\nand a second line")
    return scale * 10.0
"""


def run(*command: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def install(folder: Path, package: str, distribution: str = "") -> Path:
    (folder / "flashinfer").mkdir(parents=True)
    (folder / "flashinfer" / "__init__.py").write_text(package)
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
    return str(script), f"{install(tmp_path / 'ours', OURS)}{os.pathsep}{ROOT / 'benchmarks'}"


@pytest.mark.parametrize(("distribution", "label"), [("", "peer 0.7"), ("flashinfer_python", "upstream 0.7")])
def test_peer_columns(stub: tuple[str, str], tmp_path: Path, distribution: str, label: str) -> None:
    script, path = stub
    peer = install(tmp_path / "theirs", PEER, distribution)
    done = run(script, "--peer", str(peer), "--scale", "2", path=path)  # the peer gets the same arguments
    assert done.returncode == 0, done.stderr
    assert table(done.stdout) == [["case", "us", label], ["small", "3.00", "20.00"], ["large", "5.00", "-"]]
    assert f"- {label}, large: ValueError: no kernel for large\n" in done.stdout


def test_without_a_peer(stub: tuple[str, str]) -> None:
    done = run(stub[0], path=stub[1])
    assert table(done.stdout) == [["case", "us"], ["small", "1.50"], ["large", "2.50"]]


def test_an_empty_folder_is_no_peer(stub: tuple[str, str], tmp_path: Path) -> None:
    done = run(stub[0], "--peer", str(tmp_path), path=stub[1])
    assert done.returncode != 0
    assert "expected a folder that holds a package flashinfer" in done.stderr


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
    ],
    ids=lambda command: command[0],
)
def test_benchmarks_run_beside_themselves(command: list[str]) -> None:
    """Every benchmark on the CPU target, with this very tree as its own peer: no cell is empty, nothing fails."""
    script, *arguments = command
    done = run(str(ROOT / "benchmarks" / script), *arguments, "--peer", str(ROOT), path="")
    assert done.returncode == 0, done.stderr
    header, *rows = table(done.stdout)
    column = next(index for index, name in enumerate(header) if "peer" in name)
    assert rows and all(float(row[column]) > 0 for row in rows), done.stdout
    assert "Error" not in done.stdout
