# SPDX-License-Identifier: Apache-2.0
"""Miss records of a fleet: read line by line, summed up, compacted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flashinfer import target
from flashinfer.aot import advice, records
from flashinfer.aot.config import read_specs
from flashinfer.errors import FlashInferError
from flashinfer.jit.misses import Miss
from tests.kit import ROOT, rmsnorm_spec

DAY = 86400.0


def miss(hidden_size: int = 64, on: str | None = None, **changes: object) -> Miss:
    spec = rmsnorm_spec(hidden_size, on)
    plain = {
        "spec": spec.to_dict(),
        "name": spec.name,
        "reason": "not in registry",
        "resolved_by": "jit-compile",
        "seconds": 0.25,
        "bytes": 1000,
        "caller": "serve.py:12",
        "time": 1.0,
        "process": "host-1-1",
        "version": "0.1.0",
    }
    return Miss(**{**plain, **changes})  # type: ignore[arg-type]


def write(file: Path, *misses: Miss) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in misses))
    return file


def said(*paths: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """All that a report can tell of the kernels."""
    summary = records.summarize(paths, since)
    assert summary.broken == 0
    return [tally.as_json() for tally in summary.kernels]


# -------------------------------------------------------------------------------------------------------------- reading


def test_broken_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    good = json.dumps(asdict(miss()))
    later_version = json.dumps({**asdict(miss(128)), "field of a later version": 1})
    broken = [
        good[: len(good) // 2],
        good[:-1],
        good + "}",
        "",
        "null",
        "[]",
        '{"spec": {}}',
        json.dumps({**asdict(miss()), "seconds": "long"}),
        json.dumps({**asdict(miss()), "seconds": float("nan")}),
        json.dumps({**asdict(miss()), "seconds": -1}),
        json.dumps({**asdict(miss()), "reason": ["not", "a", "text"]}),
        json.dumps({**asdict(miss()), "process": 7}),
        json.dumps({**asdict(miss()), "spec": {"family": "rmsnorm", "args": 1, "target": "x86-64"}, "name": "other"}),
        json.dumps({**asdict(miss()), "name": ["rmsnorm"]}),
        "[" * 100000,
        "\x00\x00\x00",
    ]
    (tmp_path / "host-1-1.jsonl").write_text("\n".join([good, *broken, later_version]) + "\n")
    (tmp_path / "host-2-1.jsonl").write_bytes(b"\xff\xfe\n" + good.encode())
    rows = records.Rows([tmp_path])
    found = [row["name"] for row, _ in rows]
    assert found == [miss().name, miss(128).name, miss().name]
    assert rows.broken == len(broken) + 1


def test_a_file_that_ends_in_the_middle_of_a_record_costs_no_other(tmp_path: Path) -> None:
    """Files merge by concatenation, also that of a process that was killed."""
    text = "".join(json.dumps(asdict(miss(size))) for size in (64, 128))
    cut = [text[:end] for end in (1, len(text) // 4, len(text) // 2, len(text) - 1)]
    (tmp_path / "merged.jsonl").write_text("".join(part + json.dumps(asdict(miss(192))) + "\n" for part in cut))
    rows = records.Rows([tmp_path])
    assert [row["name"] for row, _ in rows] == [miss(192).name] * len(cut) and rows.broken == len(cut)


@pytest.mark.parametrize("order", [sorted, lambda keys: sorted(keys, reverse=True)])
def test_lines_of_any_order_of_fields_say_the_same(order: Callable[[Any], list[str]], tmp_path: Path) -> None:
    """Half of a line is decoded once where fields come as they are written; that must not show."""
    written = [miss(64), miss(64, process="b-1-1"), miss(128, reason='a "reason": , "reason": of its own')]
    as_written = said(write(tmp_path / "a.jsonl", *written))
    lines = [json.dumps({key: asdict(each)[key] for key in order(asdict(each))}) for each in written]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert said(tmp_path / "b.jsonl") == as_written
    assert as_written[1]["reasons"] == ['a "reason": , "reason": of its own']


def test_costliest_first_over_processes_and_machines(tmp_path: Path) -> None:
    fleet = [
        miss(64, seconds=0.5, process="a-1-1"),
        miss(64, seconds=0.25, process="b-7-2", reason="version 0.0.9 ≠ 0.1.0", resolved_by="jit-cache"),
        miss(128, seconds=0.6, process="a-1-1"),
        miss(256, seconds=0.1, process="c-1-1"),
        miss(64, seconds=0.1, process="a-1-1", resolved_by="failed"),
        miss(256, seconds=0.1, process="c-1-1", resolved_by="failed"),
    ]
    summary = records.summarize([write(tmp_path / "fleet.jsonl", *fleet)])
    first, second, third = summary.kernels
    assert [tally.spec["args"]["hidden_size"] for tally in (first, second, third)] == [64, 128, 256]
    assert first.seconds == pytest.approx(0.85) and first.records == 3
    assert first.as_json()["reasons"] == ["not in registry", "version 0.0.9 ≠ 0.1.0"]
    assert first.as_json()["resolved_by"] == ["jit-compile", "jit-cache", "failed"]
    assert [len(tally.processes) for tally in summary.kernels] == [2, 1, 1]
    assert len(summary.processes) == 3 and summary.seconds == pytest.approx(1.65)


def test_what_is_older_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", miss(64, time=100.0), miss(128, time=200.0))
    assert [kernel["name"] for kernel in said(file, since=150.0)] == [miss(128).name]


def test_a_process_is_counted_once_however_its_records_lie() -> None:
    distinct, names = records.Distinct(), [f"host-{number}-1" for number in range(500)]
    for _ in range(3):
        for name in names:
            distinct.add((records.process_key(name),))
    distinct.add([records.process_key(name) for name in names])
    assert len(distinct) == 500
    assert all(0 <= key < 2**52 for key in distinct.as_set()), "readers of JSON keep such numbers"


def test_names_without_end_do_not_fill_the_memory(tmp_path: Path) -> None:
    """As of files that a compiler of Python writes anew in every process."""
    fleet = [miss(caller=f"/tmp/{number}.py:1", process=f"{number}-1-1", seconds=1.0) for number in range(3000)]
    (kernel,) = records.summarize([write(tmp_path / "a.jsonl", *fleet)]).kernels
    assert len(kernel.callers) <= records._MAX_NAMES + 1
    assert kernel.callers["(others)"] == 2000.0 and kernel.seconds == 3000.0


def test_memory_does_not_grow_with_records(tmp_path: Path) -> None:
    """100,000 records of 5,000 processes, 50 MB of text."""
    lines = [json.dumps(asdict(miss(64 * (1 + number), process="PROCESS"))) for number in range(20)]
    with open(tmp_path / "a.jsonl", "w") as file:
        for process in range(5000):
            file.writelines(line.replace("PROCESS", f"host-{process}-1") + "\n" for line in lines)
    code = """
import sys, tracemalloc
from pathlib import Path
from flashinfer.aot import advice, records
tracemalloc.start()
summary = records.summarize([Path(sys.argv[1])])
print(len(summary.kernels), len(summary.processes), tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    num_kernels, num_processes, peak = map(int, done.stdout.split())
    assert (num_kernels, num_processes) == (20, 5000)
    assert peak < 6e6, "8 bytes for each pair of kernel and process, a set at a time of the processes of one kernel"


def test_records_of_an_earlier_version(tmp_path: Path) -> None:
    """Which knew no model, and did not tell waiting from compiling."""
    lines = [asdict(miss()), asdict(miss(process="b-1-1", resolved_by="jit-cache"))]
    for line in lines:
        for name in ("model", "compiled", "waited"):
            del line[name]
    (tmp_path / "old.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (kernel,) = records.summarize([tmp_path / "old.jsonl"]).kernels
    assert (kernel.seconds, kernel.compiled, kernel.waited) == (0.5, 0.25, 0.0)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("model", {"llama/decode": (3.0, 2, 2), "": (1.5, 1, 1)}),
        ("caller", {"b.py:2": (2.5, 2, 3), "a.py:1": (2.0, 1, 1)}),
        ("target", {target.host(): (2.5, 1, 2), "sm_90a": (2.0, 1, 1)}),
        ("family", {"rmsnorm": (4.5, 2, 3)}),
    ],
)
def test_sums_by_something_else(by: str, expected: dict[str, tuple[float, int, int]], tmp_path: Path) -> None:
    fleet = [
        miss(64, seconds=1.0, process="p", caller="b.py:2", model="llama/decode"),
        miss(64, "sm_90a", seconds=2.0, process="q", caller="a.py:1", model="llama/decode"),
        miss(128, seconds=1.5, process="p", caller="b.py:2"),
        miss(64, "sm_90a", seconds=0.0, process="q", caller="b.py:2", model="llama/decode"),
    ]
    groups = records.summarize([write(tmp_path / "a.jsonl", *fleet)], by=by).groups
    found = {group.name: (group.seconds, len(group.processes), len(group.kernels)) for group in groups}
    assert list(found.items()) == list(expected.items())


# -------------------------------------------------------------------------------------------------------------- advice


def tally(spec_of: Miss, **reasons: float) -> records.Tally:
    found = records.Tally(spec_of.name, spec_of.spec)
    found.seconds = sum(reasons.values())
    found.reasons = dict(reasons)
    return found


def test_every_reason_that_the_documentation_knows_has_a_step_of_its_own() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    section = page.partition("REASON, and the next step:")[2].partition("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    reasons = [reason for cell in cells for reason in re.findall("`(.*?)`", cell)]
    assert len(reasons) >= 8
    wanted = {reason for reason in reasons if reason.startswith(("not in registry", "no machine code"))}
    assert {reason for reason in reasons if advice.next_step(reason) == advice.ADD} == wanted


def test_steps_come_by_seconds() -> None:
    both = tally(miss(64), **{"not in registry": 1.0, "flashinfer_aot is not installed": 5.0})
    stale = tally(
        miss(128), **{"not in registry; version 0.0.9 ≠ 0.1.0": 2.0, "digest differs (built from other sources)": 1.5}
    )
    first, second, third = advice.steps([both, stale])
    assert (first.what, first.seconds, first.kernels) == (advice.INSTALL, 5.0, [both])
    assert second.what.startswith("pip install 'flashinfer-aot==") and second.kernels == [stale]
    assert second.reasons[0].startswith("not in registry; version") and second.seconds == 3.5
    assert (third.what, third.seconds) == (advice.ADD, 1.0)


def test_what_the_core_set_has() -> None:
    known = read_specs(["core"], ["sm_90a"])[0]
    held = records.Tally(known.name, known.to_dict())
    other, unknown = tally(miss(72, "sm_90a")), tally(miss(64, "sm_90a"))
    unknown.spec = {**unknown.spec, "target": "sm_of_later"}
    assert advice.in_core([other, held, unknown]) == [held]


# ----------------------------------------------------------------------------------------------------------- compacting


@pytest.fixture(params=[".jsonl", ".parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == ".parquet":
        pytest.importorskip("duckdb", reason="needs flashinfer[parquet]")
    return str(request.param)


def fleet(folder: Path, first_process: int = 0) -> Path:
    for process in range(first_process, first_process + 20):
        name = f"host-{process}-1"
        write(
            folder / f"{name}.jsonl",
            miss(64, process=name, seconds=0.5 + process, time=1000.0 + process),
            miss(64, on="sm_90a", process=name, reason="version 0.0.9 ≠ 0.1.0", time=1000.0),
            miss(128, process=name, time=(process % 3) * DAY, resolved_by="jit-cache", bytes=process),
            miss(256, process=name, caller=f"m{process % 2}.py:1"),
        )
    return folder


def test_a_compacted_fleet_says_the_same(suffix: str, tmp_path: Path) -> None:
    machines, out = fleet(tmp_path / "machines"), tmp_path / f"fleet{suffix}"
    done = records.compact([machines], out)
    assert (done.records, done.rows, done.broken) == (80, 1 + 1 + 3 + 2, 0)
    assert said(out) == said(machines)
    assert len(records.summarize([out]).processes) == 20
    assert out.stat().st_size < done.bytes_read / 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert [kernel["name"] for kernel in said(out, since=DAY)] == [miss(128).name], "as old as its last record"


def test_compacting_again_adds(suffix: str, tmp_path: Path) -> None:
    """Processes that are in both are counted once."""
    out = tmp_path / f"fleet{suffix}"
    records.compact([fleet(tmp_path / "monday")], out)
    everything = [fleet(tmp_path / "monday"), fleet(tmp_path / "tuesday", first_process=10)]
    done = records.compact([out, everything[1]], out)
    assert done.records == 160
    assert said(out) == said(*everything)
    assert len(records.summarize([out]).processes) == 30


def test_a_compacted_fleet_is_input_of_the_build(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"fleet{suffix}"
    records.compact([fleet(tmp_path / "machines")], out)
    specs = read_specs([], [target.host()], [out])
    assert specs == read_specs([], [target.host()], [tmp_path / "machines"]) and len(specs) == 3


def test_a_failed_compacting_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "fleet.jsonl", miss(64))
    before = out.read_text()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(records, "_write_jsonl", full)
    with pytest.raises(OSError, match="no space"):
        records.compact([fleet(tmp_path / "machines")], out)
    assert out.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.jsonl", "machines"]


def test_parquet_without_duckdb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(FlashInferError, match=r'pip install "flashinfer\[parquet\]", or use \.jsonl'):
        records.compact([write(tmp_path / "a.jsonl", miss())], tmp_path / "fleet.parquet")


def test_another_parquet_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="needs flashinfer[parquet]")
    (tmp_path / "odd.parquet").write_text("no Parquet")
    with pytest.raises(FlashInferError, match=r"odd.parquet holds no rows of `misses compact`: .*") as error:
        records.summarize([tmp_path / "odd.parquet"])
    assert "\n" not in str(error.value)
