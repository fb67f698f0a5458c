# SPDX-License-Identifier: Apache-2.0
"""Softmax, filters and samplers against their definitions: exact sets and distributions, over hostile rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer import sampling
from tests.ops.sampling_kit import (
    BF16,
    CASES,
    F16,
    F32,
    ROWS,
    VOCABS,
    batch,
    check_frequencies,
    larger_than_each,
    new_generator,
    probs_of_batch,
    samplers,
)
from tests.oracles import sampling as oracle
from tests.tolerances import assert_close

SLACK = 2e-5  # what fp32 sums over a vocabulary may differ by, as a part of the whole

# ------------------------------------------------------------------------------------------------------- whole rows


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_softmax(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    logits = batch(vocab_size, dtype)
    temperature = torch.linspace(0.3, 2.0, len(ROWS))
    for value in (None, 0.7, temperature.to(device)):
        actual = sampling.softmax(logits.to(device), value)
        assert actual.dtype == F32
        expected = oracle.softmax(logits, 1.0 if value is None else temperature if torch.is_tensor(value) else value)
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_top_p_renorm(device: torch.device, vocab_size: int, dtype: torch.dtype, top_p: float) -> None:
    actual = sampling.top_p_renorm_probs(probs_of_batch(vocab_size, dtype).to(device), top_p)
    assert actual.dtype == dtype
    _check_renorm(actual.cpu(), top_p=top_p)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("top_k", [1, 50, 1000, 40000])
def test_top_k_renorm_and_mask(device: torch.device, vocab_size: int, dtype: torch.dtype, top_k: int) -> None:
    logits = batch(vocab_size, dtype)
    _check_renorm(sampling.top_k_renorm_probs(probs_of_batch(vocab_size, dtype).to(device), top_k).cpu(), top_k=top_k)
    masked = sampling.top_k_mask_logits(logits.to(device), top_k).cpu()
    assert masked.dtype == dtype
    for name, row, actual, larger in zip(ROWS, logits, masked, larger_than_each(vocab_size, dtype, "logits")):
        mask = oracle.kept(row, row, top_k=top_k, larger=larger)
        assert torch.equal(actual, torch.where(mask, row, -math.inf)), name


def _check_renorm(actual: torch.Tensor, **filters: Any) -> None:
    vocab_size, dtype = actual.shape[1], actual.dtype
    for name, row, ours, larger in zip(
        ROWS, probs_of_batch(vocab_size, dtype), actual, larger_than_each(vocab_size, dtype, "probs")
    ):
        inner = oracle.kept(row, row, slack=-SLACK, larger=larger, **filters)
        outer = oracle.kept(row, row, slack=SLACK, larger=larger, **filters)
        ours_kept = ours > 0
        representable = row.double() > 1e-30  # smaller ones may round to zero on the way
        assert ours_kept[inner & representable].all(), f"{name}: a kept element is missing"
        assert not ours_kept[~outer].any(), f"{name}: a cut element is present"
        exact = torch.where(ours_kept | (inner & ~representable), row.double(), 0)
        assert_close(ours[None], (exact / exact.sum())[None])


def test_rows_without_distribution(device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[0.0, 1, 2, 3], [nan, 1, 2, 3], [-inf] * 4, [inf, 1, 2, 3], [-inf, 5, -inf, -inf]])
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [nan, 0.2, 0.3, 0.4], [0.0] * 4, [0.1, nan, 0, 0], [0, 1.0, 0, 0]])
    expected = [True, False, False, False, True]
    for draw, rows in samplers(logits.to(device), probs.to(device)):
        tokens, valid = draw(rows, return_valid=True)
        assert valid.dtype == torch.bool and valid.tolist() == expected
        assert tokens[1:].tolist() == [0, 0, 0, 1]
        with pytest.raises(ValueError, match="NaN"):
            draw(rows, check_nan=True)
    assert sampling.softmax(logits.to(device)).isnan().all(-1).tolist() == [False, True, True, True, False]
    probs = probs.to(device)
    for renormed in (sampling.top_p_renorm_probs(probs, 0.5), sampling.top_k_renorm_probs(probs, 2)):
        assert renormed.isnan().any(-1).tolist() == [False, True, False, True, False]
        assert renormed[2].tolist() == [0.0] * 4
    masked = sampling.top_k_mask_logits(logits.to(device), 2).tolist()
    assert masked[1:] == [[-inf, -inf, 2, 3], [-inf] * 4, [inf, -inf, -inf, 3], [-inf, 5, -inf, -inf]]


# ----------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("vocab_size", "dtype", "sigma"), [(111, F32, 1.5), (111, BF16, 2.0), (4096, F32, 0.3)])
def test_distribution(device: torch.device, case: str, vocab_size: int, dtype: torch.dtype, sigma: float) -> None:
    draw, kwargs, filters, kind = CASES[case]
    if device.type == "cpu":  # where each draw costs a pass over the row, however long
        vocab_size = min(vocab_size, 1024)
    logits = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * sigma).to(dtype)
    probs = oracle.softmax(logits)
    row = logits if kind == "logits" else probs.to(dtype)
    weights = probs if kind == "logits" else row.double()
    mask = oracle.kept(row, weights, **filters)
    weights = torch.where(mask, weights, 0)
    # Of most tokens more than ten, which are not pooled.
    num_draws = (
        4_000_000 if device.type == "cuda" else max(15 * int(mask.sum()), 60_000 if vocab_size < 1000 else 10_000)
    )
    indices = torch.zeros(num_draws, dtype=torch.int32, device=device)
    tokens = draw(row[None].to(device), indices=indices, generator=new_generator(device), **kwargs)
    assert tokens.dtype == torch.int32 and tokens.shape == (num_draws,)
    check_frequencies(tokens, weights / weights.sum())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab_size", [4097, 128256])
def test_hostile_rows_draw_only_what_is_kept(device: torch.device, case: str, vocab_size: int) -> None:
    draw, kwargs, filters, kind = CASES[case]
    probs = oracle.softmax(batch(vocab_size, F32))
    rows = batch(vocab_size, F32) if kind == "logits" else probs.float()
    draws = 2000 if device.type == "cuda" else 20 if vocab_size < 10000 else 2
    indices = torch.arange(len(ROWS), device=device).repeat_interleave(draws)
    tokens = draw(rows.to(device), indices=indices, generator=new_generator(device), **kwargs).cpu().long()
    all_larger = larger_than_each(vocab_size, F32, kind)
    for name, row, weights, drawn, larger in zip(ROWS, rows, probs, tokens.view(len(ROWS), draws), all_larger):
        mask = oracle.kept(row, weights, slack=SLACK, larger=larger, **filters) & (weights > 0)
        assert mask[drawn].all(), f"{name}: drew {drawn[~mask[drawn]].tolist()[:5]}"
        if device.type == "cuda" and not filters:
            # Total variation over 32 bins of equal probability.
            bins = (torch.cumsum(weights, 0) - weights / 2).mul(32).long().clamp(0, 31)
            expected = torch.zeros(32, dtype=torch.float64).index_add_(0, bins, weights)
            got = torch.bincount(bins[drawn], minlength=32).double() / draws
            assert (got - expected).abs().sum() / 2 < 0.15, name


def _random_rows(kind: str, vocab_size: int, g: torch.Generator) -> torch.Tensor:
    """Eight rows of logits that differ in scale, ties and tails."""
    x = torch.randn(8, vocab_size, generator=g)
    uniform = torch.rand(8, 1, generator=g)
    if kind == "any_scale":  # of rows, some far from zero
        return x * 10 ** (uniform * 7.5 - 6) + torch.tensor([0.0, 1e3, -1e3, 1e-3]).repeat(2)[:, None]
    if kind == "all_scales":  # within a row
        return x * 10.0 ** torch.randint(-30, 31, x.shape, generator=g)
    if kind == "rounded":
        return (x * 4).bfloat16().float()
    if kind == "few_values":
        return x.gather(1, torch.randint(min(3, vocab_size), x.shape, generator=g))
    if kind == "subnormal":
        return -x.abs() * 1e-40
    assert kind == "holes"
    x[torch.rand(8, vocab_size, generator=g) < uniform] = -math.inf
    x[:, 0] = 0
    return x


@pytest.mark.parametrize("kind", ["any_scale", "all_scales", "rounded", "few_values", "subnormal", "holes"])
def test_random_rows_and_filters(device: torch.device, kind: str) -> None:
    g = torch.Generator().manual_seed(len(kind))
    draws = 50
    indices = torch.arange(8, device=device).repeat_interleave(draws)
    for vocab_size in (2, 33, 257, 1000, 5003, 20000):
        for dtype in (F32, BF16):
            logits = _random_rows(kind, vocab_size, g).to(dtype)
            probs = oracle.softmax(logits).to(dtype)
            top_k = (vocab_size ** torch.rand(8, generator=g)).int()
            top_p = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
            k, p = top_k.to(device), top_p.to(device)
            masked = sampling.top_k_mask_logits(logits.to(device), k).cpu()
            k_renormed = sampling.top_k_renorm_probs(probs.to(device), k).cpu()
            p_renormed = sampling.top_p_renorm_probs(probs.to(device), p).cpu()
            drawn = {
                name: draw(probs.to(device), *args, indices=indices, generator=new_generator(device))
                .cpu()
                .view(8, draws)
                for name, draw, args in (
                    ("top_k", sampling.top_k_sampling_from_probs, [k.repeat_interleave(draws)]),
                    ("top_p", sampling.top_p_sampling_from_probs, [p.repeat_interleave(draws)]),
                )
            }
            for i in range(8):
                what = f"{kind}, vocab {vocab_size}, {dtype}, row {i}, top_k {top_k[i]}, top_p {top_p[i]}"
                mask = oracle.kept(logits[i], logits[i], top_k=int(top_k[i]))
                assert torch.equal(masked[i], torch.where(mask, logits[i], -math.inf)), what
                seen = probs[i].double() > 1e-30  # smaller ones may round to zero on the way
                mask = oracle.kept(probs[i], probs[i], top_k=int(top_k[i]))
                assert torch.equal(k_renormed[i][seen] > 0, mask[seen]), what
                assert (mask & (probs[i] > 0))[drawn["top_k"][i].long()].all(), what
                inner, outer = (
                    oracle.kept(probs[i], probs[i], top_p=float(top_p[i]), slack=s) for s in (-SLACK, SLACK)
                )
                assert (p_renormed[i] > 0)[inner & seen].all() and not (p_renormed[i] > 0)[~outer].any(), what
                assert (outer & (probs[i] > 0))[drawn["top_p"][i].long()].all(), what


@pytest.mark.sanitizer
def test_each_kernel_once(device: torch.device) -> None:
    """One launch of each kernel over hostile rows, which checkers of memory and races can afford."""
    vocab_size = 4097
    probs = oracle.softmax(batch(vocab_size, F32))
    for case, (draw, kwargs, filters, kind) in CASES.items():
        rows = batch(vocab_size, F32) if kind == "logits" else probs.float()
        tokens = draw(rows.to(device), seed=3, offset=0, **kwargs).tolist()
        larger = larger_than_each(vocab_size, F32, kind)
        for name, row, weights, token, above in zip(ROWS, rows, probs, tokens, larger):
            mask = oracle.kept(row, weights, slack=SLACK, larger=above, **filters) & (weights > 0)
            assert mask[token], f"{case}, {name}: drew {token}"
    assert_close(sampling.softmax(batch(vocab_size, F32).to(device)), probs)
    _check_renorm(sampling.top_p_renorm_probs(probs.float().to(device), 0.9).cpu(), top_p=0.9)
    for top_k in (50, 1000):
        _check_renorm(sampling.top_k_renorm_probs(probs.float().to(device), top_k).cpu(), top_k=top_k)
        masked = sampling.top_k_mask_logits(batch(vocab_size, F32).to(device), top_k).isfinite().sum(-1)
        assert (masked[:4] == top_k).all()  # rows of distinct values
    certain = torch.zeros(3, 2, vocab_size).index_fill_(2, torch.tensor([vocab_size - 1]), 1).to(device)
    ids = torch.full((3, 1), vocab_size - 1, dtype=torch.int32, device=device)
    tokens, _, emitted = sampling.chain_speculative_sampling(certain[:, :1].contiguous(), ids, certain)
    assert emitted.tolist() == [1] * 3 and tokens.tolist() == [[vocab_size - 1] * 2] * 3


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("vocab_size", [111, 32000, 128256, 129280, 151936])
def test_every_position_can_be_drawn(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    """Rows with one live token each: borders of granules, blocks and rows. The memory between rows holds NaN."""
    positions = torch.tensor([0, 1, 7, 8, 110, vocab_size // 2, vocab_size - 9, vocab_size - 2, vocab_size - 1])
    positions = positions.clamp(max=vocab_size - 1)
    storage = torch.full((len(positions), vocab_size + 13), math.nan, dtype=dtype, device=device)
    for start in (0, 3):
        storage.fill_(math.nan)
        rows = storage[:, start : start + vocab_size]
        rows.zero_()
        rows[torch.arange(len(positions)), positions] = 1
        for draw in (
            sampling.sampling_from_probs,
            lambda x: sampling.top_p_sampling_from_probs(x, 0.5),
            lambda x: sampling.top_k_sampling_from_probs(x, 1),
        ):
            assert draw(rows).tolist() == positions.tolist()
        logits = rows.log()
        assert sampling.sampling_from_logits(logits).tolist() == positions.tolist()
        storage[:, start : start + vocab_size] = logits
        assert sampling.top_k_top_p_sampling_from_logits(rows, 5, 0.5).tolist() == positions.tolist()
        assert sampling.softmax(rows).argmax(-1).tolist() == positions.tolist()


def test_unnormalized_probabilities(device: torch.device) -> None:
    """Only proportions count, down to the smallest numbers of fp32."""
    probs = oracle.softmax(torch.randn(1, 3000, generator=torch.Generator().manual_seed(6)) * 2)
    top = set(probs[0].topk(20).indices.tolist())
    indices = torch.zeros(200, dtype=torch.int32, device=device)
    for scale in (1e-37, 1e-20, 1e20):
        scaled = (probs * scale).float().to(device)
        tokens, valid = sampling.top_k_sampling_from_probs(scaled, 20, indices, return_valid=True)
        assert valid.all() and set(tokens.tolist()) <= top and len(set(tokens.tolist())) > 5
        sampling.sampling_from_probs(scaled, indices)
    renormed = sampling.top_p_renorm_probs((probs * 1e20).float().to(device), 0.9)
    assert abs(renormed.sum().item() - 1) < 1e-5


@pytest.mark.gpu
def test_placements_agree() -> None:
    """Each way to spread a row over blocks finds the same set."""
    from flashinfer.families import sampling as families
    from flashinfer.families.arch import arch
    from flashinfer.jit import default_resolver

    target = flashinfer.target.of_device(torch.device("cuda"))
    probs = probs_of_batch(32000, F32).cuda()
    expected = sampling.top_p_renorm_probs(probs, 0.9) > 0
    sizes = families.CLUSTER_SIZES if arch(target).has_clusters else (1,)
    for cluster_size in sizes:
        for row_kib in (0, 128 // cluster_size):
            spec = families.NORMALIZE_ROW.spec(
                target, dtype="fp32", op="top_p_renorm", cluster_size=cluster_size, row_kib=row_kib
            )
            out = torch.full_like(probs, math.nan)
            grid = (len(probs) * cluster_size, 1, 1)
            launcher = default_resolver().load(spec).on(0)
            values = {
                **dict.fromkeys((field[0] for field in launcher.params._fields_), 0),
                "input": probs.data_ptr(),
                "output": out.data_ptr(),
                "top_p_value": 0.9,
                "temperature_value": 1.0,
                "input_stride": 32000,
                "num_rows": len(probs),
                "vocab_size": 32000,
            }
            launcher(grid, torch.cuda.current_stream().cuda_stream, values)
            differing = ((out > 0) != expected).sum(-1)
            assert not out.isnan().any() and (differing <= 2).all(), (cluster_size, row_kib, differing.tolist())


def test_min_p_keeps_the_likeliest(device: torch.device) -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]], device=device)
    for min_p in (1.0, 1.5, torch.tensor([1.0, 7.0], device=device)):
        for seed in range(5):
            tokens, valid = sampling.min_p_sampling_from_probs(probs, min_p, seed=seed, offset=0, return_valid=True)
            assert valid.all() and tokens[0] == 1 and tokens[1] in (0, 2)
