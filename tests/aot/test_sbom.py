# SPDX-License-Identifier: Apache-2.0
"""The bill of materials beside a wheel: the fields that CycloneDX asks for, and the truth about what is inside."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer.aot import sbom
from flashinfer.version import __version__
from tests.aot.kit import artifacts, registry_of, run_cli
from tests.kit import PATIENCE_SECONDS, ROOT

METADATA = """Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: of a test
License-Expression: Apache-2.0
"""
FRONT = f"""Requires-Dist: torch
Requires-Dist: cuda-pathfinder>=1.3
Requires-Dist: tomli; python_version < '3.11'
Provides-Extra: aot
Requires-Dist: flashinfer-aot=={__version__}; extra == 'aot'
Provides-Extra: parquet
Requires-Dist: duckdb>=1.0; extra == 'parquet'
Provides-Extra: test
Requires-Dist: duckdb>=1.0; extra == 'test'
"""


def wheel_of(folder: Path, name: str, files: dict[str, bytes], more: str = "", version: str = __version__) -> Path:
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, content in files.items():
            file.writestr(member, content)
        file.writestr(f"{stem}.dist-info/METADATA", METADATA.format(name=name, version=version) + more)
    return path


def companion(folder: Path, root: Path) -> Path:
    """A wheel of a set as flashinfer_aot/build_backend.py packs it."""
    paths = [root / "registry.json", *artifacts(root)]
    files = {f"flashinfer_aot/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths}
    files |= {"flashinfer_aot/registry.json.sig": b"s" * 64}
    return wheel_of(folder, "flashinfer-aot", files, version=f"{__version__}+cu130")


def bill_of(wheel: Path) -> dict[str, Any]:
    assert run_cli("aot", "sbom", wheel) == 0
    bill: dict[str, Any] = json.loads(wheel.with_name(wheel.name + ".cdx.json").read_text())
    assert_is_cyclonedx(bill)
    assert_is_of(bill, wheel)
    return bill


def assert_is_cyclonedx(bill: dict[str, Any]) -> None:
    """What the schema of 1.6 asks for, and the rules it states in words, of the fields that we write."""
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6" and bill["version"] == 1
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert set(bill) == {
        *("$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata", "components", "dependencies")
    }
    everything = [bill["metadata"]["component"], *bill["components"]]
    for one in (*everything, *bill["metadata"]["tools"]["components"]):
        assert one["type"] in ("application", "library", "file") and one["name"]
        assert one.get("scope", "required") in ("required", "optional", "excluded")
        assert all(re.fullmatch(r"[0-9a-f]{64}", each["content"]) for each in one.get("hashes", []))
        assert all(
            isinstance(each["name"], str) and isinstance(each["value"], str) for each in one.get("properties", [])
        )
        assert re.fullmatch(r"pkg:pypi/[a-z0-9-]+(@[A-Za-z0-9.%-]+)?", one.get("purl", "pkg:pypi/x"))
    refs = [one["bom-ref"] for one in everything]
    assert len(refs) == len(set(refs))
    for each in bill["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= set(refs) and len(each["dependsOn"]) == len(set(each["dependsOn"]))


def assert_is_of(bill: dict[str, Any], wheel: Path) -> None:
    product = bill["metadata"]["component"]
    assert product["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]
    assert product["licenses"] == [{"expression": "Apache-2.0"}]


def named(bill: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in bill["components"] if one["type"] == kind}


def test_of_flashinfer(tmp_path: Path) -> None:
    bill = bill_of(wheel_of(tmp_path, "flashinfer", {}, FRONT))
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/flashinfer@{__version__}"
    packages = named(bill, "library")
    scopes = {name: (one.get("version"), one["scope"]) for name, one in packages.items()}
    assert scopes == {
        "cuda-pathfinder": (None, "required"),
        "duckdb": (None, "optional"),
        "flashinfer-aot": (__version__, "optional"),
        "tomli": (None, "required"),
        "torch": (None, "required"),
    }
    assert [one["value"] for one in packages["tomli"]["properties"]] == ["tomli; python_version < '3.11'"]
    assert len(packages["duckdb"]["properties"]) == 2, "it is named once"


def test_of_flashinfer_aot(wide_set: Path, tmp_path: Path) -> None:
    bill = bill_of(companion(tmp_path, wide_set))
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/flashinfer-aot@{__version__}%2Bcu130"
    entries = registry_of(wide_set)["kernels"]
    files = named(bill, "file")
    assert files.keys() == {"registry.json", "registry.json.sig", *(entry["file"] for entry in entries)}
    for entry in entries:
        assert files[entry["file"]]["hashes"][0]["content"] == entry["sha256"]
        assert {"name": "flashinfer:kernel", "value": entry["name"]} in files[entry["file"]]["properties"]
    (compiler,) = named(bill, "application").values()
    assert f"{compiler['name']}-{compiler['version']}" == entries[0]["compiler"] and compiler["scope"] == "excluded"
    assert {one["value"] for one in compiler["properties"]} == {entry["target"] for entry in entries}
    assert named(bill, "library")["flashinfer"]["version"] == __version__


@pytest.mark.parametrize(
    "text, name, version",
    [
        ("nvrtc-13.0-109338064", "nvrtc", "13.0-109338064"),
        ("x86_64-linux-gnu-g++-12-12.2.0-glibc-2.36", "x86_64-linux-gnu-g++-12", "12.2.0-glibc-2.36"),
        ("clang++-19.1.7", "clang++", "19.1.7"),
        ("mine", "mine", None),
    ],
)
def test_compilers(text: str, name: str, version: str | None) -> None:
    found = sbom._compiler(text, {"sm_80"})
    assert (found["name"], found.get("version")) == (name, version)


def test_the_same_every_time(wide_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = companion(tmp_path, wide_set)
    first = bill_of(wheel)
    assert "timestamp" not in first["metadata"]
    (tmp_path / "elsewhere").mkdir()
    assert bill_of(Path(shutil.copy(wheel, tmp_path / "elsewhere"))) == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert bill_of(wheel)["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"


def no_zip(path: Path) -> None:
    path.write_bytes(b"PK")


def of_another(path: Path) -> None:
    shutil.move(wheel_of(path.parent, "torch", {}), path)


def without_metadata(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


def without_registry(path: Path) -> None:
    shutil.move(wheel_of(path.parent, "flashinfer-aot", {}), path)


def malformed_registry(path: Path) -> None:
    shutil.move(wheel_of(path.parent, "flashinfer-aot", {"flashinfer_aot/registry.json": b"[]"}), path)


def another_kernel(path: Path) -> None:
    entry = {"file": "kernels/x", "sha256": "0" * 64, "name": "x", "target": "sm_80", "compiler": "c"}
    registry = json.dumps({"version": "1", "kernels": [entry]}).encode()
    files = {"flashinfer_aot/registry.json": registry, "flashinfer_aot/kernels/x": b"x"}
    shutil.move(wheel_of(path.parent, "flashinfer-aot", files), path)


@pytest.mark.parametrize(
    "fault", [no_zip, of_another, without_metadata, without_registry, malformed_registry, another_kernel]
)
def test_what_is_no_wheel_of_ours(
    fault: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.whl"
    fault(path)
    assert run_cli("aot", "sbom", path) == 1
    assert f"{path} is no wheel of flashinfer or flashinfer-aot: " in capsys.readouterr().err
    assert not path.with_name("some.whl.cdx.json").exists()


def test_a_time_that_is_none(
    wide_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = companion(tmp_path, wide_set)
    for text in ("today", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        assert run_cli("aot", "sbom", wheel) == 1
        assert "SOURCE_DATE_EPOCH is '" in capsys.readouterr().err


def test_both_wheels_are_built_with_theirs(host_set: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (group test)")
    command = [ROOT / "scripts" / "build_wheels.sh", tmp_path / "dist", "--no-build-isolation"]
    environment = {**os.environ, "PYTHON": sys.executable, "FLASHINFER_AOT_SET": host_set.name}
    subprocess.run(
        command,
        env=environment,
        cwd=host_set.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    wheels = sorted((tmp_path / "dist").glob("*.whl"))
    assert [wheel.name.partition("-")[0] for wheel in wheels] == ["flashinfer", "flashinfer_aot"]
    for wheel in wheels:
        bill = json.loads(wheel.with_name(wheel.name + ".cdx.json").read_text())
        assert_is_cyclonedx(bill)
        assert_is_of(bill, wheel)
    assert named(bill, "file").keys() >= {entry["file"] for entry in registry_of(host_set)["kernels"]}
