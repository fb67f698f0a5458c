# SPDX-License-Identifier: Apache-2.0
"""What is recorded when AOT has no answer. What becomes of the records: tests/aot/test_records.py."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import pytest

import flashinfer
from flashinfer import target
from flashinfer.aot.config import read_specs
from flashinfer.errors import KernelMissing
from flashinfer.jit import misses
from flashinfer.jit.misses import MissLog
from tests.kit import cpu_resolver, miss_records, rmsnorm_spec

# ------------------------------------------------------------------------------------------------------------ recording


def test_a_compile_and_a_cache_hit_are_both_recorded(tmp_path: Path) -> None:
    """A warm cache must not hide a hole in the precompiled set."""
    spec = rmsnorm_spec()
    for _ in range(2):
        resolver = cpu_resolver(tmp_path)
        resolver.load(spec)
        resolver.load(spec)  # once per process and kernel
    compiled, cached = miss_records(tmp_path / "misses")
    assert (compiled.resolved_by, cached.resolved_by) == ("jit-compile", "jit-cache")
    assert compiled.seconds > cached.seconds
    assert compiled.bytes == cached.bytes > 1000
    for record in (compiled, cached):
        assert record.spec == spec.to_dict()
        assert record.name == spec.name
        assert record.reason == "flashinfer_aot is not installed"
        assert record.caller.startswith(__file__), "the first frame outside the library"


def test_a_failure_that_repeats_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    resolver = cpu_resolver(tmp_path)
    for _ in range(3):
        with pytest.raises(KernelMissing):
            resolver.load(rmsnorm_spec())
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT")
    resolver.load(rmsnorm_spec())
    assert [record.resolved_by for record in miss_records(tmp_path / "misses")] == ["failed", "jit-compile"]


def test_recording_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_RECORD_MISSES", "0")
    cpu_resolver(tmp_path).load(rmsnorm_spec())
    assert not (tmp_path / "misses").exists()


def test_a_file_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "misses").touch()
    with caplog.at_level(logging.WARNING, logger="flashinfer"):
        resolver = cpu_resolver(tmp_path)
        resolver.load(rmsnorm_spec(64))
        resolver.load(rmsnorm_spec(128))
    warnings = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert len(warnings) == 1 and str(tmp_path / "misses") in warnings[0]


def test_the_model_is_that_of_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = cpu_resolver(tmp_path)
    resolver.load(rmsnorm_spec(64))
    monkeypatch.setenv("FLASHINFER_TAG", "the process")
    resolver.load(rmsnorm_spec(72))
    with flashinfer.tag("outer"):
        with flashinfer.tag("llama-3-8b/prefill"):
            resolver.load(rmsnorm_spec(80))
        with pytest.raises(RuntimeError, match="on the way"), flashinfer.tag("inner"):
            raise RuntimeError("on the way")
        resolver.load(rmsnorm_spec(88))
    thread = threading.Thread(target=resolver.load, args=(rmsnorm_spec(96),))
    with flashinfer.tag("of another thread"):
        thread.start()
        thread.join()
    tags = [record.model for record in miss_records(tmp_path / "misses")]
    assert tags == ["", "the process", "llama-3-8b/prefill", "outer", "the process"]


@pytest.mark.parametrize(
    ("name", "message"),
    [(7, "name is a int; expected a str"), ("", "name is ''"), ("a\nb", "printable"), ("x" * 201, "1 to 200")],
)
def test_tags_that_are_none(name: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message), flashinfer.tag(name):  # type: ignore[arg-type]
        pass


def test_a_package_whose_name_begins_like_ours_is_a_caller(tmp_path: Path) -> None:
    log = MissLog(tmp_path)
    known = {"log": log, "spec": rmsnorm_spec(), "spent": misses.Spent()}
    neighbour = str(Path(misses.__file__).parent.parent) + "_serving/model.py"
    exec(compile("log.record(spec, 'why', 'failed', spent, 0)", neighbour, "exec"), known)
    (record,) = miss_records(tmp_path)
    assert record.caller == f"{neighbour}:1"


def test_toml_rows_come_back_as_the_same_kernels(tmp_path: Path) -> None:
    wanted = [rmsnorm_spec(64), rmsnorm_spec(128)]
    twice = [spec.to_dict() for spec in (*wanted, rmsnorm_spec(64, on="sm_90a"))]
    config = tmp_path / "mine.toml"
    config.write_text(misses.to_toml(twice))
    assert config.read_text().count("[[kernel]]") == 2, "one row serves every target"
    assert read_specs([config], [target.host()]) == wanted


def test_records_are_input_of_the_build(tmp_path: Path) -> None:
    cpu_resolver(tmp_path).load(rmsnorm_spec())
    assert read_specs([], [target.host()], [tmp_path / "misses"]) == [rmsnorm_spec()]


def test_process_names_hold_host_and_pid(tmp_path: Path) -> None:
    import os
    import socket

    cpu_resolver(tmp_path).load(rmsnorm_spec())
    (file,) = (tmp_path / "misses").iterdir()
    assert file.name.startswith(f"{socket.gethostname()}-{os.getpid()}-")
    assert sys.getsizeof(file.read_text()) < 2000
