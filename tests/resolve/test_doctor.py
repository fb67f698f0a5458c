# SPDX-License-Identifier: Apache-2.0
"""`flashinfer doctor`, run as its users run it, where something is amiss and where nothing is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer import env, target
from flashinfer.cli import doctor
from flashinfer.jit.stores import Entry, Registry
from flashinfer.version import __version__
from tests.kit import rmsnorm_spec

Call = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("own_settings")


def findings(out: str) -> dict[str, dict[str, str]]:
    report: dict[str, Any] = json.loads(out)
    return {finding["name"]: finding for finding in report["findings"]}


def test_doctor_runs_a_kernel_and_writes_nothing(call: Call, cache: Path) -> None:
    code, out, err = call("doctor", "--json")
    found = findings(out)
    assert (code, err) == (0, ""), found
    ran = found["kernel on cpu"]
    assert ran["status"] == "ok"
    assert re.fullmatch(rf"{target.host()}: compiled in \d+\.\d\d s, ran in \d+ µs, result correct", ran["text"])
    for name in ("Python", "torch", "flashinfer", "host C++", "OpenMP", "cache"):
        assert found[name]["status"] == "ok", found[name]
    assert found["precompiled kernels"]["fix"] == f"pip install 'flashinfer[aot]=={__version__}'"
    assert [setting["name"] for setting in json.loads(out)["settings"]] == [setting.name for setting in env.ALL]
    assert not cache.exists()


def test_doctor_for_people(call: Call, cache: Path) -> None:
    code, out, _ = call("doctor")
    assert code == 0
    assert re.search(rf"FLASHINFER_CACHE_DIR +{re.escape(str(cache))} +set", out)
    assert out.endswith("all is well\n") or "to look at" in out


def test_doctor_without_a_compiler(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CXX", "/no/such/g++")
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    code, out, _ = call("doctor", "--json")
    assert code == 1
    assert findings(out)["host C++"]["status"] == "FAILED"
    assert "apt-get install g++" in findings(out)["host C++"]["fix"]


def test_doctor_with_a_compiler_that_miscompiles(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs is not enough: its result has to be right."""
    compiled = doctor.toolchain.HostCxx.compile

    def spoiled(self: Any, source: Any) -> Any:
        from dataclasses import replace

        return compiled(self, replace(source, text=source.text.replace("kHiddenSize = 1024", "kHiddenSize = 512")))

    monkeypatch.setattr(doctor.toolchain.HostCxx, "compile", spoiled)
    code, out, _ = call("doctor", "--json")
    assert code == 1
    assert "result is off by" in findings(out)["kernel on cpu"]["text"]


def install(site: Path, name: str, version: str, *files: str) -> None:
    """What pip leaves of a wheel: its files, and their list with a hash of each."""
    lines = []
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(file)
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.encode()).digest()).decode().rstrip("=")
        lines.append(f"{file},sha256={digest},{len(file)}")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]) + "\n")


def test_doctor_sees_upstream_beside_us(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flashinfer-python", "0.7.2", "flashinfer/__init__.py", "flashinfer/fused_moe/__init__.py")
    install(tmp_path, "flashinfer-cubin", "0.7.2", "flashinfer_cubin/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = call("doctor", "--json")
    upstream = findings(out)["upstream"]
    assert code == 0 and upstream["status"] == "warning"
    assert "flashinfer-python 0.7.2, flashinfer-cubin 0.7.2" in upstream["text"]
    assert upstream["fix"].startswith("pip uninstall flashinfer-python flashinfer-cubin, then")


@pytest.mark.parametrize("ours, status", [(__version__, "ok"), ("0.0.1", "warning"), ("", "warning")])
def test_doctor_knows_stand_ins(
    ours: str, status: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "flashinfer-python", f"0.7.2.post1+{ours}" if ours else "0.7.2.post1")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = call("doctor", "--json")
    upstream = findings(out)["upstream"]
    assert (code, upstream["status"]) == (0, status)
    if status == "warning":
        assert f"pip install --no-deps flashinfer-python==0.7.2.post1+{__version__}" in upstream["fix"]


def test_doctor_sees_files_of_others_in_our_folder(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flashinfer", __version__, "flashinfer/__init__.py", "flashinfer/norm.py", "flashinfer/page/x.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_PACKAGE", tmp_path / "flashinfer")
    code, out, _ = call("doctor", "--json")
    assert (code, findings(out)["files"]["text"]) == (0, "3 files, all as installed")
    install(tmp_path, "flashinfer-python", "0.7.2", "flashinfer/fused_moe/core.py", "flashinfer/topk.py")
    code, out, _ = call("doctor", "--json")
    assert (code, findings(out)["files"]["status"]) == (0, "warning")
    assert findings(out)["files"]["text"].endswith("engines find it: fused_moe, topk.py")
    (tmp_path / "flashinfer/norm.py").write_text("of somebody else")
    (tmp_path / "flashinfer/page/x.py").unlink()
    code, out, _ = call("doctor", "--json")
    damaged, foreign = (entry for entry in json.loads(out)["findings"] if entry["name"] == "files")
    assert code == 1 and (damaged["status"], foreign["status"]) == ("FAILED", "warning")
    assert damaged["text"].startswith("2 files of 3 missing or of something else")
    assert f"pip install --force-reinstall --no-deps flashinfer=={__version__}" in damaged["fix"]


def test_doctor_sees_an_unusable_cache_and_setting(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", "/proc/flashinfer")
    monkeypatch.setenv("FLASHINFER_RECORD_MISSES", "perhaps")
    monkeypatch.setenv("FLASHINFER_JIT_VERBOSE", "1")
    monkeypatch.setenv("FLASHINFER_ENABLE_AOT", "1")
    code, out, _ = call("doctor", "--json")
    found = [(finding["name"], finding["status"]) for finding in json.loads(out)["findings"]]
    assert code == 1
    assert ("cache", "warning") in found and ("setting", "FAILED") in found
    assert "FLASHINFER_JIT_VERBOSE is not a variable of this library" in out
    assert "FLASHINFER_ENABLE_AOT is for installing" in out


def test_doctor_sees_a_companion_of_other_sources(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = rmsnorm_spec()
    entry = Entry(spec.name, **spec.to_dict(), digest="0" * 64, file="k.so", sha256="0" * 64, bytes=1, compiler="g++")
    Registry.write(tmp_path, [entry])
    monkeypatch.setenv("FLASHINFER_AOT_PATH", str(tmp_path))
    code, out, _ = call("doctor", "--json")
    companion = findings(out)["precompiled kernels"]
    assert code == 0 and companion["status"] == "warning"
    assert "1 kernel for" in companion["text"] and "1 built from other sources and not used" in companion["text"]
    assert f"flashinfer-aot=={__version__}" in companion["fix"]


@pytest.mark.gpu
def test_doctor_runs_a_kernel_on_the_gpu(call: Call) -> None:
    _, out, _ = call("doctor", "--json")
    found = findings(out)
    assert found["kernel on cuda:0"]["status"] == "ok", found
    assert found["driver"]["status"] == found["GPU 0"]["status"] == found["NVRTC"]["status"] == "ok"
