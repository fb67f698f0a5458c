# SPDX-License-Identifier: Apache-2.0
"""What to add to a set within a budget, and the page that shows it."""

from __future__ import annotations

import html.parser
import itertools
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from flashinfer import target
from flashinfer.aot import records, suggest
from flashinfer.aot.config import read_specs
from flashinfer.aot.estimate import Estimator
from flashinfer.aot.kernel_set import KernelSet
from flashinfer.aot.suggest import choose
from flashinfer.cli import _misses_page
from flashinfer.cli import main as run_cli
from flashinfer.jit.misses import Miss
from tests.aot.test_records import DAY, miss, write
from tests.kit import cpu_resolver, rmsnorm_spec

# --------------------------------------------------------------------------------------------------------------- choice


def best_of_all(values: list[float], weights: list[int], budget: int) -> float:
    chosen = itertools.chain.from_iterable(
        itertools.combinations(range(len(values)), n) for n in range(len(values) + 1)
    )
    return max(sum(values[i] for i in some) for some in chosen if sum(weights[i] for i in some) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_small_sets_are_chosen_exactly(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randrange(1, 12)
    weights = [draw.choice((0, 1, 7, draw.randrange(1, 100))) for _ in range(size)]
    # Values that go with the weights are the hard ones.
    values = [draw.choice((0.0, weight + draw.random(), draw.random() * 50)) for weight in weights]
    budget = draw.randrange(0, sum(weights) + 2)
    chosen, bound = choose(values, weights, budget)
    assert len(set(chosen)) == len(chosen)
    assert sum(weights[index] for index in chosen) <= budget
    assert sum(values[index] for index in chosen) == pytest.approx(best_of_all(values, weights, budget))
    assert bound == pytest.approx(best_of_all(values, weights, budget)), "and it is known to be the best"


def test_value_per_byte_alone_is_not_enough() -> None:
    assert choose([10.0, 9.0, 9.0], [6, 5, 5], 10) == ([1, 2], 18.0)


@pytest.mark.parametrize("seed", range(10))
def test_large_sets_have_a_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    weights = [draw.randrange(1000, 1100) for _ in range(60)]
    values = [weight + draw.random() for weight in weights]
    best = sum(values[index] for index in choose(values, weights, 20500)[0])
    monkeypatch.setattr(suggest, "_MAX_STATES", 3)
    chosen, bound = choose(values, weights, 20500)
    value = sum(values[index] for index in chosen)
    assert value <= best * (1 + 1e-9) and best <= bound * (1 + 1e-9)
    assert bound <= 1.06 * value, "a bound that says something"


@pytest.mark.parametrize(
    ("values", "weights", "budget"), [([], [], 10), ([1.0], [11], 10), ([0.0], [1], 10), ([1.0], [1], 0)]
)
def test_nothing_to_choose(values: list[float], weights: list[int], budget: int) -> None:
    assert choose(values, weights, budget) == ([], 0.0)


# ---------------------------------------------------------------------------------------------------------- candidates


def suggestion(tmp_path: Path, *misses: Miss, budget: int = 10**9, names: tuple[str, ...] = (), **how: Any) -> Any:
    summary = records.summarize([write(tmp_path / "records.jsonl", *misses)])
    return suggest.suggest(summary, budget, names, **how)


def test_a_row_is_paid_for_on_every_target_and_saves_on_all_that_run_it(tmp_path: Path) -> None:
    found = suggestion(
        tmp_path,
        miss(64, "sm_80", seconds=1.0, bytes=1000),
        miss(64, "sm_86", seconds=2.0, bytes=1200, process="b-1-1"),
        miss(64, "sm_90a", seconds=4.0, bytes=5000, process="c-1-1"),
        names=("sm_80", "sm_90a"),
    )
    (one,) = found.chosen
    assert (one.seconds, one.bytes, one.is_estimate) == (7.0, 6000, False)
    assert len(one.processes) == 3 and found.processes_without_misses == 3
    assert suggestion(tmp_path, miss(64, "sm_90a"), names=("sm_80",)).chosen == []


def test_sizes_are_recorded_cached_or_estimated(tmp_path: Path) -> None:
    resolver = cpu_resolver(tmp_path / "cache")
    resolver.load(rmsnorm_spec(128))
    (machine_code,) = (tmp_path / "cache" / "jit").glob("*/kernel.so")
    found = suggestion(
        tmp_path,
        miss(64, bytes=1000),
        miss(128, bytes=0, resolved_by="failed"),
        miss(256, bytes=0, resolved_by="failed"),
        cache=tmp_path / "cache" / "jit",
    )
    sizes = {one.spec["args"]["hidden_size"]: (one.bytes, one.is_estimate) for one in found.all}
    cached = machine_code.stat().st_size
    estimated = Estimator().of(rmsnorm_spec(256)).bytes
    assert sizes == {64: (1000, False), 128: (cached, False), 256: (estimated, True)}


def test_what_another_step_mends_does_not_count(tmp_path: Path) -> None:
    core = next(spec for spec in read_specs(["core"], [target.host()]) if spec.family == "rmsnorm")
    absent = "flashinfer_aot is not installed"
    fleet = (
        miss(64, reason=absent, seconds=1.0),
        miss(spec=core.to_dict(), name=core.name, reason=absent, seconds=2.0),
        miss(72, reason="digest differs (built from other sources)", seconds=4.0),
        miss(80, reason="not in registry", seconds=8.0, process="b-1-1"),
        miss(80, reason="AOT is disabled (FLASHINFER_DISABLE_AOT)", seconds=16.0),
    )
    found = suggestion(tmp_path, *fleet)
    assert sorted(one.seconds for one in found.chosen) == [1.0, 8.0] and found.unaffected == 22.0
    assert found.processes_without_misses == 0, "b-1-1 lacked 80 for one reason, but others may come with it"
    assert suggestion(tmp_path, *fleet, every_reason=True).seconds == 31.0


def test_kernels_of_another_version_are_left_out(tmp_path: Path) -> None:
    strange = miss(64, spec={"family": "of_later", "args": {}, "target": "sm_90a"}, name="of_later")
    found = suggestion(tmp_path, strange, miss(64))
    assert len(found.chosen) == 1 and found.unknown == 1


def test_processes_can_count_instead_of_seconds(tmp_path: Path) -> None:
    fleet = [
        miss(64, seconds=9.0),
        *(miss(128, seconds=0.0, process=f"{n}-1-1", resolved_by="failed") for n in range(3)),
    ]
    (by_seconds,) = suggestion(tmp_path, *fleet, budget=1000).chosen
    found = suggestion(tmp_path, *fleet, budget=1000, by_processes=True)
    assert by_seconds.seconds == 9.0 and found.value == 3.0 == found.bound
    assert [one.spec["args"]["hidden_size"] for one in found.chosen] == [128] and found.processes_without_misses == 3


def test_a_suggestion_is_what_a_build_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "cache"))
    for hidden_size in (64, 72, 80):
        cpu_resolver(tmp_path / "cache").load(rmsnorm_spec(hidden_size))
    size = max(file.stat().st_size for file in (tmp_path / "cache" / "jit").glob("*/kernel.so"))
    monkeypatch.chdir(tmp_path)
    assert run_cli(["misses", "suggest", "--budget", str(2 * size), "--out", "mine.toml", "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^2 kernels of 3, ", out, re.MULTILINE)
    assert "no choice within the budget saves more seconds" in out
    assert "0 of 1 process would miss nothing" in out
    (command,) = re.findall(r"^Next: flashinfer (.*)$", out, re.MULTILINE)
    assert run_cli(shlex.split(command)) == 0
    built = KernelSet(tmp_path / "my_kernels").held.values()
    assert len(built) == 2 and sum(one.entry.bytes for one in built) <= 2 * size
    capsys.readouterr()
    assert run_cli(["misses", "suggest", "--budget", "5"]) == 0, "MB were meant"
    assert re.search(r"^# nothing fits the budget: the smallest takes \d+\.\d KiB$", capsys.readouterr().out, re.M)
    assert run_cli(["misses", "suggest", "--budget", "1M"]) == 0
    rows = capsys.readouterr().out
    assert f"\n# build: flashinfer aot build --config FILE --target {target.host()} --out my_kernels\n" in rows
    assert re.search(r"^# [\d.]+ s of 1 process, \d+\.\d KiB; 0.0 % remain then$", rows, re.MULTILINE)
    (tmp_path / "all.toml").write_text(rows)
    assert len(read_specs(["all.toml"], [target.host()])) == 3


def test_nothing_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["misses", "suggest", "--budget", "1M", str(tmp_path)]) == 2
    assert "nothing to suggest from" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- page


class Page(html.parser.HTMLParser):
    """Checks that tags are closed; keeps text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(tmp_path: Path, *misses: Miss, budget: int | None = None) -> Page:
    summary = records.summarize([write(tmp_path / "records.jsonl", *misses)])
    text = _misses_page.page(summary, suggest.suggest(summary, budget or 0, every_reason=True), budget)
    assert not re.search(r"\b(nan|inf)\b", text.lower())
    assert not re.search(r"https?:|src=|@import|url\(", text), "nothing from elsewhere"
    return Page(text)


def test_the_page_has_every_chart(tmp_path: Path) -> None:
    fleet = [
        miss(8 * number, seconds=float(number), bytes=100 * number, time=1.7e9 + number * DAY, compiled=number / 2)
        for number in range(1, 31)
    ]
    found = page(tmp_path, *fleet, budget=1000)
    for expected in ("465.0 s", "What to do", "by kernel", "and 10 more", "by reason", "saved by bytes", "suggested: "):
        assert expected in found.text, expected
    assert sum(tag == "svg" for tag, _ in found.tags) == 2
    assert "A column is a day" in found.text and sum(tag == "rect" for tag, _ in found.tags) == 30
    (curve,) = [attributes["points"] for tag, attributes in found.tags if tag == "polyline"]
    assert curve is not None
    points = [tuple(map(float, point.split(","))) for point in curve.split()]
    assert (
        len(points) == 31
        and points == sorted(points)
        and [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    )


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    spec = {**rmsnorm_spec(64).to_dict(), "target": evil}
    found = page(tmp_path, miss(64, reason=evil, caller=evil, model=evil, name=evil, spec=spec), budget=10**6)
    assert "script" not in {tag for tag, _ in found.tags}
    assert evil in found.text


@pytest.mark.parametrize(
    "fleet",
    [[miss(64, seconds=0.0)], [miss(64, time=0.0), miss(64, time=9e11, process="b-1-1")], [miss(64, bytes=0)], []],
    ids=["no seconds", "a wrong clock", "no size", "nothing"],
)
def test_pages_of_odd_fleets(fleet: list[Miss], tmp_path: Path) -> None:
    found = page(tmp_path, *fleet, budget=10**6)
    assert sum(tag == "rect" for tag, _ in found.tags) <= 96
    assert json.dumps(found.text)
