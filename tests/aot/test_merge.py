# SPDX-License-Identifier: Apache-2.0
"""Joining sets: what several machines built is what one would have, to the byte; contradictions are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.aot import merge, worker
from flashinfer.aot.kernel_set import KernelSet
from flashinfer.jit.stores import Registry
from tests.aot.kit import (
    HOST,
    OTHER,
    artifacts,
    assert_sound,
    build_set,
    change_entries,
    change_registry,
    copy_set,
    registry_of,
    rmsnorm_rows,
    run_cli,
    tree,
    write_config,
)


@pytest.fixture
def other_copy(wide_set: Path, tmp_path: Path) -> Path:
    """The part of `wide_set` that `host_copy` is not."""
    out = copy_set(wide_set, tmp_path / "other")
    assert build_set(wide_set.parent / "config.toml", out, OTHER, exact=True).num_compiled == 0
    return out


def packaged(root: Path) -> dict[str, bytes | None]:
    """What of a set is packaged: its registry and machine code, and nothing of how they were made."""
    return {name: content for name, content in tree(root).items() if name.startswith(("registry", "kernels"))}


def merged(out: Path, *sources: Path) -> int:
    return run_cli("aot", "merge", *sources, "--out", out)


def test_shards_merged_are_what_one_machine_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More shards than kernels, of which some hold nothing."""
    options = ("--config", "smoke", "--target", HOST, "--exact", "--out")
    assert run_cli("aot", "build", *options, tmp_path / "one") == 0
    shards = [tmp_path / f"shard-{index}" for index in range(1, 6)]
    for index, shard in enumerate(shards, 1):
        assert run_cli("aot", "build", *options, shard, "--shard", f"{index}/5") == 0
    held = [len(Registry(shard).entries) for shard in shards]
    assert sorted(held) == [0, 1, 1, 1, 1]
    assert merged(tmp_path / "set", *shards) == 0
    assert packaged(tmp_path / "set") == packaged(tmp_path / "one")
    assert_sound(tmp_path / "set")
    capsys.readouterr()
    assert run_cli("aot", "build", *options, tmp_path / "set") == 0
    assert "4 up to date, 0 to compile" in capsys.readouterr().out


def test_targets_merged_are_what_one_machine_builds(
    host_copy: Path, other_copy: Path, wide_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(host_copy), tree(other_copy)
    for number, sources in enumerate([(host_copy, other_copy), (other_copy, host_copy), (other_copy, wide_set)]):
        assert merged(tmp_path / str(number), *sources) == 0
        assert packaged(tmp_path / str(number)) == packaged(wide_set)
    assert "2 kernels of" in capsys.readouterr().out
    assert (tree(host_copy), tree(other_copy)) == before, "sources are read alone"


def test_a_set_may_be_merged_into(host_copy: Path, other_copy: Path, wide_set: Path) -> None:
    assert merged(host_copy, other_copy, host_copy) == 0
    assert packaged(host_copy) == packaged(wide_set)
    before = tree(host_copy)
    assert merged(host_copy, other_copy) == 0
    assert tree(host_copy) == before, "nothing is new the second time"


def test_what_builds_took_is_kept(host_copy: Path, other_copy: Path, tmp_path: Path) -> None:
    """For estimates of the next build."""
    assert merged(tmp_path / "joint", host_copy, other_copy) == 0
    for source in (host_copy, other_copy):
        for key, built in KernelSet(source).held.items():
            assert built.seconds > 0
            assert KernelSet(tmp_path / "joint").held[key] == built


# ------------------------------------------------------------------------------------------------------------ conflicts


def _compiler(root: Path) -> None:
    change_entries(root, compiler="g++-99.0.0")


def _version(root: Path) -> None:
    change_registry(root, version="0.0.1")


def _digest(root: Path) -> None:
    change_entries(root, digest="another")


def _code(root: Path) -> None:
    first, second = registry_of(root)["kernels"]
    exchanged = ("file", "sha256", "bytes")
    change_registry(
        root, kernels=[{**first, **{name: second[name] for name in exchanged}}, second]
    )  # whole, but of another kernel


def _damaged(root: Path) -> None:
    artifacts(root)[0].write_bytes(b"damaged")


def _lost(root: Path) -> None:
    artifacts(root)[0].unlink()


def _outside(root: Path) -> None:
    change_entries(root, file="../outside.so")


def _no_registry(root: Path) -> None:
    (root / "registry.json").unlink()


def _unreadable(root: Path) -> None:
    (root / "registry.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_compiler, f"{HOST}: {{a}} was compiled by {{compiler}}, {{b}} was compiled by g++-99.0.0"),
        (_version, "{b} is of version 0.0.1, {a} of "),
        (_digest, "differs between {a} and {b}: digest"),
        (_code, "differs between {a} and {b}: file, sha256"),
        (_damaged, "has 7 bytes; the registry says"),
        (_lost, "is unreadable: No such file"),
        (_outside, "{b}: ../outside.so lies outside the folder of the registry"),
        (_no_registry, "{b} holds no registry.json; expected the folder of a set that was built"),
        (_unreadable, "the registry in {b} is not usable"),
    ],
)
def test_conflicts_are_errors(
    spoil: Callable[[Path], None], message: str, host_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_set(host_copy, tmp_path / "b")
    spoil(other)
    assert merged(tmp_path / "joint", host_copy, other) == 1
    compiler = registry_of(host_copy)["kernels"][0]["compiler"]
    error = capsys.readouterr().err
    assert message.format(a=host_copy, b=other, compiler=compiler) in error, error
    assert not (tmp_path / "joint").exists()
    if spoil not in (_damaged, _lost):  # what lies in the set itself is mended, not refused
        before = tree(other)
        assert merged(other, host_copy) == 1 or spoil in (_no_registry, _outside)
        assert spoil in (_no_registry, _outside) or tree(other) == before


def test_damage_of_the_set_itself_is_mended(host_copy: Path, tmp_path: Path, host_set: Path) -> None:
    _damaged(host_copy)
    assert merged(host_copy, host_set) == 0
    assert packaged(host_copy) == packaged(host_set)


def test_many_conflicts_are_counted(tmp_path: Path, host_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy_set(host_copy, tmp_path / "b")
    for root in (host_copy, other):
        one = registry_of(root)["kernels"][0]
        digest = {"digest": root.name}
        change_registry(root, kernels=[{**one, **digest, "name": f"{one['name']}{number}"} for number in range(15)])
    assert merged(tmp_path / "joint", host_copy, other) == 1
    error = capsys.readouterr().err
    assert error.count("differs between") == 10 and "... and 5 more" in error


def test_nothing_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merged(tmp_path / "joint", tmp_path / "joint") == 1
    assert "holds no set" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_cli("aot", "merge", "", "--out", tmp_path / "joint")


# --------------------------------------------------------------------------------------------------------------- faults


def test_a_merge_may_be_killed_half_way(
    host_copy: Path, other_copy: Path, wide_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "joint"
    real = merge._copy

    def killed(root: Path, *rest: object) -> None:
        if root == other_copy:
            raise KeyboardInterrupt
        real(root, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        merge.merge([host_copy, other_copy], out)
    assert not (out / "registry.json").exists() and len(artifacts(out)) == 2
    noted = {json.loads(line)["entry"]["file"] for line in (out / worker.RESULTS).read_text().splitlines()}
    assert {path.relative_to(out).as_posix() for path in artifacts(out)} <= noted, "no build takes them for strangers"
    monkeypatch.undo()
    assert merged(out, host_copy, other_copy) == 0
    assert packaged(out) == packaged(wide_set)
    assert_sound(out)


def test_other_kernels_of_the_set_stay(host_copy: Path, other_copy: Path) -> None:
    config = write_config(host_copy.parent, rmsnorm_rows(192), "more.toml")
    build_set(config, host_copy)
    assert merged(host_copy, other_copy) == 0
    assert len(Registry(host_copy).entries) == 5
    assert_sound(host_copy)
