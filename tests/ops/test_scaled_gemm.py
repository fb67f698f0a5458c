# SPDX-License-Identifier: Apache-2.0
"""Products of fp8 operands with scales of blocks against the FP64 product of what these stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import pytest
import torch

from flashinfer import target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import gemm as families
from flashinfer.gemm import (
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
    launch,
)
from tests.oracles import gemm as oracle
from tests.tolerances import assert_close

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_other_launches() -> Iterator[None]:
    """Launches that another test prepared, of another tile."""
    launch._memo.clear()
    yield
    launch._memo.clear()


class Operands(NamedTuple):
    """Scales by depth last ("K")."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor

    def expected(self) -> torch.Tensor:
        return oracle.dequantized(self.a, self.a_scale) @ oracle.dequantized(self.b, self.b_scale).mT


def draw(device: torch.device, m: int, n: int, k: int, num_weights: Optional[int] = None) -> Operands:
    make = torch.Generator().manual_seed(m + 3 * n + 5 * k)
    shape = () if num_weights is None else (num_weights,)
    blocks = -(-k // 128)
    return Operands(
        torch.randn(m, k, generator=make).to(device, E4M3),
        torch.randn(*shape, n, k, generator=make).to(device, E4M3),
        # As far apart as scales of activations are: what is scaled late would show.
        (10.0 ** (2 * torch.rand(m, blocks, generator=make) - 1)).to(device),
        (0.01 + torch.rand(*shape, -(-n // 128), blocks, generator=make)).to(device),
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of the matrix unit on Hopper keep some 14 bits of 128 products; scales here differ by 100 among blocks."""
    size = expected.abs().amax().item()
    scale = 4.0 if actual.is_cuda else 1.0
    assert_close((actual.double() / size * 16).to(actual.dtype), expected / size * 16, scale=scale)


SIZES = [(1, 128, 128), (5, 8, 16), (7, 200, 400), (64, 128, 256), (65, 136, 384), (130, 264, 1024), (300, 576, 512)]


@pytest.mark.sanitizer
@pytest.mark.parametrize("m, n, k", SIZES)
def test_product(device: torch.device, m: int, n: int, k: int) -> None:
    given = draw(device, m, n, k)
    close(gemm_fp8_nt_groupwise(*given, "K"), given.expected())


def test_layouts_of_scales(device: torch.device) -> None:
    given = draw(device, 70, 200, 640)
    ours = gemm_fp8_nt_groupwise(*given, "K")
    turned = [scale.mT.contiguous() for scale in given[2:]]
    assert torch.equal(gemm_fp8_nt_groupwise(*given[:2], *turned, "MN"), ours)
    assert torch.equal(gemm_fp8_nt_groupwise(*given), ours)  # by their shapes
    assert torch.equal(gemm_fp8_nt_groupwise(*given[:2], *turned), ours)
    of_trtllm = turned[0].mT, turned[1]
    assert torch.equal(gemm_fp8_nt_groupwise(*given[:2], *of_trtllm, backend="trtllm"), ours)
    wide = torch.full((70, 11), torch.nan, device=device)
    wide[:, 1::2] = given.a_scale
    assert torch.equal(gemm_fp8_nt_groupwise(*given[:2], wide[:, 1::2], given.b_scale, "K"), ours)
    either = draw(device, 2, 256, 256)
    with pytest.raises(ValueError, match="may be either way"):
        gemm_fp8_nt_groupwise(*either)


def test_outputs(device: torch.device) -> None:
    given = draw(device, 33, 136, 256)
    out = torch.full((33, 200), torch.nan, dtype=FP16, device=device)
    part = out[:, 32:168]
    assert gemm_fp8_nt_groupwise(*given, "K", out=part) is part
    close(part.contiguous(), given.expected())
    assert out[:, :32].isnan().all() and out[:, 168:].isnan().all()
    assert torch.equal(gemm_fp8_nt_groupwise(*given, "K", out_dtype=FP16), part)


def test_parts_of_rows(device: torch.device) -> None:
    """What lies beside operands is not used, whatever it is."""
    given = draw(device, 33, 136, 256)
    a, b = (torch.full((2 * len(x), 320), 0x7F, dtype=torch.uint8, device=device).view(E4M3) for x in given[:2])
    a.view(torch.uint8)[:33, 32:288] = given.a.view(torch.uint8)
    b.view(torch.uint8)[:136, 32:288] = given.b.view(torch.uint8)
    close(gemm_fp8_nt_groupwise(a[:33, 32:288], b[:136, 32:288], *given[2:], "K"), given.expected())


@pytest.mark.parametrize("lengths", [(5,), (0, 3, 0, 70, 0), (64, 1, 130), (1,) * 40], ids=str)
@pytest.mark.parametrize("mode", ["MN", "K"])
def test_groups(device: torch.device, mode: str, lengths: tuple[int, ...]) -> None:
    given = draw(device, sum(lengths), 136, 384, len(lengths))
    indptr = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    a_scale, b_scale = (x.mT.contiguous() if mode == "MN" else x for x in given[2:])
    ours = group_gemm_fp8_nt_groupwise(given.a, given.b, a_scale, b_scale, indptr.to(device), scale_major_mode=mode)
    close(ours, of_groups(given, indptr))


def of_groups(given: Operands, indptr: torch.Tensor) -> torch.Tensor:
    a, b = oracle.dequantized(given.a, given.a_scale), oracle.dequantized(given.b, given.b_scale)
    parts = [a[begin:end] @ b[i].T for i, (begin, end) in enumerate(zip(indptr.tolist(), indptr[1:].tolist()))]
    return torch.cat(parts)


def test_rows_of_no_group(device: torch.device) -> None:
    given = draw(device, 20, 16, 128, 2)
    out = torch.full((20, 16), 7.0, dtype=BF16, device=device)
    indptr = torch.tensor([3, 9, 14], device=device)
    group_gemm_fp8_nt_groupwise(*given, indptr, scale_major_mode="K", out=out)
    assert (out[:3] == 7.0).all() and (out[14:] == 7.0).all()
    close(out[3:14].contiguous(), of_groups(given, indptr.cpu()))


# ------------------------------------------------------------------------------------------------------ 16-bit operands


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("m", [1, 9, 130])
def test_input_of_16_bits(device: torch.device, m: int, dtype: torch.dtype) -> None:
    given = draw(device, m, 192, 256)
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).to(device, dtype)
    x[0, :128] = 0
    values, scale = oracle.quantized(x)
    weight = oracle.dequantized(given.b, given.b_scale)
    expected = values * scale.repeat_interleave(128, dim=1) @ weight.cpu().T
    # A value halfway between two of 8 bits falls to either, as its scale was rounded.
    ours = fp8_blockscale_gemm_sm90(x, given.b, None, given.b_scale)
    assert ours.dtype == BF16
    error = (ours.cpu().double() - expected).norm() / expected.norm()
    assert error < 6e-3
    exact = x.cpu().double() @ weight.cpu().T
    assert ((ours.cpu().double() - exact).norm() / exact.norm()) < 0.04


def test_weight_of_16_bits(device: torch.device) -> None:
    """Its rows have scales of their own, as those of an fp8 weight may."""
    make = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 256, generator=make).to(device, BF16) for rows in (70, 136))
    weight[5] *= 100  # beside small ones
    ours = fp8_blockscale_gemm_sm90(x, weight)
    exact = x.cpu().double() @ weight.cpu().double().T
    error = (ours.cpu().double() - exact).norm(dim=0) / exact.norm(dim=0)
    assert error.max() < 0.06


def test_scales_of_rows_of_the_weight(device: torch.device) -> None:
    given = draw(device, 33, 136, 256)
    per_row = 0.01 + torch.rand(136, 2, generator=torch.Generator().manual_seed(1)).to(device)
    ours = fp8_blockscale_gemm_sm90(given.a, given.b, given.a_scale, per_row, out_dtype=FP16)
    close(ours, given._replace(b_scale=per_row).expected())


def test_rows_of_no_elements(device: torch.device) -> None:
    weight = draw(device, 1, 128, 128)
    x = torch.empty(0, 128, dtype=BF16, device=device)
    assert fp8_blockscale_gemm_sm90(x, weight.b, None, weight.b_scale).shape == (0, 128)


def test_extremes(device: torch.device) -> None:
    """Zeros, the smallest and the largest numbers, and what is none, each in a row that no other feels."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)).to(BF16)
    x[0], x[1, :128], x[2, 5], x[3, 7] = 0, 1e-38, torch.finfo(BF16).max, torch.nan
    weight = torch.eye(256)[:, :256].to(E4M3)
    ones = torch.ones(2, 2)
    ours = fp8_blockscale_gemm_sm90(x.to(device), weight.to(device), None, ones.to(device)).cpu()
    assert (ours[0] == 0).all() and (ours[1, :128].abs() <= 1e-37).all()
    assert ours[2, 5] == torch.finfo(BF16).max or ours[2, 5] > 3e38
    torch.testing.assert_close(ours[1:3, 128:].float(), x[1:3, 128:].float(), rtol=0.07, atol=0.02)
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):  # else it is 480 (kv_codec.cuh)
        assert ours[3].isnan().all()


# ---------------------------------------------------------------------------------------------------------------- tiles


def all_tiles() -> list[str]:
    return [*families.SCALED_TILES, *families.SM90_SCALED_TILES]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", all_tiles())
def test_tiles(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, whatever a size would choose: rows, columns and depth that end within a tile; many tiles a block;
    fewer steps of the depth than stages, and than splits."""
    device = torch.device("cuda")
    if tile in families.SM90_SCALED_TILES and "sm_90a" not in target.candidates(target.of_device(device)):
        pytest.skip("of Hopper")
    force(tile, monkeypatch)
    for m, n, k in ((300, 712, 1040), (1, 8, 128), (257, 4160, 256), (64, 576, 7168), (2049, 2112, 640)):
        given = draw(device, m, n, k)
        ours = gemm_fp8_nt_groupwise(*given, "K")
        close(ours, given.expected())
        given = given._replace(a_scale=side_by_side(given.a_scale))
        assert torch.equal(gemm_fp8_nt_groupwise(*given, "K"), ours)
    splits = families.SM90_SCALED_TILES[tile].splits if tile in families.SM90_SCALED_TILES else 1
    if splits == 1:
        lengths = (3, 0, 200, 64, 0, 300, *(1,) * 40, 129)
        given = draw(device, sum(lengths), 328, 528, len(lengths))
        indptr = torch.tensor((0, *lengths)).cumsum(0)
        ours = group_gemm_fp8_nt_groupwise(*given, indptr.to(device), scale_major_mode="K")
        close(ours, of_groups(given, indptr))
        given = given._replace(a_scale=side_by_side(given.a_scale))
        again = group_gemm_fp8_nt_groupwise(*given, indptr.to(device), scale_major_mode="K")
        assert torch.equal(again, ours)


def side_by_side(scale: torch.Tensor) -> torch.Tensor:
    """The same, of rows that are neighbours in memory, as TMA takes them; what lies beside is none."""
    num_rows, blocks = scale.shape
    padded = torch.full((blocks, -(-num_rows // 4) * 4), torch.nan, device=scale.device)
    padded[:, :num_rows] = scale.T
    return padded.T[:num_rows]


def force(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose: Callable[..., Any] = families.group_gemm

    def chosen(*args: Any, **axes: Any) -> Any:
        spec = choose(*args, **axes)
        return families.GROUP_GEMM.spec(spec.target, **{**dict(spec.args), "tile": tile})

    monkeypatch.setattr(families, "group_gemm", chosen)


def test_which_tile_a_size_has() -> None:
    """Every size has one, of every GPU; short ones on Hopper divide the depth among as many blocks as run."""

    def tile_of(target_name: str, m: int, n: int, k: int, groups: Optional[int] = None) -> str:
        spec = families.group_gemm(
            target_name, dtype="fp8_e4m3", out_dtype="bf16", depth_major=True, scale_columns=128, num_rows=m,
            num_groups=groups, num_columns=n, depth=k, num_sms=132,
        )  # fmt: skip
        families.GROUP_GEMM.config(spec)
        return str(spec.arg("tile"))

    for m in (1, 16, 17, 64, 65, 128, 129, 1000, 4096, 100000):
        for n, k in ((8, 128), (2112, 7168), (4096, 7168), (7168, 2048), (24576, 1536)):
            assert tile_of("sm_80", m, n, k) in families.TILES
            assert tile_of("sm_120a", m, n, k) in families.TILES
            assert tile_of("sm_90a", m, n, k) in families.SM90_SCALED_TILES
            assert tile_of("sm_90a", m, n, k, 16) in families.SM90_SCALED_TILES


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"a": torch.zeros(7, 256)}, UnsupportedConfig, "a is torch.float32; expected torch.float8_e4m3fn"),
        ({"b": torch.zeros(136, 256).to(torch.float8_e5m2)}, UnsupportedConfig, "b is torch.float8_e5m2"),
        ({"a": torch.zeros(256).to(E4M3)}, ValueError, r"a has shape \[256\]; expected 2 dimensions"),
        ({"b": torch.zeros(136, 128).to(E4M3)}, ValueError, r"a is \[7, 256\], b \[1, 136, 128\]"),
        ({"a_scale": torch.ones(7, 3)}, ValueError, r"scales are torch.float32 \[7, 3\]"),
        ({"a_scale": torch.ones(7, 2).double()}, ValueError, r"scales are torch.float64"),
        ({"b_scale": torch.ones(3, 2)}, ValueError, r"expected torch.float32 \[7, 2\] and \[1, 2 or 136, 2\]"),
        ({"a_scale": 1.0}, TypeError, "a_scale is float; expected a tensor"),
        ({"scale_major_mode": "N"}, ValueError, "scale_major_mode is 'N'"),
        ({"scale_granularity_mnk": (1, 1, 128)}, UnsupportedConfig, r"scale_granularity_mnk is \(1, 1, 128\)"),
        ({"out": torch.zeros(7, 128, dtype=BF16)}, ValueError, r"output has shape \[7, 128\]"),
        ({"out": torch.zeros(7, 136)}, UnsupportedConfig, "out is torch.float32"),
        ({"out": torch.zeros(7, 136, dtype=BF16), "out_dtype": FP16}, ValueError, "expected one dtype"),
        ({"out_dtype": torch.float32}, UnsupportedConfig, "out_dtype is torch.float32"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {**draw(CPU, 7, 136, 256)._asdict(), "scale_major_mode": "K", **change}
    with pytest.raises(error, match=message):
        gemm_fp8_nt_groupwise(**given)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"m_indptr": torch.tensor([0, 3, 8])}, IndexError, "indptr ends at 8; expected at most 7, the rows of a"),
        ({"m_indptr": torch.tensor([0, 5, 3])}, ValueError, "never descend"),
        ({"m_indptr": torch.tensor([0, 1, 2, 7])}, ValueError, "3 groups have 2 weights"),
        ({"m_indptr": [0, 3, 7]}, ValueError, "m_indptr is no tensor"),
        ({"scale_major_mode": None}, ValueError, "scale_major_mode is None"),
        ({"b": torch.zeros(136, 256).to(E4M3)}, ValueError, "b has shape .136, 256.; expected 3 dimensions"),
    ],
)
def test_wrong_arguments_of_groups(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = draw(CPU, 7, 136, 256, 2)._asdict()
    given = {**given, "m_indptr": torch.tensor([0, 3, 7]), "scale_major_mode": "K", **change}
    with pytest.raises(error, match=message):
        group_gemm_fp8_nt_groupwise(**given)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.zeros(7, 256)}, UnsupportedConfig, "input is torch.float32"),
        ({"input": torch.zeros(7, 200, dtype=BF16)}, ValueError, r"input has shape \[7, 200\], weight \[136, 256\]"),
        ({"weight_scale": None}, ValueError, "weight_scale is None"),
        ({"input_scale": torch.ones(7, 2)}, ValueError, "input_scale is given"),
        ({"input": torch.zeros(7, 256).to(E4M3)}, ValueError, "input_scale is None"),
        ({"input": torch.zeros(7, 256).to(E4M3), "weight": torch.zeros(8, 256, dtype=BF16)}, UnsupportedConfig, "too"),
        ({"input": torch.zeros(256, dtype=BF16)}, ValueError, "expected 2 dimensions"),
        ({"out_dtype": torch.int8}, UnsupportedConfig, "out_dtype is torch.int8"),
    ],
)
def test_wrong_arguments_of_16_bits(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = draw(CPU, 7, 136, 256)
    x = torch.zeros(7, 256, dtype=BF16)
    with pytest.raises(error, match=message):
        fp8_blockscale_gemm_sm90(**{"input": x, "weight": given.b, "weight_scale": given.b_scale, **change})


def test_depths_that_cannot_be_quantized() -> None:
    x = torch.zeros(3, 192, dtype=BF16)
    with pytest.raises(UnsupportedConfig, match="expected k in multiples of 128"):
        fp8_blockscale_gemm_sm90(x, torch.zeros(8, 192).to(E4M3), None, torch.ones(1, 2))
