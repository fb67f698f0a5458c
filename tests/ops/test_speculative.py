# SPDX-License-Identifier: Apache-2.0
"""Chain speculative sampling: what is emitted follows the target, whatever was drafted; counts; hostile arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flashinfer import sampling
from tests.ops.sampling_kit import BF16, F32, check_frequencies, new_generator
from tests.oracles import sampling as oracle


def test_speculative_follows_the_target(device: torch.device) -> None:
    """Whatever the draft, the first emitted token is distributed as the target's first step, the second likewise."""
    vocab_size, num_draft, num_rows = 23, 2, 2_000_000 if device.type == "cuda" else 100_000
    g = torch.Generator().manual_seed(2)
    draft = oracle.softmax(torch.randn(num_draft, vocab_size, generator=g) * 1.5)
    target = oracle.softmax(torch.randn(num_draft + 1, vocab_size, generator=g) * 1.5)
    ids = torch.stack([torch.multinomial(row, num_rows, replacement=True, generator=g) for row in draft], -1)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(
        draft.float().expand(num_rows, -1, -1).to(device),
        ids.to(device),
        target.float().expand(num_rows, -1, -1).to(device),
        generator=new_generator(device),
    )
    tokens, accepted, emitted, ids = tokens.cpu(), accepted.cpu(), emitted.cpu(), ids.int()
    check_frequencies(tokens[:, 0], target[0])
    for step in range(1, num_draft + 1):
        check_frequencies(tokens[emitted >= step, step], target[step])
    steps = torch.arange(num_draft)
    assert torch.equal(tokens[:, :-1][steps < emitted[:, None]], ids[steps < emitted[:, None]])
    assert (tokens[torch.arange(num_rows), emitted.long()] >= 0).all()
    assert (tokens[torch.arange(num_draft + 1) > emitted[:, None]] == -1).all()
    assert (accepted >= emitted).all() and (accepted <= num_draft).all()
    rate = torch.minimum(draft, target[:num_draft]).sum(-1)
    assert abs(emitted.ge(1).double().mean() - rate[0]) < 0.005
    assert abs(accepted.double().mean() - rate.sum()) < 0.01


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_speculative_counts_and_edges(device: torch.device, dtype: torch.dtype) -> None:
    vocab_size = 32003  # rows start at odd addresses
    draft = torch.zeros(4, 3, vocab_size, dtype=dtype)
    target = torch.zeros(4, 4, vocab_size, dtype=dtype)
    ids = torch.tensor([[5, 6, 7]] * 4, dtype=torch.int32)
    draft[:, [0, 1, 2], [5, 6, 7]] = 1
    target[:, [0, 1, 2, 3], [5, 6, 7, 32002]] = 1  # agrees at every step
    target[1, 1] = 0
    target[1, 1, 31999] = 1  # fails at step 1
    target[2, 0] = 0
    target[2, 0, 0] = 1  # fails at step 0; later steps would pass
    target[3, 3] = math.nan
    accepted = torch.tensor([10, 0, 0, 0], dtype=torch.int32, device=device)
    out = sampling.chain_speculative_sampling(draft.to(device), ids.to(device), target.to(device), accepted)
    assert out[0].tolist() == [[5, 6, 7, 32002], [5, 31999, -1, -1], [0, -1, -1, -1], [5, 6, 7, 0]]
    assert out[1] is accepted and out[1].tolist() == [13, 2, 2, 3]
    assert out[2].tolist() == [3, 1, 0, 3]


# ------------------------------------------------------------------------------------------------------------ arguments


def _agreeing(device: torch.device, num_rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafts that the target is certain of: tokens 5 and 6, then 7."""
    target = torch.zeros(num_rows, 3, 100, device=device)
    target[:, [0, 1, 2], [5, 6, 7]] = 1
    ids = torch.tensor([[5, 6]] * num_rows, dtype=torch.int32, device=device)
    return target[:, :2].clone(), ids, target


def test_counts_wrap(device: torch.device) -> None:
    """As any sum of int32 does: for a sanitizer, which would report a signed overflow."""
    draft, ids, target = _agreeing(device, 2)
    counts = [torch.full((2,), 2**31 - 1, dtype=torch.int32, device=device) for _ in range(2)]
    _, accepted, emitted = sampling.chain_speculative_sampling(draft, ids, target, *counts, seed=0)
    assert accepted.tolist() == emitted.tolist() == [-(2**31) + ids.shape[1] - 1] * 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_draft_tokens_of_any_integer_type(device: torch.device, dtype: torch.dtype) -> None:
    draft, ids, target = _agreeing(device)
    for same in (ids.to(dtype), ids.to(dtype).repeat(1, 2)[:, :2]):
        tokens, accepted, emitted = sampling.chain_speculative_sampling(draft, same, target)
        assert tokens.dtype == torch.int32 and tokens.tolist() == [[5, 6, 7]] * 4
        assert accepted.tolist() == emitted.tolist() == [2] * 4


def test_draft_tokens_outside_of_the_vocabulary_fail(device: torch.device) -> None:
    """Whatever their other bits say; NaN around the probabilities would pass any test."""
    draft, ids, target = _agreeing(device)
    storage = torch.full((4, 3, 300), math.nan, device=device)
    target = storage[:, :, 100:200].copy_(target)
    wide = ids.long()
    for wrong in (-1, 100, (1 << 31) - 1, -(1 << 31), 5 + (1 << 32), -(1 << 63), (1 << 63) - 1):
        wide[1, 0], wide[2, 1] = wrong, wrong
        for given in (wide, wide.int()) if -(1 << 31) <= wrong < 1 << 31 else (wide,):
            tokens, accepted, emitted = sampling.chain_speculative_sampling(draft, given, target)
            assert emitted.tolist() == [2, 0, 1, 2] and accepted.tolist() == [2, 1, 1, 2], wrong
            # Nothing is left of the target where it agrees with the draft: then the token is drawn from it all.
            assert tokens.tolist() == [[5, 6, 7], [5, -1, -1], [5, 6, -1], [5, 6, 7]], wrong


def test_arguments_that_do_not_fit(device: torch.device) -> None:
    draft, ids, target = _agreeing(device)
    chain: Any = sampling.chain_speculative_sampling
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"draft_token_ids is {dtype}; expected an integer type"):
            chain(draft, ids.to(dtype), target)
    for wrong in (target[:, :, :99], target[:, :2], target[:3], target[0], target[:, :, :0], target[:, :0]):
        with pytest.raises(ValueError, match=r"is \[[\d, ]*\]; expected \["):
            chain(draft, ids, wrong)
    with pytest.raises(ValueError, match=r"draft_probs is \[4, 1, 100\]; expected \[4, 2, 100\], one step less"):
        chain(draft[:, :1], ids, target)
    with pytest.raises(ValueError, match=r"draft_token_ids is \[4, 1\]; expected \[4, 2\], one step less"):
        chain(draft, ids[:, :1], target)
    with pytest.raises(ValueError, match=r"target_probs is torch\.bfloat16; expected torch\.float32"):
        chain(draft, ids, target.bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        chain(draft, ids, target.mT.contiguous().mT)
    for name, values in {"draft_probs": (None, ids, target), "draft_token_ids": (draft, [[5, 6]], target)}.items():
        with pytest.raises(TypeError, match=f"{name} is (NoneType|list); expected a tensor"):
            chain(*values)
    with pytest.raises(ValueError, match="draft_token_ids is on meta, draft_probs on"):
        chain(draft, ids.to("meta"), target)


def test_counts_that_do_not_fit(device: torch.device) -> None:
    arguments, before = _agreeing(device), torch.full((9,), 7, dtype=torch.int32, device=device)
    chain: Any = sampling.chain_speculative_sampling
    counts = before.clone()
    for wrong in (
        counts.long()[:4],
        counts.float()[:4],
        counts[:3],
        counts[:8].view(4, 2),
        counts[:8:2],
        counts.to("meta")[:4],
    ):
        for pair in ((wrong, None), (None, wrong)):
            with pytest.raises(ValueError, match=r"maybe_output_\w+ is .*; expected contiguous int32 \[4\]"):
                chain(*arguments, *pair)
    with pytest.raises(ValueError, match="expected contiguous int32"):
        chain(*arguments, counts[:1].expand(4))
    with pytest.raises(TypeError, match="maybe_output_emitted_draft_token_num is list; expected a tensor"):
        chain(*arguments, None, [0, 0, 0, 0])
    for first, second in ((0, 0), (0, 3), (3, 0), (1, 2)):
        with pytest.raises(ValueError, match="share memory; expected a place for each count"):
            chain(*arguments, counts[first:][:4], counts[second:][:4])
    assert torch.equal(counts, before)
    chain(*arguments, counts[:4], counts[4:8])  # side by side is no overlap
    assert counts.tolist() == [9] * 8 + [7]


def test_no_rows_and_no_drafts(device: torch.device) -> None:
    draft, ids, target = _agreeing(device)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(draft[:0], ids[:0], target[:0])
    assert tokens.shape == (0, 3) and accepted.shape == emitted.shape == (0,)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(draft[:, :0], ids[:, :0], target[:, 2:])
    assert tokens.tolist() == [[7]] * 4 and accepted.tolist() == emitted.tolist() == [0] * 4
