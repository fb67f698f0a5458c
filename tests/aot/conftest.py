"""Sets that several files of tests start from, each compiled once. Tests change copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.aot.kit import HOST, OTHER, build_set, copy_set, has_nvrtc, rmsnorm_rows, write_config


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist's `--dist loadgroup`, one process runs the tests of a file that share sets or environments."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.parent == Path(__file__).parent and item.path.stem != "test_core_kernels":
                item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def wide_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rmsnorm of hidden_size 64 and 128 for this machine's CPU and another level: four kernels. Its config.toml lies
    beside it."""
    folder = tmp_path_factory.mktemp("wide")
    report = build_set(write_config(folder, rmsnorm_rows(64, 128)), folder / "set", HOST, OTHER)
    assert report.num_compiled == 4 and not report.failures
    return folder / "set"


@pytest.fixture(scope="session")
def host_set(wide_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two for this machine's CPU."""
    return _part(wide_set, tmp_path_factory.mktemp("host"), HOST)


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
    folder = tmp_path_factory.mktemp("cubins")
    build_set(write_config(folder, rmsnorm_rows(64)), folder / "set", "sm_80", "sm_90a", "sm_100a", "sm_120a", HOST)
    return folder / "set"


@pytest.fixture(scope="session")
def cuda_set(cubins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those for sm_80 and sm_90a."""
    return _part(cubins, tmp_path_factory.mktemp("cuda"), "sm_80", "sm_90a")


def _part(whole: Path, folder: Path, *target_names: str) -> Path:
    part = copy_set(whole, folder / "set")
    report = build_set(whole.parent / "config.toml", part, *target_names, exact=True)
    assert report.num_compiled == 0 and report.removed
    (folder / "config.toml").write_text((whole.parent / "config.toml").read_text())
    return part


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Makes a config of rmsnorm kernels from their hidden sizes."""
    return lambda *hidden_sizes: write_config(tmp_path, rmsnorm_rows(*hidden_sizes), f"{hidden_sizes}.toml")
