# SPDX-License-Identifier: Apache-2.0
"""What the tests of sampling share: hostile rows, every sampler with what the oracle is told, a test of frequencies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from flashinfer import sampling
from tests.oracles import sampling as oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def new_generator(device: torch.device, seed: int = 1) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def named_logits(name: str, vocab_size: int) -> torch.Tensor:
    """Named rows that a threshold search may stumble over."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    gaussian = torch.randn(vocab_size, generator=g)
    if name.startswith("gaussian"):
        return gaussian * float(name.removeprefix("gaussian"))
    if name == "constant":
        return torch.full((vocab_size,), 0.25)
    if name == "one_live":
        row = torch.full((vocab_size,), -math.inf)
        row[vocab_size // 3] = -5.0
        return row
    if name == "few_live":
        row = torch.full((vocab_size,), -math.inf)
        row[:: max(1, vocab_size // 7)] = torch.arange(len(row[:: max(1, vocab_size // 7)])).float()
        return row
    if name == "descending":
        return (gaussian * 2).sort(descending=True).values
    if name == "ascending":
        return (gaussian * 2).sort().values
    if name == "ties":
        return (gaussian * 4).round() / 2
    if name == "outlier":
        gaussian[vocab_size // 2] = 30.0
        return gaussian
    if name == "power_law":
        return -1.1 * torch.log(torch.arange(1, vocab_size + 1).float())[torch.randperm(vocab_size, generator=g)]
    if name == "shifted":  # far from zero: few bits left for the differences
        return gaussian + 1000.0
    assert name == "two_levels"
    return torch.where(gaussian > 1, 3.0, 0.0)


ROWS = ["gaussian0.01", "gaussian1", "gaussian3", "gaussian12", "constant", "one_live", "few_live", "descending",
        "ascending", "ties", "outlier", "power_law", "shifted", "two_levels"]  # fmt: skip
VOCABS = [1, 111, 4097, 128256]


@functools.cache
def batch(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([named_logits(name, vocab_size) for name in ROWS]).to(dtype)


@functools.cache
def probs_of_batch(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    return oracle.softmax(batch(vocab_size, F32)).to(dtype)


@functools.cache
def larger_than_each(vocab_size: int, dtype: torch.dtype, kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the oracle needs of each row, sorted once for all tests."""
    rows = probs_of_batch(vocab_size, dtype) if kind == "probs" else batch(vocab_size, dtype)
    weights = probs_of_batch(vocab_size, dtype) if kind == "probs" else oracle.softmax(rows)
    return [oracle.larger_than(row.double(), weight.double()) for row, weight in zip(rows, weights)]


Sampler = Callable[..., Any]


def samplers(logits: torch.Tensor, probs: torch.Tensor) -> list[tuple[Sampler, torch.Tensor]]:
    return [
        (sampling.sampling_from_logits, logits),
        (sampling.sampling_from_probs, probs),
        (lambda rows, **kw: sampling.top_p_sampling_from_probs(rows, 0.8, **kw), probs),
        (lambda rows, **kw: sampling.top_k_sampling_from_probs(rows, 3, **kw), probs),
        (lambda rows, **kw: sampling.min_p_sampling_from_probs(rows, 0.2, **kw), probs),
        (lambda rows, **kw: sampling.top_k_top_p_sampling_from_probs(rows, 3, 0.8, **kw), probs),
        (lambda rows, **kw: sampling.top_k_top_p_sampling_from_probs(rows, 3, 0.8, None, "joint", **kw), probs),
        (lambda rows, **kw: sampling.top_k_top_p_sampling_from_logits(rows, 3, 0.8, **kw), logits),
        (lambda rows, **kw: sampling.top_k_top_p_sampling_from_logits(rows, 3, 0.8, None, "joint", **kw), logits),
    ]


# (function, keyword arguments, what the oracle is told, input)
CASES: dict[str, tuple[Sampler, dict[str, Any], dict[str, Any], str]] = {
    "logits": (sampling.sampling_from_logits, {}, {}, "logits"),
    "probs": (sampling.sampling_from_probs, {}, {}, "probs"),
    "top_p": (sampling.top_p_sampling_from_probs, {"top_p": 0.7}, {"top_p": 0.7}, "probs"),
    "top_k": (sampling.top_k_sampling_from_probs, {"top_k": 20}, {"top_k": 20}, "probs"),
    "top_p_narrow": (sampling.top_p_sampling_from_probs, {"top_p": 0.05}, {"top_p": 0.05}, "probs"),
    "top_k_wide": (sampling.top_k_sampling_from_probs, {"top_k": 2500}, {"top_k": 2500}, "probs"),
    "min_p": (sampling.min_p_sampling_from_probs, {"min_p": 0.1}, {"min_p": 0.1}, "probs"),
    "joint_probs": (
        sampling.top_k_top_p_sampling_from_probs,
        {"top_k": 30, "top_p": 0.6, "filter_apply_order": "joint"},
        {"top_k": 30, "top_p": 0.6},
        "probs",
    ),
    "top_k_first_probs": (
        sampling.top_k_top_p_sampling_from_probs,
        {"top_k": 30, "top_p": 0.6},
        {"top_k": 30, "top_p": 0.6, "top_k_first": True},
        "probs",
    ),
    "top_k_first_wide": (  # more is kept than a list holds
        sampling.top_k_top_p_sampling_from_probs,
        {"top_k": 2000, "top_p": 0.9},
        {"top_k": 2000, "top_p": 0.9, "top_k_first": True},
        "probs",
    ),
    "joint_wide": (
        sampling.top_k_top_p_sampling_from_probs,
        {"top_k": 2000, "top_p": 0.9, "filter_apply_order": "joint"},
        {"top_k": 2000, "top_p": 0.9},
        "probs",
    ),
    "joint_logits": (
        sampling.top_k_top_p_sampling_from_logits,
        {"top_k": 30, "top_p": 0.6, "filter_apply_order": "joint"},
        {"top_k": 30, "top_p": 0.6},
        "logits",
    ),
    "joint_logits_wide": (
        sampling.top_k_top_p_sampling_from_logits,
        {"top_k": 2000, "top_p": 0.9, "filter_apply_order": "joint"},
        {"top_k": 2000, "top_p": 0.9},
        "logits",
    ),
    "top_k_first_logits": (
        sampling.top_k_top_p_sampling_from_logits,
        {"top_k": 30, "top_p": 0.6},
        {"top_k": 30, "top_p": 0.6, "top_k_first": True},
        "logits",
    ),
}  # fmt: skip


def check_frequencies(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square of drawn tokens, those with few expected draws pooled. Fails one time in ten million by chance."""
    counts = torch.bincount(tokens.cpu().long(), minlength=len(probs)).double()
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0, "a forbidden token was drawn"
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 10:
        counts, expected = counts[:-1], expected[:-1]
    chi_square, df = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert chi_square <= df + 5.3 * math.sqrt(2 * df) + 20, f"chi-square {chi_square:.1f} with {df} degrees of freedom"
