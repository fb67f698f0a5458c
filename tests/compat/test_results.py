# SPDX-License-Identifier: Apache-2.0
"""Files of benchmark results: what is refused and how it is said, what a second run replaces, what the page takes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402
import dashboard  # noqa: E402
import results  # noqa: E402
from results import Case, Run, Table  # noqa: E402

GOOD: dict[str, Any] = {
    "format": 1,
    "device": "NVIDIA H200",
    "commit": "0123abc",
    "runs": [
        {
            "benchmark": "decode",
            "date": "2026-11-21T07:55Z",
            "command": "benchmarks/bench_decode.py",
            "driver": None,
            "versions": {"torch": "2.11.0"},
            "note": "",
            "tables": {
                "decode": {"unit": "us", "cases": {"1 x 8": {"figure": 5.0, "peers": {"SDPA": 8}, "bytes": 64}}}
            },
        }
    ],
}


def run(date: str, tables: dict[str, Table], benchmark: str = "decode") -> Run:
    return Run(benchmark, date, f"benchmarks/bench_{benchmark}.py", "580.1", {"torch": "2.11.0"}, tables)


def table(us: float | None, unit: str = "us", partial: str = "", **peers: float | None) -> Table:
    return Table(unit, {"1 x 8": Case(us, dict(peers), bytes=64)}, partial)


def stored(folder: Path, data: Any, name: str = "H200-0123abc.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_good_file(tmp_path: Path) -> None:
    read = results.read(stored(tmp_path, GOOD))
    assert read.device == "NVIDIA H200" and read.commit == "0123abc"
    assert read.runs[0].tables["decode"].cases["1 x 8"] == Case(5.0, {"SDPA": 8}, bytes=64)


# Where in the file, what is put there (`...`: nothing), and what the message names beside the file.
FAULTS: list[tuple[list[Any], Any, list[str]]] = [
    ([], [1], ["the file is [1]", "format", "runs"]),
    (["format"], 2, ["format is 2", "expected 1"]),
    (["format"], ..., ["the file lacks format"]),
    (["device"], "", ["device is ''", "expected text"]),
    (["commit"], "main", ["commit is 'main'", "hexadecimal"]),
    (["runs"], {}, ["runs is {}", "expected a list"]),
    (["runs", 0, "date"], "yesterday", ["runs[0].date is 'yesterday'", "2026-11-21T07:55Z"]),
    (["runs", 0, "driver"], 580, ["runs[0].driver is 580", "expected text"]),
    (["runs", 0, "note"], None, ["runs[0].note is None", "expected text"]),
    (["runs", 0, "remark"], "x", ["runs[0] has the unknown key remark", "note"]),
    (["runs", 0, "versions", "torch"], 2.11, ["runs[0].versions['torch'] is 2.11"]),
    (["runs", 0, "tables", "decode", "unit"], "hours", ["runs[0].tables['decode'].unit is 'hours'", "TFLOP/s"]),
    (["runs", 0, "tables", "decode", "cases"], {}, ["runs[0].tables['decode'].cases is empty"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "figure"], "5", ["cases['1 x 8'].figure is '5'", "null"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "figure"], -5, ["figure is -5", "positive"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "figure"], True, ["figure is True", "positive"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "figure"], ..., ["cases['1 x 8'] lacks figure"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "peers"], [8], ["peers is [8]", "expected an object"]),
    (["runs", 0, "tables", "decode", "cases", "1 x 8", "bytes"], 0, ["bytes is 0", "positive"]),
]


@pytest.mark.parametrize(("place", "value", "words"), FAULTS, ids=lambda part: str(part)[-40:])
def test_faults_are_named(tmp_path: Path, place: list[Any], value: Any, words: list[str]) -> None:
    data = copy.deepcopy(GOOD)
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    if not place:
        data = value
    elif value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = stored(tmp_path, data)
    with pytest.raises(results.ResultsError) as caught:
        results.read(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("text", ["", "{", "[NaN]", '{"format": Infinity}', "\x00"])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(results.ResultsError, match="not JSON"):
        results.read(stored(tmp_path, text))


def test_a_file_says_what_its_name_says(tmp_path: Path) -> None:
    with pytest.raises(results.ResultsError, match=r"expected H200-0123abc\.json"):
        results.read(stored(tmp_path, GOOD, "H100-0123abc.json"))


def test_a_table_is_in_one_run_alone(tmp_path: Path) -> None:
    with pytest.raises(results.ResultsError, match="'decode' is in 2 runs"):
        results.read(stored(tmp_path, {**GOOD, "runs": GOOD["runs"] * 2}))


def test_runs_of_a_commit_share_a_file(tmp_path: Path) -> None:
    """Other tables stay, with what their run says of them; a table that is measured again replaces the old one."""

    def write(*arguments: Any, **options: Any) -> Path:
        return results.write(tmp_path / "new", "NVIDIA H200", "0123abc", run(*arguments, **options))

    path = write("2026-11-21T07:00Z", {"decode": table(5.0), "decode host": table(6.0)})
    assert path == write("2026-11-21T08:00Z", {"prefill": table(300.0, "TFLOP/s")}, benchmark="prefill")
    assert path == write("2026-11-21T09:00Z", {"decode": table(4.0)})
    read = results.read(path)
    assert [(one.date[11:13], list(one.tables)) for one in read.runs] == [
        ("07", ["decode host"]),
        ("08", ["prefill"]),
        ("09", ["decode"]),
    ]
    assert read.runs[2].tables["decode"].cases["1 x 8"].figure == 4.0
    assert path.read_text().count('"1 x 8"') == len([line for line in path.read_text().splitlines() if "1 x 8" in line])


def test_nothing_is_written_over_a_damaged_file(tmp_path: Path) -> None:
    path = stored(tmp_path, "{")
    with pytest.raises(results.ResultsError, match="not JSON"):
        results.write(tmp_path, "NVIDIA H200", "0123abc", run("2026-11-21T07:00Z", {"decode": table(5.0)}))
    assert path.read_text() == "{"


def test_what_could_not_be_timed_is_null(tmp_path: Path) -> None:
    nan = float("nan")
    one = Table("us", {"a": results.case(nan, {"SDPA": 2.0}), "b": results.case(1.23456789, {"SDPA": nan})})
    path = results.write(tmp_path, "NVIDIA H200", "0123abc", run("2026-11-21T07:00Z", {"decode": one}))
    assert results.read(path).runs[0].tables["decode"].cases == {
        "a": Case(None, {"SDPA": 2.0}),
        "b": Case(1.2346, {"SDPA": None}),
    }


# ----------------------------------------------------------------------------------------------------------- dashboard


def files(folder: Path, *entries: tuple[str, str, Run]) -> Path:
    for device, commit, one in entries:
        results.write(folder, device, commit, one)
    return folder


def page_of(folder: Path) -> str:
    """That of the device that was measured last."""
    return dashboard.pages(compare.newest(results.read_all(folder)))["performance.md"]


def test_the_newest_of_each_device_and_table(tmp_path: Path) -> None:
    """By the date of the run, not by names; a table cut short by an option, or of a changed tree, is none."""
    folder = files(
        tmp_path,
        ("NVIDIA H100", "fffffff", run("2026-11-20T07:00Z", {"decode": table(7.0), "prefill": table(300, "TFLOP/s")})),
        ("NVIDIA H100", "aaaaaaa", run("2026-11-21T07:00Z", {"decode": table(6.0)})),
        ("NVIDIA H100", "bbbbbbb", run("2026-11-22T07:00Z", {"decode": table(1.0, partial="1 x 8")})),
        ("NVIDIA H100", "ccccccc-dirty", run("2026-11-22T07:00Z", {"decode": table(2.0)})),
        ("NVIDIA H200", "0000000", run("2026-11-23T07:00Z", {"decode": table(4.0)})),
    )
    found = compare.newest(results.read_all(folder))
    assert [(one.device, one.commit, one.table.cases["1 x 8"].figure) for one in found["decode"].values()] == [
        ("NVIDIA H200", "0000000", 4.0),
        ("NVIDIA H100", "aaaaaaa", 6.0),
    ]
    assert [one.commit for one in found["prefill"].values()] == ["fffffff"]


def test_ratios_and_where_it_is_slower(tmp_path: Path) -> None:
    """Of times the smaller is better, of rates the larger; a peer without a figure counts nowhere, an earlier state
    of ourselves is no peer of the page."""
    upstream = {"upstream 0.7.2": 10.0, "peer 0.1": 1.0, "SDPA": None}
    folder = files(
        tmp_path,
        ("NVIDIA H100", "aaaaaaa", run("2026-11-21T07:00Z", {"decode": table(5.0, **upstream)})),
        ("NVIDIA H100", "aaaaaaa", run("2026-11-21T07:00Z", {"prefill": table(5.0, "TFLOP/s", **upstream)})),
    )
    text = page_of(folder)
    assert "| Decode | upstream | **2.00×** (2.00× to 2.00×), slower in 0 of 1 |" in text
    assert "| Prefill and append | upstream | **0.50×** (0.50× to 0.50×), slower in 1 of 1 |" in text
    assert (
        "- **Prefill and append** beside upstream: H100 in 1 of 1: 0.50× at `1 × 8` (5.00 against 10.0 TFLOP/s)."
        in text
    )
    assert "| 1 × 8 | 5.00 | 0.00 | 2.00× | – |" in text
    assert "peer 0.1" not in text and "upstream 0.7.2" in text


def test_each_device_has_a_page(tmp_path: Path) -> None:
    """The first tells what the others' sum up to, and where they are; a page tells of the slower cases of its own."""
    one, other = table(7.0, SDPA=6.0), Table("us", {"2 x 8": Case(9.0, {"SDPA": 6.0}, bytes=64)})
    folder = files(
        tmp_path,
        ("NVIDIA H100 80GB HBM3", "aaaaaaa", run("2026-11-21T07:00Z", {"decode": one})),
        ("NVIDIA H200", "bbbbbbb", run("2026-11-22T07:00Z", {"decode": other})),
    )
    texts = dashboard.pages(compare.newest(results.read_all(folder)))
    assert list(texts) == ["performance.md", "performance/h100-80gb-hbm3.md"]
    first, second = texts.values()
    assert "| H200, µs | TB/s | × SDPA |" in first and "| 2 × 8 | 9.00 | 0.00 | 0.67× |" in first
    assert "| 1 × 8 |" not in first and "at `1 × 8`" not in first
    assert "| Decode | SDPA | **0.67×** (0.67× to 0.67×), slower in 1 of 1 | **0.86×** (0.86× to 0.86×), " in first
    assert "[H100 80GB HBM3](performance/h100-80gb-hbm3.md)" in first and "(notes/README.md)" in first
    assert "| 1 × 8 | 7.00 | 0.00 | 0.86× |" in second and "| 2 × 8 |" not in second and "bbbbbbb" not in second
    assert "(../notes/README.md)" in second and ".png" not in second


def test_parts_of_a_mixed_batch_are_no_peers(tmp_path: Path) -> None:
    one = table(5.0, **{"one behind the other": 6.0, "prefill": 2.0, "decode": 4.0})
    text = page_of(files(tmp_path, ("NVIDIA H200", "aaaaaaa", run("2026-11-21T07:00Z", {"mixed": one}))))
    assert "| Mixed batches | one behind the other | **1.20×**" in text and "× prefill" not in text


def test_the_page_keeps_to_its_length_with_four_devices(tmp_path: Path) -> None:
    """The committed results, told of four GPUs."""
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA A100"]
    for file in results.read_all():
        for number, name in enumerate(names):
            for one in file.runs:
                date = f"2027-01-0{number + 1}{one.date[10:]}"
                results.write(tmp_path, name, "0123abc", Run(**{**vars(one), "date": date}))
    texts = dashboard.pages(compare.newest(results.read_all(tmp_path)))
    assert len(texts) == 4 + 1 and texts["performance.md"].count("\n") <= 150
    assert all(name.removeprefix("NVIDIA ") in texts["performance.md"] for name in names)


def test_the_committed_page_is_what_the_results_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "dashboard.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").count("\n") <= 150


OTHER = "performance/h100-80gb-hbm3.md"


@pytest.mark.parametrize("stale", ["performance.md", OTHER, "performance/x1.md", "speedup.png", "decode.png"])
def test_check_finds_what_is_stale(tmp_path: Path, stale: str) -> None:
    (tmp_path / "performance").mkdir()
    for path in [*(ROOT / "docs").glob("*.*"), *(ROOT / "docs" / "performance").glob("*.md")]:
        (tmp_path / path.relative_to(ROOT / "docs")).write_bytes(path.read_bytes())
    path = tmp_path / stale
    path.touch()
    # In a plot: one digit of the digest it carries.
    digest = dashboard.digest_of(path)
    path.write_bytes(
        path.read_bytes().replace(digest.encode(), digest[::-1].encode()) if digest else b"# Performance\n"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "dashboard.py"), "--check", "--docs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("error:") == 1 and stale in done.stderr, done.stderr


def test_without_results_there_is_no_page(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "dashboard.py"),
        "--results",
        str(tmp_path),
        "--docs",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "--json" in done.stderr and not list(tmp_path.iterdir())
