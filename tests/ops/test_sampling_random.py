# SPDX-License-Identifier: Apache-2.0
"""Random numbers of sampling: generators, seeds and offsets as numbers or tensors, CUDA graphs, torch.compile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flashinfer import sampling
from flashinfer.sampling.randomness import TRACES_GENERATORS
from tests.ops.sampling_kit import CASES, new_generator
from tests.oracles import sampling as oracle

Call = Callable[..., Any]


def _chain(rows: torch.Tensor, **random: Any) -> torch.Tensor:
    """Of two drafted tokens each; every token comes from a draw."""
    num_rows, vocab_size = rows.shape
    ids = torch.zeros(num_rows, 2, dtype=torch.int32, device=rows.device)
    draft = torch.full((num_rows, 2, vocab_size), 1 / vocab_size, device=rows.device)
    return sampling.chain_speculative_sampling(draft, ids, rows[:, None].expand(-1, 3, -1), **random)[0]


CALLS: dict[str, Call] = {
    "logits": sampling.sampling_from_logits,
    "top_p": lambda rows, **random: sampling.top_p_sampling_from_probs(rows, 0.9, **random),
    "top_k": lambda rows, **random: sampling.top_k_sampling_from_probs(rows, 100, **random),
    "top_k_top_p": lambda rows, **random: sampling.top_k_top_p_sampling_from_probs(rows, 100, 0.9, **random),
    "min_p": lambda rows, **random: sampling.min_p_sampling_from_probs(rows, 0.01, **random),
    "chain": _chain,
}
calls = pytest.mark.parametrize("call", CALLS)


def _rows(device: torch.device, num_rows: int = 64, vocab_size: int = 500) -> torch.Tensor:
    return torch.rand(num_rows, vocab_size, generator=torch.Generator().manual_seed(5)).to(device)


# ------------------------------------------------------------------------------------------------------ seed and offset


@pytest.mark.parametrize("case", CASES)
def test_generator_state_decides_the_tokens(device: torch.device, case: str) -> None:
    draw, kwargs, _, kind = CASES[case]
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(5))
    rows = (logits if kind == "logits" else oracle.softmax(logits).float()).to(device)
    generator = new_generator(device, 11)
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


@calls
def test_seeds_and_offsets_of_every_kind(device: torch.device, call: str) -> None:
    """Numbers, nothing, and tensors of any integer dtype and of one or no axis, in any mixture."""
    rows, draw = _rows(device), CALLS[call]
    tensor = lambda value, dtype=torch.int64, shape=(): torch.full(shape, value, dtype=dtype, device=device)  # noqa: E731
    seeds = [7, np.int64(7), tensor(7), tensor(7, torch.int32), tensor(7, torch.uint8, (1,)), tensor(7, torch.uint64)]
    offsets = [16, tensor(16), tensor(16, torch.int16, (1, 1))]
    expected = draw(rows, seed=7, offset=16)
    for seed, offset in itertools.product(seeds, offsets):
        assert torch.equal(draw(rows, seed=seed, offset=offset), expected), (seed, offset)
    for first, second in (({"seed": 7}, {"seed": 7, "offset": 0}), ({"offset": 16}, {"seed": 0, "offset": 16})):
        alone = {name: tensor(value) for name, value in first.items()}
        assert torch.equal(draw(rows, **first), draw(rows, **second))
        assert torch.equal(draw(rows, **alone), draw(rows, **second))
    assert not torch.equal(draw(rows, seed=8, offset=16), expected)
    assert not torch.equal(draw(rows, seed=7, offset=24), expected)
    # All 64 bits count, and a sign is one of them.
    assert torch.equal(draw(rows, seed=-1), draw(rows, seed=(1 << 64) - 1))
    assert torch.equal(draw(rows, seed=-1), draw(rows, seed=tensor(-1)))
    assert not torch.equal(draw(rows, seed=7 + (1 << 63)), draw(rows, seed=7))


@calls
def test_a_seed_for_each_row(device: torch.device, call: str) -> None:
    rows, draw = _rows(device), CALLS[call]
    seeds, offsets = (torch.arange(64, device=device) * step for step in (3, 8))
    together = draw(rows, seed=seeds, offset=offsets)
    for row in (0, 1, 63):
        assert torch.equal(together[row], draw(rows, seed=3 * row, offset=8 * row)[row])
    assert torch.equal(draw(rows, seed=seeds[:1].expand(64), offset=offsets), draw(rows, seed=0, offset=offsets))
    spread = torch.stack([seeds, seeds + 1], 1)
    assert torch.equal(draw(rows, seed=spread[:, 0], offset=offsets), together)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (1 << 64, ValueError, "is 18446744073709551616; expected"),
    (-(1 << 63) - 1, ValueError, "is -9223372036854775809; expected"),
    (2.0, TypeError, "is 2.0; expected an integer"),
    (math.nan, TypeError, "is nan; expected an integer"),
    ("7", TypeError, "is '7'; expected an integer"),
    (torch.zeros(3, dtype=torch.int64), ValueError, r"is a tensor \[3\]; expected one number, or \[64\]"),
    (torch.zeros(8, 8, dtype=torch.int64), ValueError, r"is a tensor \[8, 8\]; expected one number, or \[64\]"),
    (torch.zeros(0, dtype=torch.int64), ValueError, r"is a tensor \[0\]; expected one number"),
    (torch.zeros(()), ValueError, r"is a tensor of torch\.float32; expected an integer type"),
    (torch.zeros((), dtype=torch.bool), ValueError, r"is a tensor of torch\.bool; expected an integer type"),
    (torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "is on meta, input on"),
]


@calls
@pytest.mark.parametrize("name", ["seed", "offset"])
@pytest.mark.parametrize(("value", "error", "match"), WRONG)
def test_wrong_seeds_and_offsets(
    device: torch.device, call: str, name: str, value: Any, error: type[Exception], match: str
) -> None:
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        value = value.to(device)
    with pytest.raises(error, match=f": {name} {match}") as caught:
        CALLS[call](_rows(device), **{name: value})
    assert "\n" not in str(caught.value)


def test_offsets_are_not_negative(device: torch.device) -> None:
    with pytest.raises(ValueError, match="offset is -1; expected at least 0"):
        sampling.sampling_from_probs(_rows(device), seed=3, offset=-1)


@pytest.mark.gpu
@calls
def test_a_seed_on_the_host(call: str) -> None:
    """A host tensor of one number is that number; more of them would have to be copied."""
    rows = _rows(torch.device("cuda"))
    assert torch.equal(CALLS[call](rows, seed=torch.tensor([7])), CALLS[call](rows, seed=7))
    with pytest.raises(ValueError, match="seed is on cpu, input on cuda:0"):
        CALLS[call](rows, seed=torch.zeros(64, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------------- generators


def test_a_call_that_fails_draws_nothing(device: torch.device) -> None:
    generator = new_generator(device)
    before = generator.get_state()
    for wrong in ({"indices": torch.tensor([99], device=device)} if device.type == "cpu" else {}, {"top_p": math.nan}):
        with pytest.raises((IndexError, ValueError)):
            sampling.top_p_sampling_from_probs(_rows(device).double(), **{"top_p": 0.5, **wrong}, generator=generator)
    with pytest.raises(ValueError, match="NaN"):
        sampling.sampling_from_probs(_rows(device) * math.nan, check_nan=True, generator=generator)
    assert torch.equal(generator.get_state(), before)


@calls
def test_what_is_no_generator(device: torch.device, call: str) -> None:
    for wrong in (5, "text", np.random.default_rng()):
        with pytest.raises(TypeError, match=r"generator is .*; expected a torch\.Generator or None"):
            CALLS[call](_rows(device), generator=wrong)


@pytest.mark.gpu
def test_generator_of_another_device() -> None:
    probs, generator = torch.full((2, 10), 0.1, device="cuda"), torch.Generator()
    with pytest.raises(ValueError, match="generator is on cpu, the input on cuda:0; make one for that device"):
        sampling.sampling_from_probs(probs, generator=generator)
    with pytest.raises(ValueError, match="generator is on cuda:0, the input on cpu; make one for that device"):
        sampling.sampling_from_probs(probs.cpu(), generator=new_generator(probs.device))


# ---------------------------------------------------------------------------------------------------------- CUDA graphs


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


def _captured(draw: Call, rows: torch.Tensor, **random: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    draw(rows, **random)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = draw(rows, **random)
    return graph, tokens


@pytest.mark.gpu
@calls
@pytest.mark.parametrize("tensors", [("seed",), ("offset",), ("seed", "offset")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("per_row", [False, True])
def test_replays_read_seed_and_offset(call: str, tensors: tuple[str, ...], dtype: torch.dtype, per_row: bool) -> None:
    rows, draw = _rows(torch.device("cuda")), CALLS[call]
    for others in ({}, {"seed": 5, "offset": 32}):  # not given, or given as numbers
        numbers = {name: value for name, value in others.items() if name not in tensors}
        held = {name: torch.zeros(64 if per_row else 1, dtype=dtype, device="cuda") for name in tensors}
        graph, tokens = _captured(draw, rows, **held, **numbers)
        for value in (8, 16, 8):
            for tensor in held.values():
                tensor.fill_(value)
            graph.replay()
            assert torch.equal(tokens, draw(rows, **dict.fromkeys(tensors, value), **numbers)), value


@pytest.mark.gpu
@calls
def test_replays_with_a_generator_of_ones_own(call: str) -> None:
    rows, generator = _rows(torch.device("cuda")), new_generator(torch.device("cuda"))
    CALLS[call](rows, generator=generator)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        tokens = CALLS[call](rows, generator=generator)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(tokens.clone())
    assert not torch.equal(*draws)


@pytest.mark.gpu
def test_replays_read_every_parameter() -> None:
    rows = torch.softmax(torch.randn(4, 3000, device="cuda"), -1)
    k = torch.full((4,), 3000, dtype=torch.int32, device="cuda")
    p, seed = torch.ones(4, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    indices = torch.arange(4, device="cuda")

    def draw(rows: torch.Tensor, **random: Any) -> torch.Tensor:
        return sampling.top_k_top_p_sampling_from_probs(rows, k, p, indices, **random)

    graph, tokens = _captured(draw, rows, seed=seed)
    for order in ([0, 1, 2, 3], [3, 3, 1, 0]):
        k.fill_(1)
        indices.copy_(torch.tensor(order))
        graph.replay()
        assert torch.equal(tokens, rows.argmax(-1)[order].int())


@pytest.mark.gpu
def test_check_nan_is_refused_during_a_capture() -> None:
    rows = _rows(torch.device("cuda"))
    sampling.sampling_from_probs(rows)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(ValueError, match="check_nan waits for the device"):
            sampling.sampling_from_probs(rows, check_nan=True)
        sampling.sampling_from_probs(rows)


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(("call", "backend"), [*((call, "aot_eager") for call in CALLS), ("top_p", "inductor")])
def test_a_generator_under_compile_moves_on_as_in_eager_calls(device: torch.device, call: str, backend: str) -> None:
    """Two draws in one graph differ; each call goes on where the one before stopped; another generator is another."""
    rows = _rows(device, 8, 100)

    def twice(rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        first = CALLS[call](rows, generator=generator)  # and nothing that inductor would call g++ for
        return first, CALLS[call](rows, generator=generator)

    ours, theirs = ([new_generator(device, seed) for seed in (3, 4)] for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    if not TRACES_GENERATORS:
        with pytest.raises(Exception, match=r"traces a generator from torch 2\.13 on"):
            compiled(rows, ours[0])
        return
    for which in (0, 0, 1, 0, 1):
        first, second = compiled(rows, ours[which])
        expected = twice(rows, theirs[which])
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1]) and not torch.equal(first, second)


@calls
def test_seeds_under_compile(device: torch.device, call: str) -> None:
    rows = _rows(device, 8, 100)
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows, **random: CALLS[call](rows, **random), fullgraph=True, backend="aot_eager")
    seeds = torch.arange(8, device=device)
    numbers = [{"seed": value} for value in (7, 9, -1, (1 << 64) - 1)]
    for random in (*numbers, {"seed": seeds}, {"seed": seeds[3], "offset": 16}, {"offset": seeds * 8}):
        assert torch.equal(compiled(rows, **random), CALLS[call](rows, **random)), random


def test_public_names_may_be_wrapped(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator reaches its kernel through no public name: replaced by their compiled selves, they still end."""
    rows = _rows(device, 8, 100)
    expected = sampling.softmax(rows), sampling.top_p_sampling_from_probs(rows, 0.9, seed=1), _chain(rows, seed=1)
    torch._dynamo.reset()
    for name in ("softmax", "top_p_sampling_from_probs", "chain_speculative_sampling"):
        compiled = torch.compile(getattr(sampling, name), fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(sampling, name, compiled)
    actual = sampling.softmax(rows), sampling.top_p_sampling_from_probs(rows, 0.9, seed=1), _chain(rows, seed=1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected))
