# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the two targets, a cache of our own, and the `gpu` marker."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flashinfer import log
from flashinfer.attention import served
from flashinfer.jit import cache_dir


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each target in turn; `cuda` carries the marker `gpu`."""
    return torch.device(request.param)


def pytest_collection_finish() -> None:
    """What is imported by now is left out of garbage collections, which tests ask for: half a second each otherwise."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True, scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All tests of a run share one JIT cache, whichever worker has them, and one of torch.compile, and never touch the
    user's. Set FLASHINFER_CACHE_DIR to keep them between runs."""
    own = tmp_path_factory.getbasetemp()  # of a worker: a folder in that of the run
    new = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "jit-cache"
    folder = Path(os.environ.get("FLASHINFER_CACHE_DIR", new))
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHINFER_CACHE_DIR", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "torchinductor"))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def _no_kernels_of_other_tests() -> Iterator[None]:
    """No test of decode has prefill compiled on a GPU, nor the other way round: that is what servers need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "_is_served", lambda axes: False)
        yield


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    """Each test sees the warnings that a process sees once."""
    log.warn_once.cache_clear()
    cache_dir._temporary.cache_clear()
    yield
    cache_dir._temporary.cache_clear()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
