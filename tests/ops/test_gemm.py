# SPDX-License-Identifier: Apache-2.0
"""bmm_fp8 against the FP64 product."""

from __future__ import annotations

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.tolerances import assert_close

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operands(
    batch: int, m: int, k: int, n: int, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3)
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randn(batch, m, k, generator=generator).to(device, dtypes[0])
    b = torch.randn(batch, n, k, generator=generator).to(device, dtypes[1]).mT
    return a, b, torch.tensor([0.5], device=device), torch.tensor(0.375, device=device)


def product(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double() * (float(a_scale) * float(b_scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)], ids=str)
@pytest.mark.parametrize("batch, m, k, n", [(1, 5, 64, 32), (3, 1, 16, 16), (2, 33, 512, 48), (1, 1, 4096, 128)])
def test_product(
    batch: int, m: int, k: int, n: int, dtypes: tuple[torch.dtype, torch.dtype], dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("PyTorch's scaled product needs sm_89")
    given = operands(batch, m, k, n, device, dtypes)
    ours = flashinfer.bmm_fp8(*given, dtype)
    assert ours.dtype == dtype
    # Hopper keeps some 14 bits of the fp8 products it adds: off by 0.0043, where sums are 12 on average, on an H200.
    assert_close(ours, product(*given), scale=4.0 if device.type == "cuda" and dtype == torch.float16 else 1.0)
    out = torch.full_like(ours, torch.nan)
    assert flashinfer.bmm_fp8(*given, dtype, out=out, backend="auto") is out
    assert torch.equal(out, ours)


def test_a_linear_layer_as_engines_call_it() -> None:
    a, b, *scales = operands(1, 7, 64, 48, torch.device("cpu"))
    rows = a[0][:, :32]  # a part of each row
    assert_close(
        flashinfer.bmm_fp8(rows[None], b[:, :32], *scales, torch.bfloat16, backend="cublas"),
        product(rows[None], b[:, :32], *scales),
    )


def test_empty() -> None:
    for batch, m in ((0, 5), (2, 0)):
        given = operands(batch, m, 32, 16, torch.device("cpu"))
        assert flashinfer.bmm_fp8(*given, torch.float16).shape == (batch, m, 16)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"A": torch.zeros(1, 5, 32)}, UnsupportedConfig, "A is torch.float32"),
        ({"dtype": torch.float32}, UnsupportedConfig, "dtype is torch.float32"),
        ({"A": torch.zeros(1, 5, 16).to(E4M3)}, ValueError, r"A is \[1, 5, 16\], B \[1, 32, 16\]"),
        ({"A": torch.zeros(5, 32).to(E4M3)}, ValueError, r"A is \[5, 32\]"),
        ({"B": torch.zeros(1, 32, 16).to(E4M3)}, ValueError, "expected each matrix column-major"),
        ({"A": torch.zeros(1, 32, 5).to(E4M3).mT}, ValueError, "expected each matrix row-major"),
        ({"A_scale": torch.ones(5)}, ValueError, "A_scale is torch.float32 .5.; expected one element"),
        ({"B_scale": 1.0}, TypeError, "B_scale is float; expected a tensor"),
        ({"out": torch.zeros(1, 5, 17)}, ValueError, "out is torch.float32"),
        ({"out": torch.zeros(5, 16).bfloat16().expand(2, 5, 16)}, ValueError, "elements of out overlap"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("A", "B", "A_scale", "B_scale")
    batch = len(change.get("out", "1"))  # type: ignore[arg-type]
    given = dict(zip(names, operands(batch, 5, 32, 16, torch.device("cpu"))), dtype=torch.bfloat16)
    with pytest.raises(error, match=message):
        flashinfer.bmm_fp8(**{**given, **change})
