# SPDX-License-Identifier: Apache-2.0
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


# ----------------------------------------------------------------------------------------------------------- transforms


def index(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def windows(x: torch.Tensor, k: int, starts: list[int], lengths: list[int], tie_break: int) -> list[list[int]]:
    """Columns of the k largest of each row's window, counted from its start, the largest first."""
    chosen = []
    for row, start, length in zip(x.cpu().double(), starts, lengths):
        window = row[start : start + length].nan_to_num(math.inf, math.inf, -math.inf)
        order = window.sort(descending=True, stable=True).indices
        if tie_break == TopKTieBreak.LARGE:
            order = len(window) - 1 - window.flip(0).sort(descending=True, stable=True).indices
        chosen.append(order[:k].tolist())
    return chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "ties", "extremes"])
@pytest.mark.parametrize("tie_break", TopKTieBreak)
@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_of_the_largest(
    kind: str, dtype: torch.dtype, tie_break: TopKTieBreak, page_size: int, device: torch.device
) -> None:
    x = rows(kind, dtype).to(device)
    starts, lengths, batch, table_starts = [0, 30, 0, 7, 299], [300, 200, 0, 13, 1], [1, 0, 1, 2, 0], [0, 3, 0, 1, 2]
    generator = torch.Generator().manual_seed(page_size)
    tables = torch.randint(0, 5000, (3, 400), generator=generator, dtype=torch.int32)
    for k in (1, 20, 200, 350):
        raw, out = (torch.full((5, k), 77, dtype=torch.int32, device=device) for _ in range(2))
        result = flashinfer.top_k_page_table_transform(
            x, tables.to(device), index(device, *lengths), k, index(device, *batch), True, tie_break, True,
            index(device, *starts), index(device, *table_starts), page_size=page_size, out=out, out_raw_indices=raw,
        )  # fmt: skip
        assert result is out
        expected = windows(x, k, starts, lengths, tie_break)
        for i, columns in enumerate(expected):
            found = raw[i, : len(columns)].tolist()
            scores = x[i].cpu().double()
            assert torch.equal(scores[starts[i] :][found], scores[starts[i] :][columns])
            assert len(set(found)) == len(found) and (tie_break == TopKTieBreak.NONE or set(found) == set(columns))
            page = [int(tables[batch[i], table_starts[i] + at // page_size]) for at in found]
            assert out[i, : len(columns)].tolist() == [p * page_size + at % page_size for p, at in zip(page, found)]
            assert (out[i, len(columns) :] == -1).all() and (raw[i, len(columns) :] == -1).all()
        shifted = flashinfer.top_k_ragged_transform(
            x, index(device, 5, 0, 9, 1000, 3), index(device, *lengths), k, True, tie_break, True,
            index(device, *starts),
        )  # fmt: skip
        offsets = torch.tensor([[5], [0], [9], [1000], [3]], device=device)
        assert torch.equal(shifted, torch.where(raw < 0, -1, raw + offsets).int())


def test_transforms_by_default(device: torch.device) -> None:
    """Row i is of request i, from the first column on; scores of minus infinity are scores."""
    x = torch.full((2, 6), -math.inf, device=device)
    x[0, 3] = 1.0
    tables = torch.arange(100, 112, dtype=torch.int32, device=device).view(2, 6)
    lengths = index(device, 4, 6)
    found = flashinfer.top_k_page_table_transform(x, tables, lengths, 8)
    assert found[0, 0] == 103 and set(found[0, :4].tolist()) == {100, 101, 102, 103}
    assert set(found[1, :6].tolist()) == set(range(106, 112)) and (found[0, 4:] == -1).all()
    starts = index(device, 1, 2)
    found = flashinfer.top_k_page_table_transform(x, tables, index(device, 3, 2), 3, row_starts=starts)
    assert set(found[0].tolist()) == {101, 102, 103} and set(found[1].tolist()) == {108, 109, -1}
    assert flashinfer.top_k_ragged_transform(x[:0], starts[:0], starts[:0], 3).shape == (0, 3)


def test_the_lists_are_what_sparse_attention_takes(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(6, 4, 576, generator=generator).to(device, torch.bfloat16)
    tables = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32, device=device)
    scores, lengths = torch.randn(2, 12, generator=generator).to(device), index(device, 12, 5)
    lists = flashinfer.top_k_page_table_transform(scores, tables, lengths, 12, page_size=4)
    q = torch.randn(2, 16, 576, generator=generator).to(device, torch.bfloat16)
    chosen = flashinfer.sparse_mla_prefill(q, cache.flatten(0, 1), lists, 0.1)
    for i, length in enumerate(lengths.tolist()):
        kv = cache[tables[i].long()].flatten(0, 1)[:length]
        every = torch.arange(length, dtype=torch.int32, device=device)[None]
        expected = flashinfer.sparse_mla_prefill(q[i : i + 1], kv, every, 0.1)
        torch.testing.assert_close(chosen[i], expected[0], atol=1e-2, rtol=1e-2)


def test_wrong_arguments_of_transforms() -> None:
    x, vector = torch.randn(2, 9), index(torch.device("cpu"), 3, 4)
    table = torch.zeros(2, 9, dtype=torch.int32)

    def refuses(error: type[Exception], message: str, **changes: object) -> None:
        given: dict[str, object] = {"input": x, "src_page_table": table, "lengths": vector, "k": 3, **changes}
        with pytest.raises(error, match=message):
            flashinfer.top_k_page_table_transform(**given)  # type: ignore[arg-type]

    refuses(ValueError, r"lengths is torch.int64 \[2\]; expected int32 \[2\]", lengths=vector.long())
    refuses(ValueError, r"row_starts is torch.int32 \[1\]", row_starts=vector[:1])
    refuses(TypeError, r"lengths is NoneType; expected a tensor", lengths=None)
    refuses(ValueError, r"src_page_table is torch.int32 \[1, 9\]; .* for 2 rows", src_page_table=table[:1])
    refuses(ValueError, r"src_page_table is torch.int32 \[\]; expected int32", src_page_table=table[0, 0])
    refuses(ValueError, r"row_starts counts scores", row_starts=vector, page_size=2)
    refuses(ValueError, r"out is torch.int32 \[2, 4\]; expected", out=torch.zeros(2, 4, dtype=torch.int32))
    refuses(ValueError, r"k is 0", k=0)
    refuses(IndexError, r"entries of the page table.* expected 0 to 1, the 2 of a row", src_page_table=table[:, :2])
    refuses(IndexError, r"row_to_batch\[0\] is 3; expected 0 to 1", row_to_batch=vector)
    past, full = vector + 6, torch.zeros_like(vector)
    refuses(IndexError, r"lengths\[1\] is 10; expected .* to 9, the input has 9 columns", lengths=past)
    refuses(IndexError, r"row_starts \+ lengths\[0\] is 10", row_starts=past - 2, page_table_row_starts=full)
    refuses(IndexError, r"row_starts\[0\] is -3; expected 0 to 8", row_starts=-vector, page_table_row_starts=full)
    flashinfer.top_k_page_table_transform(x, table, -vector, 3, row_starts=past, page_table_row_starts=full)  # empty
    with pytest.raises(IndexError, match=r"^top_k_ragged_transform: lengths\[1\] is 10"):
        flashinfer.top_k_ragged_transform(x, full, past, 3)
