# SPDX-License-Identifier: Apache-2.0
"""The kernels that tests ask for on a GPU, noted without one, so that a GPU's time goes to running them:

    python -m pytest -p tests.aot.ask_tests --ask build/asked -m "gpu and not slow and not fuzz" -n 2 -q --tb=no
    scripts/build_aot.py --add build/asked --target sm_90a --out build/of-tests
    FLASHINFER_AOT_PATH=build/of-tests python -m pytest -m "gpu and not slow and not fuzz"      # on the GPU

Kernels do nothing here, so that tests fail whose results are looked at by more than assert_close. What they would have
asked for behind that is compiled on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Union

import pytest
import torch

from flashinfer import target as targets
from flashinfer.jit.loader import Kernel
from flashinfer.jit.misses import MissLog, Spent
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.spec import KernelSpec
from tests import tolerances
from tests.aot.pretended_gpus import GPUS, Idle, install


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ask", type=Path, required=True, metavar="FOLDER", help="where records of kernels go")
    parser.addoption("--ask-target", default="sm_90a", choices=GPUS, help="of which GPU (default: sm_90a)")


def pytest_configure(config: pytest.Config) -> None:
    log, load, asked = MissLog(config.getoption("--ask")), Resolver.load, set[KernelSpec]()

    def note(resolver: Resolver, spec: KernelSpec) -> Union[Kernel, Idle]:
        if targets.kind(spec.target) == "cpu":
            return load(resolver, spec)
        asked.add(spec)
        log.record(spec, "asked for by a test", "failed", Spent(), 0)
        return Idle(spec)

    def expect(resolver: Resolver, requests: Iterable[KernelSpec]) -> None: ...

    def holds(resolver: Resolver, spec: KernelSpec) -> bool:
        return spec in asked

    Resolver.load, Resolver.expect, Resolver.holds = note, expect, holds  # type: ignore[assignment, method-assign]
    install(GPUS[config.getoption("--ask-target")][:1])
    torch.testing.assert_close = tolerances.assert_close = lambda *_, **__: None  # type: ignore[assignment]
