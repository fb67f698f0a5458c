# SPDX-License-Identifier: Apache-2.0
"""What a build will take, before it begins: estimates, limits checked against them, and shards of equal length."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashinfer import families
from flashinfer.aot import build, estimate
from flashinfer.aot.config import read_specs
from flashinfer.aot.kernel_set import KernelSet
from flashinfer.jit.spec import KernelSpec
from tests.aot.kit import HOST, artifacts, command, copy_set, rmsnorm_rows, run_cli, tree, write_config
from tests.kit import rmsnorm_spec

CUDA = ("sm_80", "sm_90a")


@pytest.fixture(scope="module")
def core() -> list[KernelSpec]:
    return read_specs(["core"], CUDA)


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Measured: rmsnorm of hidden_size 64 and 4096 on two targets, and another family on one."""
    path = tmp_path / "figures.json"
    a, b = (rmsnorm_spec(size).name for size in (64, 4096))
    rows = {a: {"sm_80": [1, 100], "sm_90a": [2, 200]}, b: {"sm_90a": [4, 400]}, "gone-x=1": {"sm_80": [3, 300]}}
    path.write_text(json.dumps({"about": {}, "kernels": rows}))
    monkeypatch.setattr(estimate, "FIGURES", path)
    estimate.figures.cache_clear()
    yield path
    estimate.figures.cache_clear()


# ------------------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize(
    ("hidden_size", "target", "expected"),
    [
        (64, "sm_90a", (2, 200, "measured")),
        (4096, "sm_90a", (4, 400, "measured")),
        (128, "sm_90a", (2, 200, "alike")),  # two octaves are nearer than five
        (3584, "sm_90a", (4, 400, "alike")),
        (4096, "sm_80", (1, 100, "alike")),  # the target comes first: other machine code differs more
        (64, "sm_89", (1, 100, "alike")),  # of the same major version, though 8.9 is nearer to 9.0
        (64, "sm_100f", (2, 200, "alike")),
        (64, "sm_75", (1, 100, "alike")),
    ],
)
def test_the_most_alike_kernel_of_the_nearest_target(
    hidden_size: int, target: str, expected: tuple[float, int, str], figures: Path
) -> None:
    assert estimate.Estimator().of(rmsnorm_spec(hidden_size, on=target)) == estimate.Estimate(*expected)


def test_a_family_that_nobody_measured_is_guessed(figures: Path) -> None:
    spec = KernelSpec("strange", (("x", 1),), "sm_80")
    assert estimate.Estimator().of(spec) == estimate.Estimate(2, 200, "guess")


def test_the_last_build_here_knows_better(figures: Path, host_set: Path, tmp_path: Path) -> None:
    """Also of a kernel that has to be compiled anew."""
    config = host_set.parent / "config.toml"
    out = copy_set(host_set, tmp_path / "set")
    for path in artifacts(out):
        path.write_bytes(b"damaged")
    todo = build.plan(read_specs([config], [HOST]), out)
    held = {one.key: one for one in KernelSet(host_set).held.values()}
    assert len(todo.to_compile) == 2
    for spec, one in todo.forecast.estimates.items():
        before = held[spec.name, spec.target]
        assert one == estimate.Estimate(before.seconds, before.entry.bytes, "last build")


def test_core_is_measured(core: list[KernelSpec]) -> None:
    """`python benchmarks/bench_compile.py --figures SET` after a change of the core set; alike kernels do for
    some."""
    origins = dict(estimate.forecast(core, []).origins())
    assert origins["measured"] > 0.6 * len(core)


def test_figures_are_near_what_is_left_out() -> None:
    """Each kernel estimated as if it had not been measured: what a limit is checked against is not far off in all."""
    for target, by_family in estimate.figures().items():
        true = guessed = 0
        for by_name in by_family.values():
            measured = list(by_name.values())
            for index, (axes, one) in enumerate(measured if len(measured) > 1 else []):
                true += one.bytes
                guessed += estimate.most_alike(axes, [*measured[:index], *measured[index + 1 :]])[1].bytes
        assert abs(guessed / true - 1) < estimate.DOUBT, target


def test_figures_are_replaced_by_target(figures: Path, host_set: Path) -> None:
    estimate.write_figures(KernelSet(host_set).held.values(), {"commit": "abc"}, figures)
    data = json.loads(figures.read_text())
    assert data["about"] == {HOST: {"commit": "abc"}}
    assert data["kernels"]["gone-x=1"] == {"sm_80": [3, 300]}
    assert {HOST, "sm_80", "sm_90a"} == data["kernels"][rmsnorm_spec(64).name].keys()
    estimate.write_figures(list(KernelSet(host_set).held.values())[:1], {"commit": "def"}, figures)
    data = json.loads(figures.read_text())
    assert sum(HOST in row for row in data["kernels"].values()) == 1
    assert data["about"][HOST] == {"commit": "def"}


# ----------------------------------------------------------------------------------------------------- dry runs, limits


def test_a_dry_run_estimates_by_family_and_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "smoke", "--target", f"sm_90a,{HOST}", "--out", tmp_path / "set", "--dry-run")
    assert run_cli("aot", "build", *options) == 0
    out = capsys.readouterr().out
    assert re.search(r"8 to compile with \d+ jobs?, about \d+ s and \d+\.\d KiB \(\d+\.\d KiB in a wheel\)", out)
    for target in ("sm_90a", HOST):
        assert re.search(rf"^{re.escape(target)} +rmsnorm +0 +2 +~\d+\.\d +~\d+\.\d KiB$", out, re.MULTILINE)
    assert re.search(r"^~ estimates, seconds of a processor and bytes: .* measured", out, re.MULTILINE)


def test_what_is_there_is_no_estimate(host_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(host_copy.parent, rmsnorm_rows(64, 128), "same.toml")
    assert run_cli("aot", "build", *command(config, host_copy, "--dry-run")) == 0
    assert "~" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_limit_is_checked_before_anything_is_compiled(
    options: list[str], figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, rmsnorm_rows(64, 4096, 8192))
    arguments = ["--config", config, "--target", "sm_90a", "--out", tmp_path / "set", *options]
    assert run_cli("aot", "build", *arguments, "--max-bytes", "800") == 1
    error = capsys.readouterr().err
    assert "about 1000 bytes of machine code; --max-bytes allows 800" in error
    named = re.findall(r"^ +(\d+) bytes  rmsnorm-.*hidden_size=(\d+)-.* \(sm_90a\)$", error, re.MULTILINE)
    assert named == [("400", "8192"), ("400", "4096"), ("200", "64")], "the largest first"
    assert not list((tmp_path / "set").glob("registry.json")) and not list((tmp_path / "set").rglob("*.cubin"))


def test_a_limit_within_the_doubt_is_left_to_the_build(figures: Path, tmp_path: Path) -> None:
    todo = build.plan([rmsnorm_spec(64, on="sm_90a")], tmp_path / "set")
    build.check_forecast(todo, 180)
    with pytest.raises(build.SetTooLarge):
        build.check_forecast(todo, 179)


def test_what_is_too_large_in_the_end_names_the_largest_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "check_forecast", lambda *_: None)
    config = write_config(tmp_path, rmsnorm_rows(64))
    assert run_cli("aot", "build", *command(config, tmp_path / "set", "--max-bytes", "1K")) == 1
    assert re.search(rf"Largest are:\n +\d+ bytes  rmsnorm-\S+ \({re.escape(HOST)}\)", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_hold_every_kernel_once(count: int, core: list[KernelSpec]) -> None:
    shards = [estimate.shard(core, index, count) for index in range(1, count + 1)]
    assert sorted(spec for part in shards for spec in part) == sorted(core)


def test_shards_take_equally_long(core: list[KernelSpec]) -> None:
    estimator = estimate.Estimator()
    loads = [sum(estimator.of(spec).seconds for spec in estimate.shard(core, index, 8)) for index in range(1, 9)]
    assert max(loads) < 1.05 * min(loads), loads


def test_shards_do_not_depend_on_the_order_of_configs(core: list[KernelSpec]) -> None:
    shuffled = random.Random(0).sample([*core, *core[:50]], len(core) + 50)
    assert sorted(estimate.shard(shuffled, 2, 8)) == sorted(estimate.shard(core, 2, 8))


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", ""])
def test_what_is_no_shard(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "smoke", "--target", HOST, "--out", tmp_path / "set", f"--shard={text}")
    assert run_cli("aot", "build", *options) == 2
    assert f"--shard is {text!r}; expected I/N" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_shard_of_what_one_machine_holds_is_none(host_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(host_copy)
    assert run_cli("aot", "build", "--refresh", "--shard", "1/2", "--out", host_copy) == 2
    assert "--refresh is about what the set of one machine holds" in capsys.readouterr().err
    assert tree(host_copy) == before


def test_every_family_has_a_name_that_can_be_taken_apart() -> None:
    """Estimates compare names axis by axis."""
    families.register_all()
    for spec in read_specs(["core"], ["sm_90a", HOST]):
        axes = estimate._axes(spec.name)
        assert list(axes) == [axis for axis, _ in spec.args]
