# SPDX-License-Identifier: Apache-2.0
"""SegmentGEMMWrapper against the FP64 product of every segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import pytest
import torch

from flashinfer import SegmentGEMMWrapper, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import gemm as families
from flashinfer.gemm import launch
from tests.oracles import gemm as oracle
from tests.tolerances import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


class Problem(NamedTuple):
    x: torch.Tensor
    weights: torch.Tensor  # [num_weights, d_out, d_in]
    lengths: tuple[int, ...]
    indices: Optional[tuple[int, ...]]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def indptr(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]

    def index(self, values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def run(self, column_major: bool = True, **given: Any) -> torch.Tensor:
        weights = self.weights if column_major else self.weights.mT.contiguous()
        if "seg_lens" not in given and "seg_indptr" not in given:
            given["seg_indptr"] = self.index(self.indptr)
        if self.indices is not None and "weight_indices" not in given:
            given["weight_indices"] = self.index(self.indices)
        wrapper = SegmentGEMMWrapper(torch.empty(1, device=self.device))
        return wrapper.run(self.x, weights, len(self.lengths), column_major, **given)

    def expected(self, untouched: float = 0.0) -> torch.Tensor:
        rest = torch.full((self.x.shape[0], self.weights.shape[1]), untouched)
        indices = None if self.indices is None else list(self.indices)
        return oracle.segments(self.x, self.weights, self.indptr, indices, rest)


def draw(
    device: torch.device,
    lengths: tuple[int, ...],
    d_in: int = 64,
    d_out: int = 48,
    indices: Optional[tuple[int, ...]] = None,
    dtype: torch.dtype = BF16,
    more_rows: int = 0,
) -> Problem:
    make = torch.Generator().manual_seed(sum(lengths) + 7 * d_in + d_out)
    num_weights = len(lengths) if indices is None else max(indices) + 2
    x = torch.randn(sum(lengths) + more_rows, d_in, generator=make)
    weights = torch.randn(num_weights, d_out, d_in, generator=make)
    return Problem(x.to(device, dtype), weights.to(device, dtype), lengths, indices)


@pytest.fixture(autouse=True)
def _no_other_launches() -> Iterator[None]:
    """Launches that another test prepared, of another tile."""
    launch._memo.clear()
    yield
    launch._memo.clear()


@pytest.mark.sanitizer
@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (5,), (0, 3, 0, 70, 0), (16, 17, 15), (129, 1), (1,) * 40], ids=str)
def test_segments(device: torch.device, lengths: tuple[int, ...], column_major: bool) -> None:
    problem = draw(device, lengths)
    assert_close(problem.run(column_major), problem.expected())


# Beyond a step of the depth and a tile of columns, and no multiple of either; adapters of rank 16.
@pytest.mark.parametrize("d_in, d_out", [(8, 8), (16, 264), (200, 136), (264, 16), (128, 512)])
def test_sizes(device: torch.device, d_in: int, d_out: int) -> None:
    problem = draw(device, (3, 66, 20), d_in, d_out)
    assert_close(problem.run(True), problem.expected())
    assert_close(problem.run(False), problem.expected())


def test_odd_sizes_on_the_cpu() -> None:
    problem = draw(CPU, (3, 4), 13, 5, dtype=FP32)
    assert_close(problem.run(True), problem.expected())
    assert_close(problem.run(False), problem.expected())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_weight_indices(device: torch.device, index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    problem = draw(device, (4, 9, 30, 2), indices=(2, 0, 2, 1), dtype=dtype)
    given = {
        "seg_lens": problem.index(problem.lengths, index_dtype),
        "weight_indices": problem.index(problem.indices, index_dtype),
    }
    assert_close(problem.run(**given), problem.expected())


def test_segments_without_a_weight(device: torch.device) -> None:
    """Requests without an adapter: an index below 0."""
    problem = draw(device, (4, 9, 5), indices=(1, 0, 1))
    out = torch.full((18, 48), 7.0, dtype=BF16, device=device)
    problem.run(out=out, weight_indices=problem.index([1, -1, 1]))
    expected = problem.expected()
    expected[4:13] = 7.0
    assert_close(out, expected)


def test_no_weights(device: torch.device) -> None:
    """Before the first adapter is loaded. On Hopper there is no descriptor of nothing."""
    problem = draw(device, (4, 9), indices=(0, 0))
    problem = problem._replace(weights=problem.weights[:0])
    out = torch.full((13, 48), 7.0, dtype=BF16, device=device)
    problem.run(out=out, weight_indices=problem.index([-1, -1]))
    assert (out == 7.0).all()


def test_rows_of_no_segment(device: torch.device) -> None:
    problem = draw(device, (4, 9), more_rows=3)
    out = torch.full((16, 48), 7.0, dtype=BF16, device=device)
    assert problem.run(out=out) is out
    assert_close(out, problem.expected(7.0))
    assert_close(problem.run(), problem.expected(0.0))


def test_parts_of_rows(device: torch.device) -> None:
    """x, weights and out as parts of wider tensors; what lies beside is neither used nor written."""
    problem = draw(device, (20, 33), 64, 48)
    nan = lambda *shape: torch.full(shape, torch.nan, dtype=BF16, device=device)  # noqa: E731
    x, weights, out = nan(53, 80), nan(2, 56, 96), nan(53, 64)
    x[:, 8:72], weights[:, :48, 16:80] = problem.x, problem.weights
    part = Problem(x[:, 8:72], weights[:, :48, 16:80], problem.lengths, None)
    wrapper = SegmentGEMMWrapper(torch.empty(1, device=device))
    wrapper.run(part.x, part.weights, 2, True, out=out[:, 8:56], seg_indptr=part.index(part.indptr))
    assert_close(out[:, 8:56].contiguous(), problem.expected())
    assert out[:, :8].isnan().all() and out[:, 56:].isnan().all()


def test_no_rows(device: torch.device) -> None:
    assert draw(device, (0, 0)).run().shape == (0, 48)
    assert draw(device, (), more_rows=2, indices=(0,))._replace(indices=()).run().tolist() == [[0.0] * 48] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [*families.TILES, *families.SM90_TILES])
def test_tiles(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, whatever a size would choose."""
    device = torch.device("cuda")
    if tile in families.SM90_TILES and "sm_90a" not in target.candidates(target.of_device(device)):
        pytest.skip("of Hopper")
    choose = families.group_gemm
    monkeypatch.setattr(families, "group_gemm", lambda *args, **axes: with_tile(choose(*args, **axes), tile))
    for lengths in ((3, 0, 200, 64, 0, 300), (1,) * 70):
        problem = draw(device, lengths, 328, 392)
        assert_close(problem.run(True), problem.expected())
        assert_close(problem.run(False), problem.expected())


def with_tile(spec: Any, tile: str) -> Any:
    return families.GROUP_GEMM.spec(spec.target, **{**dict(spec.args), "tile": tile})


@pytest.mark.gpu
def test_wrong_indices_on_a_gpu() -> None:
    """Nothing is written outside of out; a segment whose weight is not there is left as it is."""
    problem = draw(torch.device("cuda"), (10, 20, 30), indices=(0, 5, 1))
    out = torch.full((60, 48), 7.0, dtype=BF16, device="cuda")
    given = {"out": out, "weight_indices": problem.index([0, 99, -1])}
    problem.run(**given)
    assert_close(out[:10], problem.expected()[:10])
    assert (out[10:] == 7.0).all()
    out.fill_(7.0)
    problem.run(out=out, seg_indptr=problem.index([0, 10, 1 << 40, -5]), weight_indices=problem.index([0, 5, 1]))
    assert_close(out[:10], problem.expected()[:10])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"seg_indptr": None}, ValueError, "seg_lens and seg_indptr are None"),
        ({"seg_indptr": torch.tensor([0, 3, 8])}, IndexError, "indptr ends at 8; expected at most 7"),
        ({"seg_indptr": torch.tensor([0, 5, 3])}, ValueError, "never descend"),
        ({"seg_indptr": torch.tensor([0, 7])}, ValueError, r"seg_indptr has shape \[2\]; expected \[3\]"),
        ({"weight_indices": torch.tensor([0, 2])}, IndexError, r"weight_indices\[1\] is 2"),
        ({"weight_indices": torch.tensor([0])}, ValueError, r"weight_indices has shape \[1\]; expected \[2\]"),
        ({"weights": torch.zeros(1, 48, 64, dtype=BF16)}, ValueError, "2 groups have 1 weights"),
        ({"weights": torch.zeros(2, 48, 32, dtype=BF16)}, ValueError, r"expected \[num_rows, k\]"),
        ({"weights": torch.zeros(2, 48, 64)}, ValueError, "b is torch.float32"),
        ({"x": torch.zeros(7, 64).to(torch.int8)}, UnsupportedConfig, "x is torch.int8"),
        ({"x": torch.zeros(64, 7, dtype=BF16).T}, ValueError, "expected dense rows"),
        ({"x": [1]}, TypeError, "x is list; expected a tensor"),
        ({"out": torch.zeros(7, 40, dtype=BF16)}, ValueError, r"output has shape \[7, 40\]; expected \[7, 48\]"),
        ({"out": torch.zeros(1, 48, dtype=BF16).expand(7, 48)}, ValueError, "expected dense rows"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),
        ({"weight_column_major": "yes"}, TypeError, "weight_column_major is 'yes'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = draw(CPU, (3, 4))
    given = {
        "x": problem.x, "weights": problem.weights, "batch_size": 2, "weight_column_major": True,
        "seg_indptr": problem.index(problem.indptr), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        SegmentGEMMWrapper(torch.empty(1)).run(**given)


def test_backends() -> None:
    for backend in ("auto", "sm80", "sm90"):
        SegmentGEMMWrapper(torch.empty(1), backend).reset_workspace_buffer(torch.empty(1), torch.empty(1))
    with pytest.raises(ValueError, match="backend is 'other'"):
        SegmentGEMMWrapper(torch.empty(1), "other")


def test_sizes_that_no_gpu_kernel_has() -> None:
    for target_name in ("sm_80", "sm_90a"):
        with pytest.raises(UnsupportedConfig, match="fp32 is for the CPU"):
            spec = families.GROUP_GEMM.spec(
                target_name, dtype="fp32", out_dtype="fp32", depth_major=True, scale_columns=0, tile="m64"
            )
            families.GROUP_GEMM.config(spec)
