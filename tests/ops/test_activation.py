# SPDX-License-Identifier: Apache-2.0
"""Gated activations against the FP64 oracle, on both targets."""

from __future__ import annotations

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.oracles.activation import act_and_mul
from tests.tolerances import assert_close

OPS = {"silu": flashinfer.silu_and_mul, "gelu": flashinfer.gelu_and_mul, "gelu_tanh": flashinfer.gelu_tanh_and_mul}
# name -> (leading shape, hidden_size)
SHAPES = {
    "ordinary": ((7,), 14336),
    "one row": ((1,), 512),
    "odd": ((5,), 111),
    "empty batch": ((0,), 64),
    "no columns": ((3,), 0),
    "three axes": ((2, 3), 96),
}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(shape, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gate", OPS)
def test_act_and_mul(device: torch.device, gate: str, dtype: torch.dtype, name: str) -> None:
    leading, hidden_size = SHAPES[name]
    x = make((*leading, 2 * hidden_size), dtype, device)
    out = torch.full((*leading, hidden_size), float("nan"), dtype=dtype, device=device)
    assert OPS[gate](x, out=out) is out
    assert_close(out, act_and_mul(gate, x))
    assert_close(OPS[gate](x), act_and_mul(gate, x))


@pytest.mark.parametrize("gate", OPS)
def test_tails(device: torch.device, gate: str) -> None:
    """Far from zero the gates are 0 and x, without NaN from an overflowing exponential."""
    x = torch.tensor([[-1e4, -80.0, -0.0, 0.0, 80.0, 1e4, *[1.0] * 6]], device=device)
    assert_close(OPS[gate](x), act_and_mul(gate, x))


@pytest.mark.sanitizer
def test_strided_and_misaligned_rows(device: torch.device) -> None:
    wide = make((6, 600), torch.bfloat16, device)
    for offset in (0, 1, 2, 4, 8):
        x = wide[:, offset : offset + 512]
        assert_close(flashinfer.silu_and_mul(x), act_and_mul("silu", x))


def test_errors_name_the_argument(device: torch.device) -> None:
    x = make((4, 64), torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"silu_and_mul: input has shape \[4, 63\].*an even last dimension"):
        flashinfer.silu_and_mul(x[:, :63])
    with pytest.raises(ValueError, match=r"out has shape \[4, 64\]; expected \[4, 32\]"):
        flashinfer.silu_and_mul(x, out=torch.empty_like(x))
    with pytest.raises(ValueError, match=r"rows of input \(strides .*\) lie unevenly in memory"):
        flashinfer.silu_and_mul(make((3, 4, 6, 64), torch.bfloat16, device)[:, :2, :3])
    with pytest.raises(UnsupportedConfig, match=r"input is torch.float64"):
        flashinfer.silu_and_mul(x.double())
