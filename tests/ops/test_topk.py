"""top_k against the definition: the k largest of each row, each taken once, ties as asked."""

from __future__ import annotations

import math

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from flashinfer.topk import TopKTieBreak, top_k

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(kind: str, dtype: torch.dtype, num_rows: int = 5, num_columns: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_columns)
    x = torch.randn(num_rows, num_columns, generator=generator)
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x = torch.zeros_like(x)
        x[:, ::2] = -0.0
    elif kind == "extremes":
        x[:, ::7], x[:, 1::7], x[:, 2::9], x[:, 3::9] = math.inf, -math.inf, 0.0, -0.0
        x[:, 4::11] = -1e-42
    return x.to(dtype)


def check(x: torch.Tensor, k: int, values: torch.Tensor, indices: torch.Tensor) -> None:
    assert values.dtype == x.dtype and indices.dtype == torch.int64
    assert values.shape == indices.shape == (len(x), k) and values.device == indices.device == x.device
    for row, kept, at in zip(x.cpu().double(), values.cpu().double(), indices.cpu()):
        assert len(set(at.tolist())) == k
        assert torch.equal(row[at], kept)
        assert torch.equal(kept.sort(descending=True).values, row.sort(descending=True).values[:k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "ties", "equal", "extremes"])
@pytest.mark.parametrize("tie_break", TopKTieBreak)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_largest(kind: str, dtype: torch.dtype, tie_break: TopKTieBreak, is_sorted: bool, device: torch.device) -> None:
    x = rows(kind, dtype).to(device)
    for k in (1, 2, 50, 299, 300):
        values, indices = top_k(x, k, sorted=is_sorted, tie_break=tie_break)
        check(x, k, values, indices)
        if is_sorted:
            assert torch.equal(values, values.sort(-1, descending=True).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(dtype: torch.dtype, device: torch.device) -> None:
    """Exactly which elements are taken, as a stable sort would have it."""
    for kind in ("ties", "equal", "extremes"):
        x = rows(kind, dtype).to(device)
        forward = x.double().sort(dim=-1, descending=True, stable=True).indices
        backward = 299 - x.double().flip(-1).sort(dim=-1, descending=True, stable=True).indices
        for tie_break, order in ((TopKTieBreak.SMALL, forward), (TopKTieBreak.LARGE, backward)):
            for k in (1, 60, 300):
                assert torch.equal(top_k(x, k, True, tie_break=tie_break)[1], order[:, :k])
                assert set(top_k(x, k, tie_break=int(tie_break))[1][0].tolist()) == set(order[0, :k].tolist())


def test_nan_is_largest(device: torch.device) -> None:
    x = torch.tensor([[1.0, math.nan, math.inf, -math.nan, -math.inf]], device=device)
    for tie_break in TopKTieBreak:
        assert set(top_k(x, 3, tie_break=tie_break)[1][0].tolist()) == {1, 2, 3}


def test_strides_and_empty_batches(device: torch.device) -> None:
    x = rows("ordinary", torch.float32).to(device)
    check(x.T.contiguous().T, 7, *top_k(x.T.contiguous().T, 7))
    check(x[:, ::3], 7, *top_k(x[:, ::3], 7, tie_break=1))
    for tie_break in TopKTieBreak:
        values, indices = top_k(x[:0], 7, tie_break=tie_break)
        assert values.shape == indices.shape == (0, 7)


def test_calls_of_engines(device: torch.device) -> None:
    x = rows("ordinary", torch.bfloat16).to(device)
    check(x, 20, *flashinfer.top_k(x, 20, sorted=True, deterministic=True))
    for _ in range(3):
        again = flashinfer.top_k(x, 20, sorted=True, deterministic=True)
        assert all(map(torch.equal, again, flashinfer.top_k(x, 20, sorted=True, deterministic=True)))


def test_gradients_end_here() -> None:
    assert not top_k(torch.randn(2, 9, requires_grad=True), 3)[0].requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": 0}, ValueError, "k is 0; expected at least 1 and at most 300"),
        ({"k": 301}, ValueError, "k is 301; expected at least 1 and at most 300"),
        ({"k": 2.5}, TypeError, "k is 2.5; expected an integer"),
        ({"k": torch.tensor([2, 3])}, TypeError, "expected an integer"),
        ({"tie_break": 3}, ValueError, "tie_break is 3"),
        ({"sorted": "yes"}, TypeError, "sorted is 'yes'; expected True or False"),
        ({"input": [1.0]}, TypeError, "input is list; expected a tensor"),
        ({"input": torch.zeros(300)}, ValueError, r"input is \[300\]; expected \[num_rows, num_columns\]"),
        ({"input": torch.zeros(5, 300, dtype=torch.float64)}, UnsupportedConfig, "float64"),
        ({"input": torch.zeros(5, 300, device="meta")}, UnsupportedConfig, "no memory"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"input": rows("ordinary", torch.float32), "k": 3, **change}
    with pytest.raises(error, match=message):
        top_k(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_captured() -> None:
    x = rows("ordinary", torch.float32, num_columns=40000).cuda()
    for tie_break in TopKTieBreak:
        top_k(x, 50, tie_break=tie_break)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values, indices = top_k(x, 50, tie_break=tie_break)
        x.copy_(x.flip(-1))
        graph.replay()
        check(x, 50, values, indices)
