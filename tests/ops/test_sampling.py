"""Sampling and filters against their definitions: exact sets, distributions, reproducibility, hostile rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer import sampling
from flashinfer.errors import UnsupportedConfig
from tests.oracles import sampling as oracle
from tests.tolerances import assert_close

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SLACK = 2e-5  # what fp32 sums over a vocabulary may differ by, as a part of the whole


def _generator(device: torch.device, seed: int = 1) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _logits(name: str, vocab_size: int) -> torch.Tensor:
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
def _batch(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([_logits(name, vocab_size) for name in ROWS]).to(dtype)


@functools.cache
def _probs(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    return oracle.softmax(_batch(vocab_size, F32)).to(dtype)


@functools.cache
def _larger(vocab_size: int, dtype: torch.dtype, kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the oracle needs of each row, sorted once for all tests."""
    rows = _probs(vocab_size, dtype) if kind == "probs" else _batch(vocab_size, dtype)
    weights = _probs(vocab_size, dtype) if kind == "probs" else oracle.softmax(rows)
    return [oracle.larger_than(row.double(), weight.double()) for row, weight in zip(rows, weights)]


# ------------------------------------------------------------------------------------------------------- whole rows


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_softmax(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    logits = _batch(vocab_size, dtype)
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
    actual = sampling.top_p_renorm_probs(_probs(vocab_size, dtype).to(device), top_p)
    assert actual.dtype == dtype
    _check_renorm(actual.cpu(), top_p=top_p)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("top_k", [1, 50, 1000, 40000])
def test_top_k_renorm_and_mask(device: torch.device, vocab_size: int, dtype: torch.dtype, top_k: int) -> None:
    logits = _batch(vocab_size, dtype)
    _check_renorm(sampling.top_k_renorm_probs(_probs(vocab_size, dtype).to(device), top_k).cpu(), top_k=top_k)
    masked = sampling.top_k_mask_logits(logits.to(device), top_k).cpu()
    assert masked.dtype == dtype
    for name, row, actual, larger in zip(ROWS, logits, masked, _larger(vocab_size, dtype, "logits")):
        mask = oracle.kept(row, row, top_k=top_k, larger=larger)
        assert torch.equal(actual, torch.where(mask, row, -math.inf)), name


def _check_renorm(actual: torch.Tensor, **filters: Any) -> None:
    vocab_size, dtype = actual.shape[1], actual.dtype
    for name, row, ours, larger in zip(ROWS, _probs(vocab_size, dtype), actual, _larger(vocab_size, dtype, "probs")):
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
    for draw, rows in _samplers(logits.to(device), probs.to(device)):
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


Sampler = Callable[..., Any]


def _samplers(logits: torch.Tensor, probs: torch.Tensor) -> list[tuple[Sampler, torch.Tensor]]:
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


# ----------------------------------------------------------------------------------------------------- distributions

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


def _check_frequencies(tokens: torch.Tensor, probs: torch.Tensor) -> None:
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("vocab_size", "dtype", "sigma"), [(111, F32, 1.5), (111, BF16, 2.0), (4096, F32, 0.3)])
def test_distribution(device: torch.device, case: str, vocab_size: int, dtype: torch.dtype, sigma: float) -> None:
    draw, kwargs, filters, kind = CASES[case]
    logits = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * sigma).to(dtype)
    probs = oracle.softmax(logits)
    row = logits if kind == "logits" else probs.to(dtype)
    weights = probs if kind == "logits" else row.double()
    mask = oracle.kept(row, weights, **filters)
    weights = torch.where(mask, weights, 0)
    num_draws = 4_000_000 if device.type == "cuda" else 100_000
    indices = torch.zeros(num_draws, dtype=torch.int32, device=device)
    tokens = draw(row[None].to(device), indices=indices, generator=_generator(device), **kwargs)
    assert tokens.dtype == torch.int32 and tokens.shape == (num_draws,)
    _check_frequencies(tokens, weights / weights.sum())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab_size", [4097, 128256])
def test_hostile_rows_draw_only_what_is_kept(device: torch.device, case: str, vocab_size: int) -> None:
    draw, kwargs, filters, kind = CASES[case]
    probs = oracle.softmax(_batch(vocab_size, F32))
    rows = _batch(vocab_size, F32) if kind == "logits" else probs.float()
    draws = 2000 if device.type == "cuda" else 20 if vocab_size < 10000 else 2
    indices = torch.arange(len(ROWS), device=device).repeat_interleave(draws)
    tokens = draw(rows.to(device), indices=indices, generator=_generator(device), **kwargs).cpu().long()
    all_larger = _larger(vocab_size, F32, kind)
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
                name: draw(probs.to(device), *args, indices=indices, generator=_generator(device)).cpu().view(8, draws)
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
    probs = oracle.softmax(_batch(vocab_size, F32))
    for case, (draw, kwargs, filters, kind) in CASES.items():
        rows = _batch(vocab_size, F32) if kind == "logits" else probs.float()
        tokens = draw(rows.to(device), seed=3, offset=0, **kwargs).tolist()
        larger = _larger(vocab_size, F32, kind)
        for name, row, weights, token, above in zip(ROWS, rows, probs, tokens, larger):
            mask = oracle.kept(row, weights, slack=SLACK, larger=above, **filters) & (weights > 0)
            assert mask[token], f"{case}, {name}: drew {token}"
    assert_close(sampling.softmax(_batch(vocab_size, F32).to(device)), probs)
    _check_renorm(sampling.top_p_renorm_probs(probs.float().to(device), 0.9).cpu(), top_p=0.9)
    for top_k in (50, 1000):
        _check_renorm(sampling.top_k_renorm_probs(probs.float().to(device), top_k).cpu(), top_k=top_k)
        masked = sampling.top_k_mask_logits(_batch(vocab_size, F32).to(device), top_k).isfinite().sum(-1)
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


# ---------------------------------------------------------------------------------------------- parameters, randomness


def test_min_p_keeps_the_likeliest(device: torch.device) -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]], device=device)
    for min_p in (1.0, 1.5, torch.tensor([1.0, 7.0], device=device)):
        for seed in range(5):
            tokens, valid = sampling.min_p_sampling_from_probs(probs, min_p, seed=seed, offset=0, return_valid=True)
            assert valid.all() and tokens[0] == 1 and tokens[1] in (0, 2)


def test_per_row_parameters(device: torch.device) -> None:
    probs = oracle.softmax(torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 2).float().to(device)
    top_k, top_p = torch.tensor([1, 2, 3, 500, 600, 7]), torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, 0.7])
    rows = [sampling.top_k_renorm_probs(probs[i : i + 1], int(k)) for i, k in enumerate(top_k)]
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(sampling.top_k_renorm_probs(probs, top_k.to(device, dtype)), torch.cat(rows))
    rows = [sampling.top_p_renorm_probs(probs[i : i + 1], float(p)) for i, p in enumerate(top_p)]
    assert torch.equal(sampling.top_p_renorm_probs(probs, top_p.to(device)), torch.cat(rows))
    # One entry per output row also when several draw from one distribution.
    indices = torch.tensor([2, 2, 0], device=device)
    sets = torch.tensor([1, 500, 1], dtype=torch.int32, device=device)
    for seed in range(20):
        tokens = sampling.top_k_sampling_from_probs(probs, sets, indices=indices, seed=seed, offset=0)
        assert tokens[0] == probs[2].argmax() and tokens[2] == probs[0].argmax()


@pytest.mark.parametrize("case", CASES)
def test_generator_state_decides_the_tokens(device: torch.device, case: str) -> None:
    draw, kwargs, _, kind = CASES[case]
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(5))
    rows = (logits if kind == "logits" else oracle.softmax(logits).float()).to(device)
    generator = _generator(device, 11)
    first, second = draw(rows, generator=generator, **kwargs), draw(rows, generator=generator, **kwargs)
    generator.manual_seed(11)
    assert torch.equal(first, draw(rows, generator=generator, **kwargs))
    assert torch.equal(second, draw(rows, generator=generator, **kwargs))
    assert not torch.equal(first, second)
    seeded = draw(rows, seed=7, offset=16, **kwargs)
    assert torch.equal(seeded, draw(rows, seed=7, offset=16, **kwargs))
    assert not torch.equal(seeded, draw(rows, seed=7, offset=32, **kwargs))
    on_device = [torch.tensor([value], device=device) for value in (7, 16)]
    assert torch.equal(seeded, draw(rows, seed=on_device[0], offset=on_device[1], **kwargs))
    torch.manual_seed(4)
    default = draw(rows, **kwargs)
    torch.manual_seed(4)
    assert torch.equal(default, draw(rows, **kwargs))


@pytest.mark.gpu
def test_graph_replays_draw_anew() -> None:
    probs = torch.softmax(torch.randn(64, 32000, device="cuda"), -1)
    sampling.top_p_sampling_from_probs(probs, 0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampling.top_p_sampling_from_probs(probs, 0.9)
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(tokens.clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    torch.cuda.manual_seed(9)
    graph.replay()
    again = tokens.clone()
    torch.cuda.manual_seed(9)
    graph.replay()
    assert torch.equal(again, tokens)


@pytest.mark.gpu
def test_placements_agree() -> None:
    """Each way to spread a row over blocks finds the same set."""
    from flashinfer.families import sampling as families
    from flashinfer.jit import default_resolver

    target = flashinfer.target.of_device(torch.device("cuda"))
    probs = _probs(32000, F32).cuda()
    expected = sampling.top_p_renorm_probs(probs, 0.9) > 0
    sizes = (1, 2, 4, 8) if torch.cuda.get_device_capability()[0] in (9, 10) else (1,)
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
                "output_stride": 32000,
                "num_rows": len(probs),
                "vocab_size": 32000,
            }
            launcher(grid, torch.cuda.current_stream().cuda_stream, values)
            differing = ((out > 0) != expected).sum(-1)
            assert not out.isnan().any() and (differing <= 2).all(), (cluster_size, row_kib, differing.tolist())


# -------------------------------------------------------------------------------------------------------- speculative


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
        generator=_generator(device),
    )
    tokens, accepted, emitted, ids = tokens.cpu(), accepted.cpu(), emitted.cpu(), ids.int()
    _check_frequencies(tokens[:, 0], target[0])
    for step in range(1, num_draft + 1):
        _check_frequencies(tokens[emitted >= step, step], target[step])
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


# -------------------------------------------------------------------------------------------------------------- edges


def test_empty_batch(device: torch.device) -> None:
    probs = torch.empty(0, 100, device=device)
    assert sampling.softmax(probs).shape == (0, 100)
    assert sampling.top_k_sampling_from_probs(probs, 5).shape == (0,)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    assert sampling.sampling_from_logits(torch.zeros(3, 100, device=device), nothing).shape == (0,)


def test_errors(device: torch.device) -> None:
    probs = torch.full((2, 10), 0.1, device=device)
    with pytest.raises(UnsupportedConfig, match="float64"):
        sampling.softmax(probs.double())
    with pytest.raises(ValueError, match="filter_apply_order"):
        sampling.top_k_top_p_sampling_from_probs(probs, 2, 0.5, filter_apply_order="top_p_first")
    with pytest.raises(ValueError, match="one entry per output row"):
        sampling.top_p_sampling_from_probs(probs, torch.ones(3, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        sampling.softmax(probs.t())
    with pytest.raises(ValueError, match=r"expected \[num_rows, vocab_size\]"):
        sampling.softmax(probs[0])
    with pytest.raises(ValueError, match="indices"):
        sampling.sampling_from_probs(probs, indices=torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="one step less"):
        ids = torch.zeros(1, 2, dtype=torch.int32, device=device)
        sampling.chain_speculative_sampling(probs[None], ids, probs[None])
    with pytest.raises(ValueError, match=r"maybe_output_emitted_draft_token_num is torch\.int64"):
        counts = torch.zeros(1, dtype=torch.int64, device=device)
        sampling.chain_speculative_sampling(probs[None, :1], ids[:, :1], probs[None], None, counts)


@pytest.mark.gpu
def test_generator_of_another_device() -> None:
    probs, generator = torch.full((2, 10), 0.1, device="cuda"), torch.Generator()
    with pytest.raises(ValueError, match="generator is on cpu, the input on cuda:0; make one for that device"):
        sampling.sampling_from_probs(probs, generator=generator)
    with pytest.raises(ValueError, match="generator is on cuda:0, the input on cpu; make one for that device"):
        sampling.sampling_from_probs(probs.cpu(), generator=_generator(probs.device))
