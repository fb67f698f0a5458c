# SPDX-License-Identifier: Apache-2.0
"""Sets and wheels that several files of tests start from, each made once for all workers. Tests change copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.aot.kit import HOST, OTHER, build_set, copy_set, has_nvrtc, made_once, rmsnorm_rows, write_config
from tests.aot.wheels_kit import (
    Environment,
    bare_wheel,
    build_index,
    metadata_of,
    only_wheel,
    sdist_of,
    wheel_of,
)
from tests.kit import ROOT


@pytest.fixture(scope="session")
def wide_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rmsnorm of hidden_size 64 and 128 for this machine's CPU and another level: four kernels. Its config.toml lies
    beside it."""

    def make(folder: Path) -> None:
        report = build_set(write_config(folder, rmsnorm_rows(64, 128)), folder / "set", HOST, OTHER)
        assert report.num_compiled == 4 and not report.failures

    return made_once(tmp_path_factory, "wide", make) / "set"


@pytest.fixture(scope="session")
def host_set(wide_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two for this machine's CPU."""
    return made_once(tmp_path_factory, "host", lambda folder: _part(wide_set, folder, HOST)) / "set"


@pytest.fixture
def host_copy(host_set: Path, tmp_path: Path) -> Path:
    return copy_set(host_set, tmp_path / "set")


@pytest.fixture
def wide_copy(wide_set: Path, tmp_path: Path) -> Path:
    return copy_set(wide_set, tmp_path / "set")


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rmsnorm of hidden_size 64 for a GPU of each kind and this machine's CPU."""
    if not has_nvrtc():
        pytest.skip("needs NVRTC")

    def make(folder: Path) -> None:
        names = ("sm_80", "sm_90a", "sm_100a", "sm_120a", HOST)
        assert build_set(write_config(folder, rmsnorm_rows(64)), folder / "set", *names).num_compiled == len(names)

    return made_once(tmp_path_factory, "cubins", make) / "set"


@pytest.fixture(scope="session")
def cuda_set(cubins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those for sm_80 and sm_90a."""
    return made_once(tmp_path_factory, "cuda", lambda folder: _part(cubins, folder, "sm_80", "sm_90a")) / "set"


def _part(whole: Path, folder: Path, *target_names: str) -> None:
    config = write_config(folder, (whole.parent / "config.toml").read_text())
    report = build_set(config, copy_set(whole, folder / "set"), *target_names, exact=True)
    assert report.num_compiled == 0 and report.removed


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Makes a config of rmsnorm kernels from their hidden sizes."""
    return lambda *hidden_sizes: write_config(tmp_path, rmsnorm_rows(*hidden_sizes), f"{hidden_sizes}.toml")


@pytest.fixture(scope="session")
def front_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return only_wheel(made_once(tmp_path_factory, "front_wheel", lambda folder: wheel_of(ROOT, folder)))


@pytest.fixture(scope="session")
def front_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_once(tmp_path_factory, "front_sdist", lambda folder: sdist_of(ROOT, folder / "made"))
    return next((folder / "made").iterdir())


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


@pytest.fixture(scope="session")
def installed(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """After `pip install "flashinfer[aot]"` from the index."""

    def make(folder: Path) -> None:
        environment = Environment(folder / "venv")
        environment.make()
        environment.install("flashinfer[aot]", "--index-url", (index / "simple").as_uri())

    return Environment(made_once(tmp_path_factory, "installed", make) / "venv")
