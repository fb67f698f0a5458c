# SPDX-License-Identifier: Apache-2.0
"""Launch values are given by name: what is unknown, missing, given twice or out of place never reaches a kernel."""

from __future__ import annotations

import pytest
import torch

from flashinfer.jit.loader import Launcher
from tests.kit import cpu_resolver, rmsnorm_spec, rmsnorm_values

GRID = (1, 1, 1)
ADDRESSES = ("input", "residual", "weight", "bias", "output")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return cpu_resolver(tmp_path_factory.mktemp("cache")).load(rmsnorm_spec()).on(None)


@pytest.fixture
def values() -> dict[str, int | float | bytes]:
    rows = torch.zeros(2, 64)
    return rmsnorm_values(rows, rows[0], rows)


def test_every_field_by_name(launcher: Launcher) -> None:
    x, weight, out = torch.randn(2, 64), torch.ones(64), torch.full((2, 64), torch.nan)
    values = rmsnorm_values(x, weight, out)
    constants = {name: value for name, value in values.items() if name not in ADDRESSES}
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    launcher(GRID, 0, dict(reversed(values.items())))  # their order is of no matter
    torch.testing.assert_close(out, expected)
    out.fill_(torch.nan)
    launch = launcher.prepare(GRID, constants, varying=ADDRESSES)
    launch(x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr())
    torch.testing.assert_close(out, expected)


FAULTS = {
    "unknown": ({"episilon": 1e-6}, (), ADDRESSES, "episilon: unknown"),
    "missing": ({}, ("eps", "num_rows"), ADDRESSES, "num_rows, eps: missing"),
    "given twice": ({"weight": 0}, (), ADDRESSES, "weight: given twice"),
    "varying twice": ({}, (), (*ADDRESSES, "output"), "given twice"),
    "unknown and varying": ({}, (), (*ADDRESSES[:4], "outptu"), "outptu: unknown; output: missing"),
    "behind what is fixed": ({"input": 0}, (), ADDRESSES[1:], "but not the first fields in order"),
    "out of order": ({}, (), ("residual", "input", *ADDRESSES[2:]), "residual, input: varying, but not the first"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_the_struct(name: str, launcher: Launcher, values: dict[str, int | float | bytes]) -> None:
    added, removed, varying, message = FAULTS[name]
    constants = {key: value for key, value in values.items() if key not in ADDRESSES and key not in removed}
    with pytest.raises(ValueError, match=f"values of NormParams: .*{message}"):
        launcher.prepare(GRID, {**constants, **added}, varying=varying)


@pytest.mark.parametrize("on", ["unknown", "missing"])
def test_a_launch_without_preparation(on: str, launcher: Launcher, values: dict[str, int | float | bytes]) -> None:
    values = {**values, "typo": 1} if on == "unknown" else {key: values[key] for key in list(values)[1:]}
    with pytest.raises(ValueError, match=f"values of NormParams: (typo|input): {on}"):
        launcher(GRID, 0, values)
