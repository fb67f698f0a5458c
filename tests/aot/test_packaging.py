# SPDX-License-Identifier: Apache-2.0
"""The two distributions as they are packed: wheels, sdists and what is compiled during an install."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashinfer import env, packages
from flashinfer.version import __version__
from tests.aot.kit import (
    HOST,
    artifacts,
    change_registry,
    copy_set,
    has_nvrtc,
    kernels_of,
    registry_of,
    rmsnorm_rows,
    tree,
    write_config,
)
from tests.aot.wheels_kit import (
    FORK_URL,
    MACHINE,
    PROJECT_URL,
    PURE,
    Environment,
    built_by_hook,
    metadata_of,
    names_in,
    sdist_of,
    wheel_of,
)
from tests.kit import ROOT

pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (group test)")


# --------------------------------------------------------------------------------------------------------- flashinfer


def test_front_wheel_is_pure_and_whole(front_wheel: Path) -> None:
    assert front_wheel.name == f"flashinfer-{__version__}-{PURE}.whl"
    held = names_in(front_wheel)
    headers = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cuh")}
    assert {f"flashinfer/{name}" for name in headers} <= held
    of_cpp = {path.relative_to(ROOT).as_posix() for name in ("include", "cpp") for path in (ROOT / name).rglob("*.*")}
    assert {f"flashinfer/{name}" for name in of_cpp} <= held and "flashinfer/cpp/CMakeLists.txt" in held
    assert {"flashinfer/aot_configs/core.toml", "flashinfer/aot_configs/smoke.toml"} <= held
    assert {"flashinfer/py.typed", "flashinfer/__init__.pyi", "flashinfer/aot/figures.json"} <= held
    assert {"flashinfer_tvm/__init__.py", "flashinfer_tvm/py.typed"} <= held
    packed = ("flashinfer/", "flashinfer_tvm/")
    assert not [name for name in held if not name.startswith((*packed, f"flashinfer-{__version__}.dist-info/"))]


def test_front_metadata(front_wheel: Path) -> None:
    metadata = metadata_of(front_wheel)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    required = metadata.get_all("Requires-Dist", [])
    assert "torch" in required, "no pin"
    assert f'flashinfer-aot=={__version__}; extra == "aot"' in required
    for text in (
        *(
            text
            for group in (packages.RUNTIME, packages.BUILD, packages.TRUST, packages.TVM)
            for text in group.values()
        ),
        *(packages.NVRTC, packages.CUDA_HEADERS),
        *packages.CU12,
    ):
        names = {re.split(r"[ ;<>=]", line)[0]: line.split(";")[0].strip() for line in required}
        name = packages.names([text])
        assert set(re.split("[<>=,]+", names[name])) == set(re.split("[<>=,]+", text)), "what messages tell to install"
    extras = {"aot", "build", "cu12", "cu13", "examples", "parquet", "trust", "tvm"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_the_description_has_no_link_that_leads_nowhere(front_wheel: Path) -> None:
    """A package index has no files beside it."""
    from packing import description

    text = metadata_of(front_wheel).get_payload()
    link = f"[what is left out]({PROJECT_URL}/blob/HEAD/docs/engines.md#what-of-upstream-is-left-out)"
    assert "# flashinfer" in text and link in text
    companion = (ROOT / "flashinfer_aot" / "README.md").read_text(encoding="utf-8")
    for page in (text, companion):
        found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.DOTALL))
        assert [target for target in found if not target.startswith(("https:", "#"))] == []
    page = "[a](docs/x.md#y) `[b](c)` [d](https://e) ```\n[f](g)\n``` [h](#i)"
    assert description(page, PROJECT_URL) == page.replace("docs/x.md#y", f"{PROJECT_URL}/blob/HEAD/docs/x.md#y")
    for unknown in ("", "https://code.example.com/owner/name"):
        assert description(page, unknown) == page.replace("[a](docs/x.md#y)", "a (`docs/x.md`)")


def test_front_wheel_of_the_sdist_is_the_same(front_wheel: Path, front_sdist: Path, tmp_path: Path) -> None:
    again = wheel_of(front_sdist, tmp_path / "wheel", FLASHINFER_PROJECT_URL=FORK_URL)
    assert again.read_bytes() == front_wheel.read_bytes()
    with tarfile.open(front_sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {
        "CHANGELOG.md",
        "SECURITY.md",
        "scripts/build_aot.py",
        "flashinfer_aot/pyproject.toml",
        "flashinfer_aot/build_backend.py",
    } <= held
    assert not [name for name in held if name.endswith((".cubin", ".so", ".pyc", "registry.json"))]


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def test_the_same_bytes_from_every_checkout(
    front_wheel: Path, front_sdist: Path, cuda_set: Path, tmp_path: Path
) -> None:
    """Modes, times, folder and umask are those of whoever has it; what a run left behind is not packed. The
    repository's address is that of the sdist."""
    other = unpacked(front_sdist, tmp_path / "other")
    for path in other.rglob("*"):
        path.chmod(0o775 if path.stat().st_mode & 0o100 else 0o664)
        os.utime(path, (1, 1))
    (other / "flashinfer/__pycache__").mkdir()
    (other / "flashinfer/__pycache__/env.cpython-311.pyc").touch()
    (other / "flashinfer/precompiled").mkdir()
    (other / "flashinfer/precompiled/notes.txt").touch()
    before = tree(other)
    umask = os.umask(0o007)
    try:
        fork = {"FLASHINFER_PROJECT_URL": FORK_URL}
        assert wheel_of(other, tmp_path / "wheel", **fork).read_bytes() == front_wheel.read_bytes()
        assert sdist_of(other, tmp_path / "again", **fork).read_bytes() == front_sdist.read_bytes()
        companions = [
            wheel_of(project / "flashinfer_aot", tmp_path / name, FLASHINFER_AOT_SET=cuda_set, **named).read_bytes()
            for name, project, named in (("here", ROOT, {}), ("there", other, fork))
        ]
    finally:
        os.umask(umask)
    assert companions[0] == companions[1]
    assert tree(other) == before, "nothing is left behind"


@pytest.mark.parametrize("wheel", ["front_wheel", "host_wheel", "cuda_wheel"])
def test_wheels_are_as_small_as_deflate_makes_them(wheel: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(request.getfixturevalue(wheel)) as file:
        for member in file.infolist():
            tightest = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
            content = tightest.compress(file.read(member)) + tightest.flush()
            assert member.compress_size == len(content), member.filename


# ----------------------------------------------------------------------------------------------- FLASHINFER_ENABLE_AOT

RUN_PRECOMPILED = """
import torch, flashinfer
flashinfer.rmsnorm(torch.randn(2, 64), torch.randn(64))
"""
VERIFY = """
from flashinfer.cli import main
assert main(["aot", "verify"]) == 0 and main(["doctor"]) == 0
"""


def test_kernels_are_compiled_during_an_install(tmp_path: Path) -> None:
    config = write_config(tmp_path, rmsnorm_rows(64))
    variables = {"FLASHINFER_ENABLE_AOT": "1", "FLASHINFER_AOT_CONFIG": config}
    wheel = wheel_of(ROOT, tmp_path / "wheel", **variables)
    assert wheel.name == f"flashinfer-{__version__}-{MACHINE}.whl", "a CPU library is inside"
    cuda = wheel_of(ROOT, tmp_path / "cuda", **variables, FLASHINFER_AOT_TARGETS="sm_90a") if has_nvrtc() else None
    assert cuda is None or cuda.name == f"flashinfer-{__version__}-{PURE}.whl"
    environment = Environment(tmp_path / "venv")
    environment.make()
    environment.install("--no-deps", wheel)
    said = environment.run("-c", RUN_PRECOMPILED + VERIFY, cwd=tmp_path, FLASHINFER_DISABLE_JIT="1")
    assert "all sound" in said and re.search(r"files +ok ", said)


def test_kernels_are_compiled_during_an_editable_install(front_sdist: Path, tmp_path: Path) -> None:
    """Into the checkout; installing again brings them up to date."""
    checkout = unpacked(front_sdist, tmp_path / "checkout")
    config = write_config(tmp_path, rmsnorm_rows(64))
    plain = built_by_hook("build_editable", checkout, tmp_path / "plain", FLASHINFER_ENABLE_AOT="0")
    assert not (checkout / "flashinfer/precompiled").exists()
    variables = {"FLASHINFER_ENABLE_AOT": "1", "FLASHINFER_AOT_CONFIG": config, "FLASHINFER_AOT_TARGETS": HOST}
    wheel = built_by_hook("build_editable", checkout, tmp_path / "aot", **variables)
    assert names_in(wheel) == names_in(plain)
    write_config(tmp_path, rmsnorm_rows(128))
    (tmp_path / "aot" / wheel.name).unlink()
    wheel = built_by_hook("build_editable", checkout, tmp_path / "aot", **variables)
    assert kernels_of(checkout / "flashinfer/precompiled") == {(128, HOST)}
    environment = Environment(tmp_path / "venv")
    environment.make()
    environment.install("--no-deps", wheel)
    code = RUN_PRECOMPILED.replace("64", "128")
    environment.run("-c", code, cwd=tmp_path, FLASHINFER_DISABLE_JIT="1")
    assert PURE in wheel_of(checkout, tmp_path / "later").name, "an install without the variable is pure again"


def test_variables_of_the_install_are_told_of() -> None:
    section = (
        (ROOT / "docs/packaging.md").read_text().partition("### Compile during the install")[2].partition("\n#")[0]
    )
    told = set(re.findall(r"^\| `(FLASHINFER_\w+)`", section, flags=re.MULTILINE))
    read = set(re.findall(r"FLASHINFER_\w+", (ROOT / "build_backend.py").read_text()))
    assert told == read == set(env.OF_INSTALLING)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"FLASHINFER_ENABLE_AOT": "yes"}, "FLASHINFER_ENABLE_AOT='yes': expected 0, 1, true or false"),
        ({"FLASHINFER_AOT_CONFIG": "cor"}, "cor"),
        ({"FLASHINFER_AOT_TARGETS": "sm_99"}, "target 'sm_99' is unknown"),
    ],
)
def test_an_install_that_cannot_compile_fails(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    variables = {"FLASHINFER_ENABLE_AOT": "1", "FLASHINFER_AOT_CONFIG": "smoke", **variables}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        built_by_hook("build_wheel", ROOT, tmp_path / "made", **variables)
    assert message in caught.value.stderr
    assert not list((tmp_path / "made").iterdir())


# ------------------------------------------------------------------------------------------------------ flashinfer-aot


def test_cubins_alone_make_a_pure_wheel(cuda_wheel: Path, cuda_set: Path) -> None:
    cuda = registry_of(cuda_set)["kernels"][0]["cuda"].replace(".", "")
    assert cuda_wheel.name == f"flashinfer_aot-{__version__}+cu{cuda}-{PURE}.whl"
    packed = {f"flashinfer_aot/{path.relative_to(cuda_set).as_posix()}" for path in artifacts(cuda_set)}
    held = {name for name in names_in(cuda_wheel) if ".dist-info/" not in name}
    assert held == {"flashinfer_aot/__init__.py", "flashinfer_aot/registry.json", *packed}


def test_cpu_libraries_bring_their_platform(host_wheel: Path) -> None:
    assert host_wheel.name == f"flashinfer_aot-{__version__}-{MACHINE}.whl"


def test_companion_wheel_of_its_sdist_is_the_same(cuda_set: Path, cuda_wheel: Path, tmp_path: Path) -> None:
    """The sdist brings set and version along: nothing of the checkout, no variable."""
    variables = {"FLASHINFER_AOT_SET": cuda_set, "FLASHINFER_AOT_LOCAL_VERSION": "auto"}
    sdist = sdist_of(ROOT / "flashinfer_aot", tmp_path / "sdist", **variables)
    again = wheel_of(sdist, tmp_path / "wheel", FLASHINFER_PROJECT_URL=FORK_URL)
    assert again.name == cuda_wheel.name
    assert again.read_bytes() == cuda_wheel.read_bytes()


def test_a_signature_comes_along(host_copy: Path, tmp_path: Path) -> None:
    """Through the sdist too, as it is: what signed it may be elsewhere."""
    (host_copy / "registry.json.sig").write_bytes(b"s" * 64)
    sdist = sdist_of(ROOT / "flashinfer_aot", tmp_path / "sdist", FLASHINFER_AOT_SET=host_copy)
    with zipfile.ZipFile(wheel_of(sdist, tmp_path / "wheel")) as file:
        assert file.read("flashinfer_aot/registry.json.sig") == b"s" * 64
        assert file.read("flashinfer_aot/registry.json") == (host_copy / "registry.json").read_bytes()


# ------------------------------------------------------------------------------------------------- the same every time


def aged(source: Path, to: Path) -> Path:
    """A copy as another machine would have it: other times and permissions, and files made in another order."""
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_file() and "__pycache__" not in path.parts:  # where other tests write meanwhile
            copy = to / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o600)
            os.utime(copy, (1, 1_234_567_890))
    return to


@pytest.mark.parametrize("epoch", ["", "1700000000"])
def test_a_set_makes_the_same_wheel_every_time(epoch: str, host_set: Path, host_wheel: Path, tmp_path: Path) -> None:
    variables = {"SOURCE_DATE_EPOCH": epoch} if epoch else {}

    def wheel(root: Path, name: str) -> Path:
        return wheel_of(ROOT / "flashinfer_aot", tmp_path / name, FLASHINFER_AOT_SET=root, **variables)

    first = wheel(host_set, "first") if epoch else host_wheel
    second = wheel(aged(host_set, tmp_path / "elsewhere" / "set"), "second")
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    if epoch:
        assert times_in(first) == {(2023, 11, 14, 22, 13, 20)}


def test_a_checkout_makes_the_same_wheel_every_time(front_wheel: Path, tmp_path: Path) -> None:
    for name in ("flashinfer", "flashinfer_tvm", "csrc", "aot_configs", "include", "cpp"):
        aged(ROOT / name, tmp_path / "checkout" / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / "checkout" / path.name)
    again = wheel_of(tmp_path / "checkout", tmp_path / "wheel")
    assert again.name == front_wheel.name and again.read_bytes() == front_wheel.read_bytes()
    then = wheel_of(tmp_path / "checkout", tmp_path / "then", SOURCE_DATE_EPOCH="1700000000")
    assert times_in(then) == {(2023, 11, 14, 22, 13, 20)}


def times_in(wheel: Path) -> set[tuple[int, ...]]:
    with zipfile.ZipFile(wheel) as file:
        return {info.date_time for info in file.infolist()}


def hooks() -> ModuleType:
    """The companion's backend; what it shares with the other is found beside it."""
    spec = importlib.util.spec_from_file_location("companion_hooks", ROOT / "flashinfer_aot" / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packing_refuses_what_the_registry_does_not_describe(
    host_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_set(host_set, tmp_path / "set")
    monkeypatch.setenv("FLASHINFER_AOT_SET", str(root))
    entry = registry_of(root)["kernels"][0]
    with pytest.raises(ValueError, match="outside its folder"):
        hooks().packing.checked(root, {**entry, "file": "../x"})
    (root / entry["file"]).write_bytes(b"")
    with pytest.raises(ValueError, match="sha256 differs"):
        hooks().packing.checked(root, entry)


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist"])
def test_packing_refuses_an_empty_set(hook: str, host_copy: Path, tmp_path: Path) -> None:
    change_registry(host_copy, kernels=[])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        built_by_hook(hook, ROOT / "flashinfer_aot", tmp_path / "made", FLASHINFER_AOT_SET=host_copy)
    assert "holds no kernel; a wheel of it would only hide that" in caught.value.stderr
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("change", [{"kernels": None}, {"kernels": [5]}, {"format": 2}, {"version": None}])
def test_packing_refuses_what_is_no_registry(
    change: dict[str, Any], host_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_AOT_SET", str(host_copy))
    change_registry(host_copy, **change)
    with pytest.raises(ValueError, match="is not the registry of a set; delete it and run"):
        hooks().version()
    (host_copy / "registry.json").write_text("{")
    with pytest.raises(ValueError, match="is not the registry of a set"):
        hooks().version()


def test_packing_refuses_a_set_of_another_version(
    host_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_set(host_set, tmp_path / "set")
    text = (root / "registry.json").read_text()
    (root / "registry.json").write_text(text.replace(f'"version": "{__version__}"', '"version": "0.0.1"'))
    monkeypatch.setenv("FLASHINFER_AOT_SET", str(root))
    with pytest.raises(ValueError, match=rf"built from version 0\.0\.1, this checkout is {re.escape(__version__)}"):
        hooks().version()


def test_tags_and_local_versions() -> None:
    def tag(*names: str) -> str:
        text: str = hooks().packing.platform({"kernels": [{"target": name} for name in names]})
        return text

    assert tag("sm_80", "sm_100a") == "any"
    assert tag("sm_80", "x86-64-v3", "x86-64") == "linux_x86_64"
    assert tag("armv8.2-a") == "linux_aarch64"
    with pytest.raises(ValueError, match="build one set for each"):
        tag("x86-64", "armv8-a")
    with pytest.raises(ValueError, match=r"CUDA 12\.9 and 13\.0; build one set per version"):
        hooks()._cuda_version({"kernels": [{"cuda": "13.0"}, {"cuda": "12.9"}, {"cuda": None}]})
