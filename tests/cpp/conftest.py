# SPDX-License-Identifier: Apache-2.0
"""The C interface, compiled once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer.aot.recipes import write as write_recipes
from tests.aot.kit import HOST, build_set, copy_set, made_once, rmsnorm_rows, write_config
from tests.cpp.kit import ROOT, Api, compile_program


@pytest.fixture(scope="session")
def c_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        flags = ("-shared", "-fPIC", "-fvisibility=hidden")
        compile_program(ROOT / "cpp" / "c_api.cpp", folder / "libflashinfer_c.so", *flags)

    return made_once(tmp_path_factory, "c-api", make) / "libflashinfer_c.so"


@pytest.fixture(scope="session")
def api(c_library: Path) -> Api:
    return Api(c_library)


@pytest.fixture(scope="session")
def host_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RMSNorm of 64 and 128 elements for this machine's CPU, as a build writes it."""

    def make(folder: Path) -> None:
        build_set(write_config(folder, rmsnorm_rows(64, 128)), folder / "set", HOST)

    return made_once(tmp_path_factory, "cpp-host", make) / "set"


@pytest.fixture
def host_copy(host_set: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    return copy_set(host_set, tmp_path / "set")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        compile_program(ROOT / "tests" / "cpp" / "pretended_driver.cpp", folder / "libcuda.so.1", "-shared", "-fPIC")

    return made_once(tmp_path_factory, "driver", make)


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a target's recipes."""

    def of(target: str) -> Path:
        def make(folder: Path) -> None:
            write_recipes(folder / "recipes.json", [target])

        return made_once(tmp_path_factory, f"recipes-{target}", make) / "recipes.json"

    return of
