# SPDX-License-Identifier: Apache-2.0
"""What a build does to a set that is there: it keeps what it was not told to remove, and says what it removes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer.aot import build, worker
from flashinfer.jit.stores import AotStore, Hit
from flashinfer.version import __version__
from tests.aot.kit import (
    BOTH,
    HOST,
    OTHER,
    artifacts,
    assert_sound,
    build_set,
    change_entries,
    change_registry,
    command,
    copy_set,
    failing_compiler,
    kernels_of,
    registry_of,
    rmsnorm_rows,
    run_cli,
    tree,
    write_config,
)
from tests.kit import mounted_tmpfs, read_only, rmsnorm_spec

ALL = BOTH | {(64, OTHER), (128, OTHER)}
OTHER_DIGEST = "0" * 64


# ----------------------------------------------------------------------------------------------------------- it is kept


def test_other_targets_are_kept(wide_copy: Path, rows: Callable[..., Path]) -> None:
    before = tree(wide_copy)
    report = build_set(rows(64), wide_copy, HOST)
    assert (report.num_compiled, report.removed) == (0, [])
    assert tree(wide_copy) == before


def test_other_configs_are_kept(host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(host_copy)
    assert run_cli("aot", "build", *command(rows(192), host_copy)) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 kernel: 0 up to date, 1 to compile") and "2 others kept" in out.splitlines()[0]
    assert kernels_of(host_copy) == BOTH | {(192, HOST)}
    after = tree(host_copy)
    assert {name: after[name] for name in before if name.startswith("kernels/")} == {
        name: content for name, content in before.items() if name.startswith("kernels/")
    }
    assert_sound(host_copy)


def test_a_set_without_notes_is_kept(host_copy: Path, rows: Callable[..., Path]) -> None:
    """As an installed companion is, or a set that was copied without them."""
    (host_copy / worker.RESULTS).unlink()
    assert build_set(rows(64), host_copy).num_compiled == 0
    assert build_set(rows(192), host_copy).num_compiled == 1
    assert kernels_of(host_copy) == BOTH | {(192, HOST)}
    assert_sound(host_copy)


def test_what_no_build_made_is_left_alone(wide_copy: Path, rows: Callable[..., Path]) -> None:
    for name in ("README", "kernels/notes.txt", f"kernels/{OTHER}/foreign.so", "kernels/mine/more/x"):
        (wide_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (wide_copy / name).write_text("of somebody else")
    foreign = {name: content for name, content in tree(wide_copy).items() if content == b"of somebody else"}
    assert len(foreign) == 4
    build_set(rows(128), wide_copy, exact=True)
    after = tree(wide_copy)
    assert {name: after.get(name) for name in foreign} == foreign
    assert kernels_of(wide_copy) == {(128, HOST)}


@pytest.mark.parametrize("name", ["../outside.so", "registry.json", "own.so", "kernels/../own.so"])
def test_a_registry_cannot_have_files_elsewhere_removed(name: str, tmp_path: Path, host_copy: Path) -> None:
    """It may have been made by anybody; nothing outside of kernels/ is a build's to remove."""
    for path in (host_copy.parent / "outside.so", host_copy / "own.so"):
        path.write_text("somebody's")
    first, second = registry_of(host_copy)["kernels"]
    change_registry(host_copy, kernels=[{**first, "file": name}, second])
    config = write_config(tmp_path, rmsnorm_rows(second["args"]["hidden_size"]))
    assert build_set(config, host_copy, exact=True).removed
    assert (host_copy.parent / "outside.so").exists() and (host_copy / "own.so").exists()
    assert registry_of(host_copy)["kernels"] == [second]


def test_a_failing_kernel_keeps_the_one_it_was_to_replace(
    tmp_path: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write_config(tmp_path, rmsnorm_rows(65, vec_size=1)), tmp_path / "set"
    build_set(config, out)
    before = tree(out / "kernels")
    change_entries(out, compiler="g++-of-yesterday")
    (out / worker.RESULTS).unlink()
    monkeypatch.setenv("FLASHINFER_CXX", str(failing_compiler(tmp_path, "exit 1")))
    assert run_cli("aot", "build", *command(config, out)) == 1
    assert tree(out / "kernels") == before
    assert registry_of(out)["kernels"][0]["compiler"] == "g++-of-yesterday"


# -------------------------------------------------------------------------------------------------------------- --exact


def test_exact_removes_and_lists(
    wide_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, argv = tree(wide_copy), command(rows(64, 192), wide_copy, "--exact")
    assert run_cli("aot", "build", *argv, "--dry-run") == 0
    announced = re.findall(r"^would remove: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert tree(wide_copy) == before

    assert run_cli("aot", "build", *argv) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^removed: (.*)$", out, re.MULTILINE) == announced
    gone = ALL - {(64, HOST)}
    assert set(announced) == {f"{rmsnorm_spec(size).name} ({target})" for size, target in gone}
    assert "1 compiled in" in out and out.rstrip().endswith("3 removed")
    assert kernels_of(wide_copy) == {(64, HOST), (192, HOST)}
    assert len(artifacts(wide_copy)) == 2 and not (wide_copy / "kernels" / OTHER).exists()
    assert_sound(wide_copy)


def test_exact_removes_nothing_where_kernels_fail(
    host_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken compiler would empty the set otherwise."""
    monkeypatch.setenv("FLASHINFER_CXX", str(failing_compiler(tmp_path, "exit 1")))
    config = write_config(tmp_path, rmsnorm_rows(65, 66, vec_size=1))
    assert run_cli("aot", "build", *command(config, host_copy, "--exact")) == 1
    out, err = capsys.readouterr()
    assert "nothing was removed, because kernels failed" in err and "removed:" not in out
    assert kernels_of(host_copy) == BOTH | {(66, HOST)}
    assert_sound(host_copy)


# ------------------------------------------------------------------------------------------ other versions and sources


def make_stale(root: Path, hidden_size: int, **changes: Any) -> None:
    """Have a kernel of the set be of other sources, and its notes be gone."""
    (root / worker.RESULTS).unlink(missing_ok=True)
    entries = registry_of(root)["kernels"]
    change = {"digest": OTHER_DIGEST, **changes}
    change_registry(
        root, kernels=[{**one, **change} if one["args"]["hidden_size"] == hidden_size else one for one in entries]
    )


def test_what_is_stale_and_kept_is_listed(
    host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_stale(host_copy, 128)
    for how in ([], ["--dry-run"]):
        assert run_cli("aot", "build", *command(rows(64), host_copy, *how)) == 0
        out = capsys.readouterr().out
        assert "kept, but never used by this version, 1; --refresh compiles what it can anew" in out
        assert f"  {rmsnorm_spec(128).name} ({HOST}): digest differs" in out
    assert kernels_of(host_copy) == BOTH


def test_damage_that_is_kept_is_listed_and_refreshed(
    host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = registry_of(host_copy)
    for path in artifacts(host_copy):
        path.unlink()
    assert run_cli("aot", "build", *command(rows(64), host_copy)) == 0
    assert f"{rmsnorm_spec(128).name} ({HOST}): is unreadable: No such file" in capsys.readouterr().out
    assert run_cli("aot", "build", "--refresh", "--out", host_copy) == 0
    assert "2 kernels: 1 up to date, 1 to compile" in capsys.readouterr().out
    assert registry_of(host_copy) == before
    assert_sound(host_copy)


def test_a_set_of_another_version_becomes_ours_when_all_of_it_is(host_copy: Path, rows: Callable[..., Path]) -> None:
    """Until then it is neither packaged as one of this version nor used without the warning."""
    make_stale(host_copy, 128)
    change_registry(host_copy, version="0.0.1")
    build_set(rows(64, 192), host_copy)
    assert registry_of(host_copy)["version"] == "0.0.1"
    assert isinstance(AotStore([host_copy]).find(rmsnorm_spec(192)), Hit)

    report = build.build([], host_copy, refresh=True)
    assert (report.num_compiled, len(report.built)) == (1, 3)
    assert registry_of(host_copy)["version"] == __version__
    assert_sound(host_copy)


def test_a_set_of_another_version_with_the_same_sources_becomes_ours(
    host_copy: Path, rows: Callable[..., Path]
) -> None:
    change_registry(host_copy, version="0.0.1")
    assert build_set(rows(64), host_copy).num_compiled == 0
    assert registry_of(host_copy)["version"] == __version__


def test_kernels_this_version_does_not_have(
    host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Refreshing keeps them, as another version may use them; refreshing exactly drops them."""
    make_stale(host_copy, 128, family="of_another_version", name="of_another_version-a=1")
    argv = ["aot", "build", "--refresh", "--out", str(host_copy)]
    assert run_cli(*argv) == 0
    assert f"of_another_version-a=1 ({HOST}): defines no function of_another_version" in capsys.readouterr().out
    assert len(registry_of(host_copy)["kernels"]) == 2
    assert run_cli(*argv, "--exact") == 0
    assert f"removed: of_another_version-a=1 ({HOST})" in capsys.readouterr().out
    assert kernels_of(host_copy) == {(64, HOST)}


# ---------------------------------------------------------------------------------------------------- unusable folders


def test_a_registry_that_cannot_be_read_stops_the_build(
    host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{", "[]", '{"format": 2, "version": "9", "kernels": []}'):
        (host_copy / "registry.json").write_text(text)
        before = tree(host_copy)
        for how in ([], ["--exact"], ["--dry-run"]):
            assert run_cli("aot", "build", *command(rows(64), host_copy, *how)) == 1
            assert f"the registry in {host_copy} is not usable" in capsys.readouterr().err
            assert tree(host_copy) == before


def test_an_empty_path_is_not_the_current_folder(
    rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["--config", str(rows(64)), "--out", ""], ["--add", "", "--out", "set"]):
        with pytest.raises(SystemExit) as caught:
            run_cli("aot", "build", "--target", HOST, *argv)
        assert caught.value.code == 2 and "expected a path; it is empty" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".toml"]


@pytest.mark.parametrize("name", ["file", "file/set"])
def test_a_path_that_is_no_folder(
    name: str, tmp_path: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run_cli("aot", "build", *command(rows(64), tmp_path / name)) == 1
    assert f"flashinfer: {tmp_path / name} " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_set_that_can_be_read_alone(
    host_set: Path, tmp_path: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted_tmpfs(tmp_path / "disk", "4M") as disk:
        out = copy_set(host_set, disk / "set")
        (out / f"{worker.RESULTS}.lock").unlink(missing_ok=True)
        with read_only(disk):
            assert run_cli("aot", "build", *command(rows(64), out)) == 0
            assert "1 kernel: 1 up to date, 0 to compile" in capsys.readouterr().out
            assert run_cli("aot", "build", *command(rows(192), out)) == 1
            assert f"{out} cannot be written (Read-only file system)" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(host_set: Path, tmp_path: Path, rows: Callable[..., Path]) -> None:
    with mounted_tmpfs(tmp_path / "disk", "256K") as disk:
        out = copy_set(host_set, disk / "set")
        before = tree(out)
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert run_cli("aot", "build", *command(rows(192), out)) == 1
        after = tree(out)
        kept = {name: content for name, content in before.items() if name != worker.RESULTS}
        assert {name: after[name] for name in kept} == kept
        (disk / "filler").unlink()
        assert run_cli("aot", "build", *command(rows(192), out)) == 0
        assert kernels_of(out) == BOTH | {(192, HOST)}
        assert_sound(out)


def test_a_disk_that_fills_up_under_the_registry(
    host_copy: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set is what it was, nothing unfinished is left of it, and the next build finds what was compiled."""
    write_text, before = Path.write_text, (host_copy / "registry.json").read_bytes()

    def full(path: Path, text: str, **options: str) -> int:
        if path.name.startswith("registry.json"):
            write_text(path, text[:10], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert run_cli("aot", "build", *command(rows(192), host_copy)) == 1
    assert f"{host_copy} cannot be written (No space left on device); free space there" in capsys.readouterr().err
    assert (host_copy / "registry.json").read_bytes() == before and not list(host_copy.glob("*.partial"))
    assert run_cli("aot", "build", *command(rows(192), host_copy)) == 0
    assert "0 to compile" in capsys.readouterr().out
    assert_sound(host_copy)


# ------------------------------------------------------------------------------------------------------------ max-bytes


def test_max_bytes_counts_what_is_kept(
    host_copy: Path, rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """And fails before it compiles where what lies there is too much already."""
    before = tree(host_copy)
    for how in ([], ["--dry-run"]):
        assert run_cli("aot", "build", *command(rows(192), host_copy, "--max-bytes", "20K", *how)) == 1
        out, err = capsys.readouterr()
        assert re.search(
            r"the set would hold (\d+) bytes of machine code, \1 of it of kernels that were not asked", err
        )
        assert "compiled" not in out
    assert tree(host_copy) == before


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_command_of_a_miss_report_keeps_the_set_in_use(
    host_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It aims at the set that FLASHINFER_AOT_PATH names, and adds to it."""
    missed = rmsnorm_spec(192)
    record_ = {
        "spec": missed.to_dict(), "name": missed.name, "reason": "not in registry", "resolved_by": "jit-compile",
        "seconds": 0.1, "bytes": 1, "caller": "x.py:1", "time": 0.0, "process": "a-1-1", "version": __version__,
    }  # fmt: skip
    (tmp_path / "my misses.jsonl").write_text(json.dumps(record_) + "\n")
    monkeypatch.setenv("FLASHINFER_AOT_PATH", str(host_copy))
    assert run_cli("misses", "report", tmp_path / "my misses.jsonl") == 0
    (printed,) = re.findall(r"^  flashinfer aot build (.*)$", capsys.readouterr().out, re.MULTILINE)
    argv = shlex.split(printed)
    assert argv[argv.index("--out") + 1] == str(host_copy)
    assert run_cli("aot", "build", *argv) == 0
    assert kernels_of(host_copy) == BOTH | {(192, HOST)}
    assert_sound(host_copy)
