# SPDX-License-Identifier: Apache-2.0
"""Sampling by the caller's random numbers: the first token at which the sum of probabilities passes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.tvm.kit import call

NAME = "flashinfer.sampling.parallel_sampling_from_prob"


def draw(probs: torch.Tensor, uniform: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype = torch.int32) -> list[int]:
    tokens = torch.full(rows.shape, -1, dtype=dtype, device=probs.device)
    returned = call(NAME, probs, uniform.to(probs.device), rows.to(probs.device), tokens)
    assert returned.data_ptr() == tokens.data_ptr(), "MLC takes what is returned"
    result: list[int] = tokens.flatten().tolist()
    return result


@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 151936])
def test_against_fp64(vocab_size: int, device: torch.device) -> None:
    """Rows with tokens of no probability, in any order of samples; sums of the oracle are in FP64."""
    generator = torch.Generator().manual_seed(vocab_size)
    probs = torch.rand(6, vocab_size, generator=generator) ** 8
    probs[:, torch.rand(vocab_size, generator=generator) < 0.3] = 0
    probs[:, -1] += 0.1
    probs = probs / probs.sum(1, keepdim=True)
    rows = torch.tensor([5, 0, 0, 3, 2, 5, 1, 4], dtype=torch.int32)
    uniform = torch.rand(len(rows), generator=generator)
    drawn = draw(probs.to(device), uniform, rows)
    sums = probs[rows.long()].double().cumsum(1)
    passed = uniform.double() * sums[:, -1]
    for i, token in enumerate(drawn):
        assert probs[rows[i], token] > 0
        before = float(sums[i, token - 1]) if token else 0.0
        slack = vocab_size * 2.0**-40  # what rounding to units may add up to
        assert before - slack <= passed[i] < sums[i, token] + slack


def test_ends_and_gaps(device: torch.device) -> None:
    """0 is the first token of any probability, the largest number below 1 the last; neither is one of none."""
    probs = torch.tensor([[0, 0.25, 0, 0.75, 0], [0, 0, 0, 0, 0], [2.0**-50, 0, 1, 0, 0]], device=device)
    below_one = 1 - 2.0**-24
    uniform = torch.tensor([0, 0.25, 0.2499999, below_one, 0.5, 0, below_one])
    rows = torch.tensor([0, 0, 0, 0, 1, 2, 2], dtype=torch.int32)
    assert draw(probs, uniform, rows) == [1, 3, 1, 3, 0, 2, 2]


NAN, INF = float("nan"), float("inf")
NOTHING_TO_DRAW = {
    "zeros": [0, 0, 0, 0],
    "a NaN": [0.25, NAN, 0.25, 0.25],
    "two": [0.25, NAN, NAN, 0.25],  # whose integers may sum to 0
    "NaN alone": [NAN, NAN, NAN, NAN],
    "an infinity": [0, 0.25, INF, 0],
    "both of them": [0.25, INF, -INF, 0.25],
}


@pytest.mark.parametrize("case", NOTHING_TO_DRAW)
def test_nothing_to_draw(case: str, device: torch.device) -> None:
    """Token 0, as of the samplers that say so when they are asked; the row beside it draws."""
    probs = torch.tensor([[0, 0, 0.5, 0.5], NOTHING_TO_DRAW[case]], device=device)
    uniform, rows = torch.tensor([0.0, 0.5, 0.99]), torch.tensor([0, 1, 1], dtype=torch.int32)
    tokens, valid = flashinfer.sampling.sampling_from_probs(probs, seed=1, offset=0, return_valid=True)
    assert draw(probs, uniform, rows) == [2, 0, 0]
    assert int(tokens[1]) == 0 and valid.tolist() == [True, False]


def test_unnormalised_rows_and_columns(device: torch.device) -> None:
    """As filters leave them, and of shape [num_samples, 1] and int64, as TVM's own function has it."""
    probs = torch.tensor([[0.1, 0.1, 0, 0.2]], device=device)
    uniform, rows = torch.tensor([[0.2], [0.4], [0.9]]), torch.zeros(3, 1, dtype=torch.int32)
    assert draw(probs, uniform, rows, torch.int64) == [0, 1, 3]


def test_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.rand(3, 50, device=device)
    uniform, rows = torch.rand(7), torch.tensor([0, 2, 1, 1, 0, 2, 0], dtype=torch.int32)
    whole = draw(probs, uniform, rows)
    monkeypatch.setattr("flashinfer_tvm.sampling._MOST_ELEMENTS", 100)
    assert draw(probs, uniform, rows) == whole
    assert draw(probs, torch.empty(0), torch.empty(0, dtype=torch.int32)) == []


def test_frequencies(device: torch.device) -> None:
    """A chi-squared test: 11 tokens have 10 degrees of freedom, of which 29.6 leaves 0.1 % out."""
    probs = torch.tensor([[0.02, 0.3, 0.05, 0.13, 0.1, 0.1, 0.04, 0.06, 0.08, 0.02, 0.1]])
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(3))
    drawn = draw(probs.to(device), uniform, torch.zeros(20000, dtype=torch.int32))
    counts = torch.bincount(torch.tensor(drawn), minlength=11).double()
    expected = probs[0].double() * 20000
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.6


PROBS, HALVES, ROWS, TOKENS = torch.full((2, 4), 0.25), torch.full((3,), 0.5), *torch.zeros(2, 3, dtype=torch.int32)
WRONG: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((PROBS.half(), HALVES, ROWS, TOKENS), ValueError, r"probs is torch.float16 \[2, 4\]; expected float32"),
    ((PROBS[0], HALVES, ROWS, TOKENS), ValueError, r"probs is torch.float32 \[4\]"),
    ((PROBS[:, :0], HALVES, ROWS, TOKENS), ValueError, r"probs is torch.float32 \[2, 0\]"),
    ((PROBS[:0], HALVES, ROWS, TOKENS), ValueError, "probs has no rows"),
    ((PROBS, HALVES.double(), ROWS, TOKENS), ValueError, "uniform_samples is torch.float64"),
    ((PROBS, HALVES[:2], ROWS, TOKENS), ValueError, r"uniform_samples is .* \[2\]; expected contiguous float32 of 3"),
    ((PROBS, HALVES + 0.5, ROWS, TOKENS), ValueError, r"uniform_samples\[0\] is 1.0; expected 0 to below 1"),
    ((PROBS, HALVES * float("nan"), ROWS, TOKENS), ValueError, r"uniform_samples\[0\] is nan"),
    ((PROBS, HALVES, ROWS.long(), TOKENS), ValueError, "sample_indices is torch.int64"),
    ((PROBS, HALVES, ROWS + 2, TOKENS), IndexError, r"sample_indices\[0\] is 2; expected 0 to 1"),
    ((PROBS, HALVES, ROWS - 1, TOKENS), IndexError, r"sample_indices\[0\] is -1"),
    ((PROBS, HALVES, ROWS, TOKENS.short()), ValueError, "token_ids is torch.int16"),
    ((PROBS, HALVES, ROWS, TOKENS[:2]), ValueError, "token_ids is"),
    ((PROBS, HALVES, ROWS, None), TypeError, "token_ids is NoneType; expected a tensor"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_hostile(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"parallel_sampling_from_prob: {message}"):
        call(NAME, *arguments)


def test_a_dtype_that_torch_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM has int4 and others; what torch says of them is passed on."""

    def refuse(capsule: object) -> torch.Tensor:
        raise RuntimeError("Unsupported kInt bits 4\nand a stack")

    monkeypatch.setattr("flashinfer_tvm.tensors.from_dlpack", refuse)
    with pytest.raises(UnsupportedConfig, match=r"probs is float32 on cpu:0, which torch does not take \(Unsupported"):
        call(NAME, PROBS, HALVES, ROWS, TOKENS)
