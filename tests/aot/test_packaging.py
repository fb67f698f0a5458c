"""The two distributions as users get them: wheels, sdists, editable installs and a package index, without a network.

The installs run in an environment of their own, from an index that also holds empty wheels for torch and the other
dependencies; what is run there finds the real ones behind it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashinfer import env, packages
from flashinfer.version import __version__
from tests.aot.kit import (
    BOTH,
    HOST,
    artifacts,
    change_registry,
    copy_set,
    has_nvrtc,
    kernels_of,
    made_once,
    registry_of,
    rmsnorm_rows,
    tree,
    write_config,
)
from tests.kit import ROOT

pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (extra test)")
PURE, MACHINE = "py3-none-any", f"py3-none-linux_{os.uname().machine}"


def pip(*args: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run pip as if no configuration file and no variable of it existed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FLASHINFER_"))}
    clean.update(PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1", **(environment or {}))
    command = [sys.executable, "-m", "pip", *map(str, args)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(project: Path, folder: Path, **variables: str | Path) -> Path:
    """The wheel pip makes of a project folder or sdist."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: str(value) for name, value in variables.items()}
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, project, environment=environment)
    return only_wheel(folder)


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def sdist_of(project: Path, folder: Path, **variables: str | Path) -> Path:
    return built_by_hook("build_sdist", project, folder, **variables)


def built_by_hook(hook: str, project: Path, folder: Path, **variables: str | Path) -> Path:
    """What the build backend's hook makes of a project: build_sdist, build_editable."""
    code = f"import sys; sys.path.insert(0, ''); from build_backend import {hook}; {hook}(sys.argv[1])"
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, cwd=project, env=environment, check=True, timeout=60, capture_output=True, text=True)
    (made,) = folder.iterdir()
    return made


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesHeaderParser().parsebytes(file.read(name))


@pytest.fixture(scope="session")
def front_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return only_wheel(made_once(tmp_path_factory, "front_wheel", lambda folder: wheel_of(ROOT, folder)))


@pytest.fixture(scope="session")
def host_wheel(host_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        wheel_of(ROOT / "flashinfer_aot", folder, FLASHINFER_AOT_SET=host_set)

    return only_wheel(made_once(tmp_path_factory, "host_wheel", make))


@pytest.fixture(scope="session")
def cuda_wheel(cuda_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        variables = {"FLASHINFER_AOT_SET": cuda_set, "FLASHINFER_AOT_LOCAL_VERSION": "auto"}
        wheel_of(ROOT / "flashinfer_aot", folder, **variables)

    return only_wheel(made_once(tmp_path_factory, "cuda_wheel", make))


# --------------------------------------------------------------------------------------------------------- flashinfer


def test_front_wheel_is_pure_and_whole(front_wheel: Path) -> None:
    assert front_wheel.name == f"flashinfer-{__version__}-{PURE}.whl"
    held = names_in(front_wheel)
    headers = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cuh")}
    assert {f"flashinfer/{name}" for name in headers} <= held
    assert {"flashinfer/aot_configs/core.toml", "flashinfer/aot_configs/smoke.toml"} <= held
    assert {"flashinfer/py.typed", "flashinfer/__init__.pyi", "flashinfer/aot/figures.json"} <= held
    assert not [name for name in held if not name.startswith(("flashinfer/", f"flashinfer-{__version__}.dist-info/"))]


def test_front_metadata(front_wheel: Path) -> None:
    metadata = metadata_of(front_wheel)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    required = metadata.get_all("Requires-Dist", [])
    assert "torch" in required, "no pin"
    assert f'flashinfer-aot=={__version__}; extra == "aot"' in required
    for text in (
        *(text for group in (packages.RUNTIME, packages.BUILD, packages.TRUST) for text in group.values()),
        *(packages.NVRTC, packages.CUDA_HEADERS),
        *packages.CU12,
    ):
        names = {re.split(r"[ ;<>=]", line)[0]: line.split(";")[0].strip() for line in required}
        name = packages.names([text])
        assert set(re.split("[<>=,]+", names[name])) == set(re.split("[<>=,]+", text)), "what messages tell to install"
    extras = {"aot", "build", "cu12", "cu13", "examples", "parquet", "test", "trust"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_the_description_has_no_link_that_leads_nowhere(front_wheel: Path) -> None:
    """A package index has no files beside it."""
    from packing import description

    text = metadata_of(front_wheel).get_payload()
    assert "# flashinfer" in text and "what is left out (`docs/engines.md`)" in text
    companion = (ROOT / "flashinfer_aot" / "README.md").read_text(encoding="utf-8")
    for page in (text, companion):
        found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.DOTALL))
        assert [target for target in found if not target.startswith(("https:", "#"))] == []
    page = "[a](docs/x.md#y) `[b](c)` [d](https://e) ```\n[f](g)\n``` [h](#i)"
    base = "https://example.com/files"
    assert description(page, f"{base}/") == page.replace("docs/x.md#y", f"{base}/docs/x.md#y")
    assert description(page, "") == page.replace("[a](docs/x.md#y)", "a (`docs/x.md`)")


def test_front_wheel_of_the_sdist_is_the_same(front_wheel: Path, tmp_path: Path) -> None:
    sdist = sdist_of(ROOT, tmp_path / "sdist")
    assert wheel_of(sdist, tmp_path / "wheel").read_bytes() == front_wheel.read_bytes()
    with tarfile.open(sdist) as file:
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


def test_the_same_bytes_from_every_checkout(front_wheel: Path, cuda_set: Path, tmp_path: Path) -> None:
    """Modes, times, folder and umask are those of whoever has it; what a run left behind is not packed."""
    sdist = sdist_of(ROOT, tmp_path / "sdist")
    other = unpacked(sdist, tmp_path / "other")
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
        assert wheel_of(other, tmp_path / "wheel").read_bytes() == front_wheel.read_bytes()
        assert sdist_of(other, tmp_path / "again").read_bytes() == sdist.read_bytes()
        companions = [
            wheel_of(project / "flashinfer_aot", tmp_path / name, FLASHINFER_AOT_SET=cuda_set).read_bytes()
            for name, project in (("here", ROOT), ("there", other))
        ]
    finally:
        os.umask(umask)
    assert companions[0] == companions[1]
    assert tree(other) == before, "nothing is left behind"


# ----------------------------------------------------------------------------------------------- FLASHINFER_ENABLE_AOT

RUN_PRECOMPILED = """
import torch, flashinfer
flashinfer.rmsnorm(torch.randn(2, 64), torch.randn(64))
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
    environment.run("-c", RUN_PRECOMPILED, cwd=tmp_path, FLASHINFER_DISABLE_JIT="1")
    assert "all sound" in environment.run("-m", "flashinfer", "aot", "verify", cwd=tmp_path)
    assert re.search(r"files +ok ", environment.run("-m", "flashinfer", "doctor", cwd=tmp_path))


def test_kernels_are_compiled_during_an_editable_install(tmp_path: Path) -> None:
    """Into the checkout; installing again brings them up to date."""
    checkout = unpacked(sdist_of(ROOT, tmp_path / "sdist"), tmp_path / "checkout")
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
    again = wheel_of(sdist_of(ROOT / "flashinfer_aot", tmp_path / "sdist", **variables), tmp_path / "wheel")
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
        if path.is_file():
            copy = to / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o600)
            os.utime(copy, (1, 1_234_567_890))
    return to


@pytest.mark.parametrize("epoch", ["", "1700000000"])
def test_a_set_makes_the_same_wheel_every_time(epoch: str, host_set: Path, tmp_path: Path) -> None:
    variables = {"SOURCE_DATE_EPOCH": epoch} if epoch else {}
    sets = (host_set, aged(host_set, tmp_path / "elsewhere" / "set"))
    first, second = (
        wheel_of(ROOT / "flashinfer_aot", tmp_path / f"wheel{i}", FLASHINFER_AOT_SET=root, **variables)
        for i, root in enumerate(sets)
    )
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    if epoch:
        assert times_in(first) == {(2023, 11, 14, 22, 13, 20)}


def test_a_checkout_makes_the_same_wheel_every_time(front_wheel: Path, tmp_path: Path) -> None:
    for name in ("flashinfer", "csrc", "aot_configs"):
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


# -------------------------------------------------------------------------------------------------------------- index


def bare_wheel(
    project: str, folder: Path, *requires: str, version: str = "99.0", modules: tuple[str, ...] = ()
) -> Path:
    """A wheel of that name with nothing but these modules inside, each of which says whose it is."""
    stem = f"{project.replace('-', '_')}-{version}"
    path = folder / f"{stem}-{PURE}.whl"
    metadata = [f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}"]
    contents = {
        **{module: f"owner = {project!r}\n" for module in modules},
        f"{stem}.dist-info/METADATA": "\n".join([*metadata, *(f"Requires-Dist: {text}" for text in requires), ""]),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {PURE}\n",
    }
    contents[f"{stem}.dist-info/RECORD"] = "".join(f"{name},,\n" for name in [*contents, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as file:
        for name, text in contents.items():
            file.writestr(name, text)
    return path


@pytest.fixture(scope="session")
def index(front_wheel: Path, host_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of both distributions and of empty wheels for everything they need."""

    def make(folder: Path) -> None:
        names = [re.match(r"[\w-]+", text) for text in metadata_of(front_wheel).get_all("Requires-Dist", [])]
        others = {match[0] for match in names if match} - {"flashinfer-aot"}
        empty = [
            bare_wheel(name, folder, version="13.0" if name.startswith("nvidia") else "99.0") for name in sorted(others)
        ]
        build_index(front_wheel, host_wheel, *empty, out=folder / "out")

    return made_once(tmp_path_factory, "index", make) / "out"


def build_index(*files: Path, out: Path, stand_ins: tuple[str, ...] = ()) -> str:
    options = [text for pin in stand_ins for text in ("--stand-in", pin)]
    command = [sys.executable, ROOT / "scripts" / "build_index.py", *files, "--out", out, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class Environment:
    """A virtual environment without pip."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self.borrowed = folder / "borrowed"

    @property
    def site(self) -> Path:
        return next((self.borrowed.parent / "lib").glob("python*/site-packages"))

    def make(self, borrows: bool = True) -> None:
        folder = self.borrowed.parent
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
        # What the outer environment has, torch above all, but nothing of ours that may be installed there.
        self.borrowed.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "flashinfer" not in entry.name and borrows:
                (self.borrowed / entry.name).symlink_to(entry)

    def install(self, *args: str | Path) -> None:
        pip("--python", self.python, "install", "--quiet", *args)

    def run(self, *args: str | Path, cwd: Path, **variables: str) -> str:
        """Run with the torch of the environment these tests run in, found after everything installed here."""
        search_path = os.pathsep.join([str(self.site), str(self.borrowed)])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FLASHINFER_")}
        done = subprocess.run(
            [str(self.python), *map(str, args)],
            env={**clean, "PYTHONPATH": search_path, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def installed(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """After `pip install "flashinfer[aot]"` from the index."""

    def make(folder: Path) -> None:
        environment = Environment(folder / "venv")
        environment.make()
        environment.install("flashinfer[aot]", "--index-url", (index / "simple").as_uri())

    return Environment(made_once(tmp_path_factory, "installed", make) / "venv")


USE = """
import sys, torch, flashinfer, flashinfer_aot
assert flashinfer.__file__.startswith(sys.prefix) == INSTALLED, flashinfer.__file__
x, weight = torch.randn(2, 64), torch.randn(64)
expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
torch.testing.assert_close(flashinfer.rmsnorm(x, weight), expected)
assert flashinfer_aot.registry()["version"] == flashinfer.__version__
print(flashinfer_aot.root())
"""


def test_install_from_the_index(installed: Environment, tmp_path: Path) -> None:
    """The extra brings the companion; a kernel then comes from it, where nothing may compile."""
    root = installed.run("-c", USE.replace("INSTALLED", "True"), cwd=tmp_path, FLASHINFER_DISABLE_JIT="1").strip()
    assert Path(root).is_relative_to(installed.site)
    assert "all sound" in installed.run("-m", "flashinfer", "aot", "verify", cwd=tmp_path)
    script = installed.python.with_name("flashinfer")
    assert HOST in installed.run(script, "aot", "list", cwd=tmp_path)


def test_installed_package_compiles_and_builds(installed: Environment, tmp_path: Path) -> None:
    """Sources and configs are inside the wheel: it compiles without the checkout, and builds a set."""
    config = write_config(tmp_path, rmsnorm_rows(64))
    options = ["--config", config, "--target", HOST, "--out", tmp_path / "set"]
    assert "1 compiled" in installed.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    dry = ["--config", "core", "--target", "sm_90a", "--out", tmp_path / "core", "--dry-run"]
    assert "decode" in installed.run("-m", "flashinfer", "aot", "build", *dry, cwd=tmp_path)


def test_the_builder_alone_needs_no_torch(front_wheel: Path, tmp_path: Path) -> None:
    """As docs/packaging.md installs it: nothing of what the library needs at run time."""
    if not has_nvrtc():
        pytest.skip("needs NVRTC")
    brought = ("ninja", "tqdm", "cuda", "nvidia", "tomli")
    environment = Environment(tmp_path / "venv")
    environment.make(borrows=False)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.startswith(brought):
            (environment.site / entry.name).symlink_to(entry)
    environment.install("--no-deps", front_wheel)
    config = write_config(tmp_path, rmsnorm_rows(64))
    options = ["--config", config, "--target", f"{HOST},sm_90a", "--out", tmp_path / "set"]
    assert "2 compiled" in environment.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    code = "import importlib.util as u; print([n for n in ('torch', 'platformdirs', 'filelock') if u.find_spec(n)])"
    assert environment.run("-c", code, cwd=tmp_path).strip() == "[]"
    assert "all sound" in environment.run("-m", "flashinfer", "aot", "verify", tmp_path / "set", cwd=tmp_path)


def test_adding_to_an_installed_companion_keeps_it(installed: Environment, tmp_path: Path) -> None:
    """It came without notes of its build; what was installed is there afterwards, file by file."""
    companion = copy_set(installed.site / "flashinfer_aot", tmp_path / "companion")
    before = tree(companion)
    options = ["--config", write_config(tmp_path, rmsnorm_rows(192)), "--target", HOST, "--out", companion]
    assert "2 others kept" in installed.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    after = tree(companion)
    kept = {name: content for name, content in before.items() if name != "registry.json"}
    assert {name: after[name] for name in kept} == kept
    assert kernels_of(companion) == BOTH | {(192, HOST)}
    assert "all sound" in installed.run("-m", "flashinfer", "aot", "verify", companion, cwd=tmp_path)


def test_editable_installs(tmp_path: Path) -> None:
    """Everything is used where it lies. The companion needs no set yet: it is found once it is built."""
    environment = Environment(tmp_path / "venv")
    environment.make()
    projects = (ROOT, ROOT / "flashinfer_aot")
    wheels = [built_by_hook("build_editable", project, tmp_path / project.name) for project in projects]
    environment.install("--no-deps", *wheels)
    assert not (environment.site / "flashinfer").exists()
    code = """
import flashinfer, flashinfer_aot
from flashinfer.jit.source import include_root
print(flashinfer.__file__, flashinfer_aot.root(), include_root(), sep="\\n")
"""
    where = (ROOT / "flashinfer" / "__init__.py", ROOT / "flashinfer_aot" / "flashinfer_aot", ROOT / "csrc")
    assert environment.run("-c", code, cwd=tmp_path).split() == [str(path) for path in where]


def test_index_has_a_folder_per_cuda_version(index: Path, cuda_wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    files = sorted((index / "files").glob("flashinfer*.whl"))
    build_index(*files, out=out)
    build_index(cuda_wheel, out=out)  # adding to an index
    local = cuda_wheel.name.split("+")[1].split("-")[0]
    pages = {name: (out / name / "flashinfer-aot" / "index.html").read_text() for name in ("simple", local)}
    assert "%2Bcu" not in pages["simple"] and "%2Bcu" in pages[local]
    digest = hashlib.sha256(cuda_wheel.read_bytes()).hexdigest()
    assert f"{cuda_wheel.name.replace('+', '%2B')}#sha256={digest}" in pages[local]
    assert (out / local / "flashinfer" / "index.html").exists()
    report = pip(
        "install", "--dry-run", "--no-deps", "--ignore-installed", "--index-url", (out / local).as_uri(),
        f"flashinfer-aot=={__version__}",
    )  # fmt: skip
    assert f"Would install flashinfer-aot-{__version__}+{local}" in report, (
        "what the extra asks for takes the CUDA build"
    )


def test_index_has_the_bills_of_materials(front_wheel: Path, tmp_path: Path) -> None:
    wheel = shutil.copy(front_wheel, tmp_path)
    Path(f"{wheel}.cdx.json").write_text("{}")
    for _ in range(2):
        build_index(wheel, out=tmp_path / "index")
    names = {path.name for path in (tmp_path / "index" / "files").iterdir()}
    assert names == {front_wheel.name, f"{front_wheel.name}.cdx.json", f"{front_wheel.name}.metadata"}


def test_index_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_index(tmp_path / "notes.txt", out=tmp_path / "index")
    assert "is neither a wheel (.whl) nor an sdist (.tar.gz)" in caught.value.stderr


# ---------------------------------------------------------------------------------------------- stand-ins for upstream

UPSTREAM = ("flashinfer/__init__.py", "flashinfer/norm.py", "flashinfer/moe_ep/__init__.py")
USE_ENGINE = """
import importlib.metadata, importlib.util
import torch, flashinfer, engine
assert hasattr(flashinfer, "__version__") and engine.owner == "engine", flashinfer.__file__
assert importlib.util.find_spec("flashinfer.moe_ep") is None and importlib.util.find_spec("flashinfer_cubin") is None
flashinfer.rmsnorm(torch.randn(2, 64), torch.randn(64))
print(importlib.metadata.version("flashinfer-python"))
"""


@pytest.fixture(scope="session")
def engines(index: Path, front_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two indexes: ours with stand-ins, and one as the public one is, with upstream and engines that pin it."""

    def make(folder: Path) -> None:
        pins = ("0.7.2.post1", "0.6.13", "flashinfer-cubin==0.6.13")
        build_index(*(index / "files").glob("*.whl"), out=folder / "ours", stand_ins=pins)
        upstream = [
            *(bare_wheel("flashinfer-python", folder, version=v, modules=UPSTREAM) for v in pins[:2]),
            bare_wheel("flashinfer-cubin", folder, version="0.6.13", modules=("flashinfer_cubin/__init__.py",)),
        ]
        requirements = {
            "1.0": ["flashinfer-python==0.7.2.post1"],
            "0.9": ["flashinfer_python[cu13]==0.6.13", "flashinfer-cubin==0.6.13"],
        }
        pinning = [
            bare_wheel("engine", folder, *requires, version=version, modules=("engine.py",))
            for version, requires in requirements.items()
        ]
        build_index(*upstream, *pinning, out=folder / "public")

    folder = made_once(tmp_path_factory, "engines", make)
    return (folder / "ours" / "simple").as_uri(), (folder / "public" / "simple").as_uri()


def pip_install(environment: Environment, ours: str, public: str, *names: str) -> None:
    environment.install("--index-url", public, "--extra-index-url", ours, *names)


def uv_install(environment: Environment, ours: str, public: str, *names: str) -> None:
    assert UV is not None
    command = [UV, "pip", "install", "--python", str(environment.python), "--no-config", "--no-cache", "--quiet"]
    command += ["--default-index", public, "--index", ours, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
INSTALLERS = [
    pip_install,
    pytest.param(uv_install, marks=pytest.mark.skipif(UV is None, reason="needs uv (extra test)")),
]


@pytest.mark.parametrize("install", INSTALLERS)
@pytest.mark.parametrize("engine, upstream", [("1.0", "0.7.2.post1"), ("0.9", "0.6.13")])
def test_an_engine_that_pins_upstream_gets_ours(
    install: Callable[..., None], engine: str, upstream: str, engines: tuple[str, str], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    environment.make()
    install(environment, *engines, f"engine=={engine}", "flashinfer")
    version = environment.run("-c", USE_ENGINE, cwd=tmp_path).strip()
    assert version == f"{upstream}+{__version__}"
    report = environment.run("-m", "flashinfer", "doctor", cwd=tmp_path)
    assert f"flashinfer-python {version} stands in for flashinfer-python {upstream}" in report
    assert re.search(r"files +ok +\d+ files, all as installed", report)


@pytest.mark.parametrize("install", INSTALLERS)
def test_switching_an_environment_that_has_upstream(
    install: Callable[..., None], engines: tuple[str, str], tmp_path: Path
) -> None:
    """docs/switching.md uninstalls upstream first: pip removes its files after it has written ours over them."""
    environment = Environment(tmp_path / "venv")
    environment.make()
    install(environment, engines[1], engines[1], "engine==0.9")
    assert (environment.site / "flashinfer" / "moe_ep").exists()
    uninstall(environment, "flashinfer-python", "flashinfer-cubin")
    install(environment, *engines, "engine==0.9", "flashinfer")
    assert environment.run("-c", USE_ENGINE, cwd=tmp_path).strip() == f"0.6.13+{__version__}"


def test_doctor_finds_upstream_below_ours(engines: tuple[str, str], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.make()
    pip_install(environment, engines[1], engines[1], "engine==1.0")
    pip_install(environment, *engines, "--no-deps", "--ignore-installed", "flashinfer")
    report = environment.run("-m", "flashinfer", "doctor", cwd=tmp_path)
    assert re.search(r"upstream +warning +flashinfer-python 0.7.2.post1 installed beside this library", report)
    assert re.search(r"files +warning .*engines find it: moe_ep\n", report)


def uninstall(environment: Environment, *names: str) -> None:
    pip("--python", environment.python, "uninstall", "--quiet", "--yes", *names)


def test_stand_ins_are_metadata_alone(front_wheel: Path, tmp_path: Path) -> None:
    build_index(front_wheel, out=tmp_path / "index", stand_ins=("0.7.2",))
    wheel = tmp_path / "index" / "files" / f"flashinfer_python-0.7.2+{__version__}-{PURE}.whl"
    assert {name.partition("/")[0] for name in names_in(wheel)} == {f"flashinfer_python-0.7.2+{__version__}.dist-info"}
    required = metadata_of(wheel).get_all("Requires-Dist", [])
    assert f"flashinfer=={__version__}" in required
    assert f'flashinfer[cu13]=={__version__}; extra == "cu13"' in required
    assert (tmp_path / "index" / "simple" / "flashinfer-python" / "index.html").exists(), "in every index"
    content = wheel.read_bytes()
    build_index(front_wheel, out=tmp_path / "again", stand_ins=("0.7.2",))
    assert (tmp_path / "again" / "files" / wheel.name).read_bytes() == content


@pytest.mark.parametrize(
    "pin, what",
    [
        ("0.7.2+cu130", "expected a version as engines pin it"),
        ("latest", "expected a version as engines pin it"),
        ("torch==2.11", "expected one of flashinfer-python, flashinfer-cubin, flashinfer-jit-cache"),
    ],
)
def test_stand_ins_of_something_else_are_refused(pin: str, what: str, front_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_index(front_wheel, out=tmp_path / "index", stand_ins=(pin,))
    assert what in caught.value.stderr and not (tmp_path / "index").exists()


def test_stand_ins_need_the_wheel_they_require(host_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_index(host_wheel, out=tmp_path / "index", stand_ins=("0.7.2",))
    assert "0 wheels of flashinfer are given; expected the one it requires" in caught.value.stderr
