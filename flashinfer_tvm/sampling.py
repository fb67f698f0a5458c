# SPDX-License-Identifier: Apache-2.0
"""Sampling with random numbers that the caller drew, as MLC's sampler calls it."""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.host import checks, indices
from flashinfer_tvm.tensors import environment_stream, tensors

# Probabilities are counted in units of 2^-40, whose sums are exact in any order: they never descend, so that a token of
# no probability is never drawn, and every device draws the same one.
_UNITS = 2.0**40
_MOST_ELEMENTS = 1 << 24  # of sums at a time: 128 MB


def parallel_sampling_from_prob(probs: Any, uniform_samples: Any, sample_indices: Any, token_ids: Any) -> Any:
    """For every sample the first token at which the probabilities of its row, summed in the order of the vocabulary,
    pass `uniform * sum(row)`.

    Args:
        probs: fp32 `[num_rows, vocab_size]`. Probabilities below 2^-40 are none. A row with nothing to draw (zeros
            alone, a NaN, an infinity) gives token 0, as of the samplers of `flashinfer.sampling`.
        uniform_samples: fp32 `[num_samples]` (or `[num_samples, 1]`, as the others), from 0 to below 1.
        sample_indices: int32 `[num_samples]`, the row of each sample. One that names no row is an IndexError on the
            CPU; on a GPU the nearest row stands for it.
        token_ids: int32 or int64 `[num_samples]`, the result.

    Returns:
        token_ids.

    Raises:
        TypeError, ValueError: an argument is something else.
    """
    op = "parallel_sampling_from_prob"
    rows, uniform, places, tokens = tensors(
        op, probs=probs, uniform_samples=uniform_samples, sample_indices=sample_indices, token_ids=token_ids
    )
    checks.require(
        rows.dim() == 2 and rows.dtype == torch.float32 and rows.shape[1] > 0, op,
        f"probs is {rows.dtype} {list(rows.shape)}; expected float32 [num_rows, vocab_size]",
    )  # fmt: skip
    num_samples = places.numel()
    for name, given, kinds in (
        ("uniform_samples", uniform, (torch.float32,)),
        ("sample_indices", places, (torch.int32,)),
        ("token_ids", tokens, (torch.int32, torch.int64)),
    ):
        is_flat = given.numel() == num_samples and given.shape in ((num_samples,), (num_samples, 1))
        checks.require(
            is_flat and given.dtype in kinds and given.is_contiguous(), op,
            f"{name} is {given.dtype} {list(given.shape)}; expected contiguous {str(kinds[0])[6:]} of {num_samples} "
            "entries, as sample_indices has",
        )  # fmt: skip
        checks.require_device(op, name, given, rows, "probs")
    if num_samples == 0:
        return token_ids
    checks.require(len(rows) > 0, op, f"probs has no rows; expected some for the {num_samples} samples")
    if indices.are_visible(places, uniform):
        indices.require_within(op, "sample_indices", places, 0, len(rows), f"the {len(rows)} rows of probs")
        wrong = torch.nonzero(~((uniform >= 0) & (uniform < 1)).flatten())
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"{op}: uniform_samples[{at}] is {float(uniform.flatten()[at])}; expected 0 to below 1")
    at_a_time = max(_MOST_ELEMENTS // rows.shape[1], 1)
    with environment_stream(rows.device):
        flat = places.flatten().long().clamp(0, len(rows) - 1), uniform.flatten(), tokens.view(-1)
        for place, number, token in zip(*(part.split(at_a_time) for part in flat)):
            chosen = rows[place]
            sums = (chosen * _UNITS).long().cumsum(1)
            # Integers that stand for NaN and infinity are the compiler's, and two of them may sum to anything.
            is_valid = (sums[:, -1:] > 0) & chosen.sum(1, keepdim=True).isfinite()
            passed = (number.double()[:, None] * sums[:, -1:]).long()
            drawn = torch.searchsorted(sums, passed, right=True).clamp_(max=rows.shape[1] - 1)
            token.copy_(torch.where(is_valid, drawn, 0).squeeze(1))
    return token_ids
