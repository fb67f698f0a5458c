# SPDX-License-Identifier: Apache-2.0
"""Precompiled sets of another version or other sources, damaged or malformed: each is rejected with its reason, and the
kernel is compiled instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from flashinfer import env
from flashinfer.jit import driver, stores
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import Source
from flashinfer.jit.stores import AotStore, Hit, Registry, Rejected
from flashinfer.jit.toolchain import Compiled
from flashinfer.version import __version__
from tests.aot.kit import (
    change_entries,
    change_registry,
    registry_of,
)
from tests.kit import CountingCxx, miss_records, rmsnorm_spec, run_rmsnorm

OTHER_SHA = "0" * 64


@pytest.fixture
def kernels(host_copy: Path) -> Path:
    """A set of our own, to be damaged."""
    return host_copy


def artifact_of(root: Path, hidden_size: int = 64) -> Path:
    entry = next(entry for entry in registry_of(root)["kernels"] if entry["args"]["hidden_size"] == hidden_size)
    return root / entry["file"]


def reason(*roots: Path) -> str:
    answer = AotStore(list(roots)).find(rmsnorm_spec())
    assert isinstance(answer, Rejected), "the set answered"
    return answer.reason


class RememberingCxx(CountingCxx):
    """Compiles a source once for all tests, and counts its uses as compiles."""

    _compiled: ClassVar[dict[str, Compiled]] = {}

    def compile(self, source: Source) -> Compiled:
        if source.digest not in self._compiled:
            self._compiled[source.digest] = super().compile(source)
        else:
            self.num_compiles += 1
        return self._compiled[source.digest]


def assert_compiles_instead(root: Path, cache: Path) -> None:
    """The request is answered by the compiler, rightly, and the miss has the reason of the set."""
    compiler = RememberingCxx()
    resolver = Resolver(AotStore([root]), cache, lambda kind: compiler)
    run_rmsnorm(resolver.load(rmsnorm_spec()))
    assert compiler.num_compiles == 1
    (miss,) = miss_records(cache / "misses")
    assert miss.reason == reason(root)
    assert miss.resolved_by == "jit-compile"


# ----------------------------------------------------------------------------------------------------------- it answers


def test_sound_set_answers_without_a_compiler(host_set: Path, tmp_path: Path) -> None:
    compiler = CountingCxx()
    resolver = Resolver(AotStore([host_set]), tmp_path, lambda kind: compiler)
    run_rmsnorm(resolver.load(rmsnorm_spec()))
    assert compiler.num_compiles == 0
    assert not (tmp_path / "misses").exists()


def test_digests_decide_not_versions(kernels: Path, warnings: Callable[[], list[str]]) -> None:
    change_registry(kernels, version="0.0.1")
    assert isinstance(AotStore([kernels]).find(rmsnorm_spec()), Hit)
    assert not warnings()


# -------------------------------------------------------------------------------------------------------- other sources


def test_companion_of_another_version(kernels: Path, tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    change_registry(kernels, version="0.0.1")
    change_entries(kernels, digest=OTHER_SHA)
    assert reason(kernels) == f"version 0.0.1 ≠ {__version__}"
    assert_compiles_instead(kernels, tmp_path / "cache")
    (warning,) = warnings()  # once, for all kernels and processes' worth of requests
    assert f"pip install 'flashinfer-aot=={__version__}'" in warning


def test_companion_of_other_sources(kernels: Path, tmp_path: Path) -> None:
    change_entries(kernels, digest=OTHER_SHA)
    assert reason(kernels) == "digest differs (built from other sources)"
    assert_compiles_instead(kernels, tmp_path / "cache")


# --------------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_another_kernel(path: Path) -> None:
    path.write_bytes(artifact_of(path.parents[2], 128).read_bytes())


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, replace_by_another_kernel, empty])
def test_damaged_machine_code(damage: Callable[[Path], None], kernels: Path, tmp_path: Path) -> None:
    path = artifact_of(kernels)
    damage(path)
    assert reason(kernels) == f"sha256 mismatch of {path.relative_to(kernels)}"
    assert_compiles_instead(kernels, tmp_path / "cache")


def test_missing_machine_code(kernels: Path, tmp_path: Path) -> None:
    path = artifact_of(kernels)
    path.unlink()
    assert reason(kernels) == f"{path.relative_to(kernels)} is unreadable: No such file or directory"
    assert_compiles_instead(kernels, tmp_path / "cache")


def test_machine_code_this_machine_cannot_load(kernels: Path, tmp_path: Path) -> None:
    """Whole by its sha256, but no library: the loader's error becomes the reason."""
    artifact_of(kernels).write_bytes(b"no machine code")
    change_entries(kernels, sha256=hashlib.sha256(b"no machine code").hexdigest())
    compiler = RememberingCxx()
    run_rmsnorm(Resolver(AotStore([kernels]), tmp_path, lambda kind: compiler).load(rmsnorm_spec()))
    (miss,) = miss_records(tmp_path / "misses")
    assert miss.reason.startswith("not loadable: ")


# ------------------------------------------------------------------------------------------------- malformed registries

ENTRY = {"name": "n", "family": "f", "args": {}, "target": "t", "digest": "d", "file": "x", "sha256": "s", "bytes": 1}
WHOLE = {**ENTRY, "compiler": "c"}
MALFORMED = {
    "no JSON": "{",
    "binary": "\x00\x01",
    "a list": "[]",
    "null": "null",
    "another format": json.dumps({"format": 2, "version": "1", "kernels": []}),
    "no version": json.dumps({"format": 1, "kernels": []}),
    "no kernels": json.dumps({"format": 1, "version": "1"}),
    "kernels no list": json.dumps({"format": 1, "version": "1", "kernels": {"a": 1}}),
    "an entry too short": json.dumps({"format": 1, "version": "1", "kernels": [ENTRY]}),
    "an entry with more": json.dumps({"format": 1, "version": "1", "kernels": [{**WHOLE, "more": 1}]}),
    "an entry no table": json.dumps({"format": 1, "version": "1", "kernels": [5]}),
    "file of another type": json.dumps({"format": 1, "version": "1", "kernels": [{**WHOLE, "file": 5}]}),
    "cuda no version": json.dumps({"format": 1, "version": "1", "kernels": [{**WHOLE, "cuda": "thirteen"}]}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_registry(case: str, kernels: Path, tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    (kernels / "registry.json").write_text(MALFORMED[case])
    with pytest.raises(ValueError):
        Registry(kernels)
    assert reason(kernels).startswith(f"the kernel registry in {kernels} is not usable: ")
    assert_compiles_instead(kernels, tmp_path / "cache")
    assert len(warnings()) == 1


def test_missing_folder(tmp_path: Path) -> None:
    assert "it holds no registry.json; expected the folder of a set" in reason(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------------- several registries


def test_which_registries_are_asked_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named ones, then the package's own, then the companion; the latter two where a set is there."""
    named, own, companion = (tmp_path / name for name in ("named", "own", "flashinfer_aot"))
    for folder in (own, companion):
        folder.mkdir()
    (companion / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stores, "PRECOMPILED", own)
    monkeypatch.setenv(env.AOT_PATH.name, str(named))
    assert AotStore().roots() == [named]
    (companion / "registry.json").touch()
    assert AotStore().roots() == [named, companion]
    (own / "registry.json").touch()
    assert AotStore().roots() == [named, own, companion]


def test_several_registries_answer_in_order(host_set: Path, kernels: Path) -> None:
    first = AotStore([host_set, kernels]).find(rmsnorm_spec())
    second = AotStore([kernels, host_set]).find(rmsnorm_spec())
    assert isinstance(first, Hit) and isinstance(second, Hit)
    assert first.path is not None and first.path.is_relative_to(host_set)
    assert second.path is not None and second.path.is_relative_to(kernels)


def test_a_bad_registry_does_not_hide_a_good_one(host_set: Path, kernels: Path, tmp_path: Path) -> None:
    empty(artifact_of(kernels))
    malformed = tmp_path / "malformed"
    malformed.mkdir()
    (malformed / "registry.json").write_text("{")
    assert isinstance(AotStore([malformed, kernels, host_set]).find(rmsnorm_spec()), Hit)
    both = reason(malformed, kernels)
    assert "sha256 mismatch" in both and "is not usable" in both


def test_aot_path_names_registries(host_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.AOT_PATH.name, str(host_set))
    assert isinstance(AotStore().find(rmsnorm_spec()), Hit)
    monkeypatch.setenv(env.DISABLE_AOT.name, "1")
    disabled = AotStore().find(rmsnorm_spec())
    assert isinstance(disabled, Rejected) and env.DISABLE_AOT.name in disabled.reason


def test_without_any(tmp_path: Path) -> None:
    assert reason() == "flashinfer_aot is not installed"


def test_kernel_outside_the_set(host_set: Path) -> None:
    answer = AotStore([host_set]).find(rmsnorm_spec(hidden_size=192))
    assert answer == Rejected("not in registry")


# --------------------------------------------------------------------------------------------------------------- cubins


@pytest.mark.parametrize(("wanted", "given"), [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90a", "sm_90a")])
def test_cubin_of_the_same_major_version(
    wanted: str, given: str, cuda_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "version", lambda: (13, 0))
    answer = AotStore([cuda_set]).find(rmsnorm_spec(on=wanted))
    assert isinstance(answer, Hit)
    assert answer.source.spec.target == given


@pytest.mark.parametrize("wanted", ["sm_90", "sm_100a", "sm_120a"])
def test_no_cubin_for_the_device(wanted: str, cuda_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "version", lambda: (13, 0))
    answer = AotStore([cuda_set]).find(rmsnorm_spec(on=wanted))
    assert answer == Rejected(f"no machine code for {wanted}, only for sm_80, sm_90a")


def test_driver_too_old_for_the_cubins(cuda_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = registry_of(cuda_set)["kernels"][0]["cuda"]
    monkeypatch.setattr(driver, "version", lambda: (int(change.split(".")[0]) - 1, 4))
    answer = AotStore([cuda_set]).find(rmsnorm_spec(on="sm_80"))
    assert isinstance(answer, Rejected)
    assert answer.reason.startswith(f"needs driver ≥ {change}, found ")
