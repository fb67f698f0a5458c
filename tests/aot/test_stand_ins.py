# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for upstream's distributions: an engine that pins those gets ours (test_index.py says how it installs)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.version import __version__
from tests.aot.kit import (
    made_once,
)
from tests.aot.wheels_kit import (
    PURE,
    Environment,
    bare_wheel,
    build_index,
    metadata_of,
    names_in,
    pip,
)
from tests.kit import PATIENCE_SECONDS

pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (group test)")


UPSTREAM = ("flashinfer/__init__.py", "flashinfer/norm.py", "flashinfer/moe_ep/__init__.py")
USE_ENGINE = """
import importlib.metadata, importlib.util
import torch, flashinfer, engine
assert hasattr(flashinfer, "__version__") and engine.owner == "engine", flashinfer.__file__
assert importlib.util.find_spec("flashinfer.moe_ep") is None and importlib.util.find_spec("flashinfer_cubin") is None
flashinfer.rmsnorm(torch.randn(2, 64), torch.randn(64))
print(importlib.metadata.version("flashinfer-python"))
from flashinfer.cli import main
main(["doctor"])
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr


UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
INSTALLERS = [
    pip_install,
    pytest.param(uv_install, marks=pytest.mark.skipif(UV is None, reason="needs uv (group test)")),
]


@pytest.mark.parametrize("install", INSTALLERS)
def test_an_engine_that_pins_upstream_gets_ours(
    install: Callable[..., None], engines: tuple[str, str], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    environment.make()
    install(environment, *engines, "engine==1.0", "flashinfer")
    assert_ours(environment, "0.7.2.post1", tmp_path)


@pytest.mark.parametrize("install", INSTALLERS)
def test_switching_an_environment_that_has_upstream(
    install: Callable[..., None], engines: tuple[str, str], tmp_path: Path
) -> None:
    """docs/switching.md uninstalls upstream first: pip removes its files after it has written ours over them. The
    engine pins a second distribution too, and the first with an extra and under its other spelling."""
    environment = Environment(tmp_path / "venv")
    environment.make()
    install(environment, engines[1], engines[1], "engine==0.9")
    assert (environment.site / "flashinfer" / "moe_ep").exists()
    uninstall(environment, "flashinfer-python", "flashinfer-cubin")
    install(environment, *engines, "engine==0.9", "flashinfer")
    assert_ours(environment, "0.6.13", tmp_path)


def assert_ours(environment: Environment, upstream: str, folder: Path) -> None:
    version, _, report = environment.run("-c", USE_ENGINE, cwd=folder).partition("\n")
    assert version == f"{upstream}+{__version__}"
    assert f"flashinfer-python {version} stands in for flashinfer-python {upstream}" in report
    assert re.search(r"files +ok +\d+ files, all as installed", report)


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
