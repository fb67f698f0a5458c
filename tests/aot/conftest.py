"""Sets that several files of tests start from, each compiled once for all workers. Tests change copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.aot.kit import HOST, OTHER, build_set, copy_set, has_nvrtc, made_once, rmsnorm_rows, write_config


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
