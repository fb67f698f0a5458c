# SPDX-License-Identifier: Apache-2.0
"""The causal convolutions beside the equation in FP64."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch

from flashinfer.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from flashinfer.errors import UnsupportedConfig
from tests.oracles.conv import causal_conv1d
from tests.tolerances import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(device, dtype)


def states_of(
    device: torch.device, dtype: torch.dtype, slots: int, dim: int, length: int, channels_last: bool = True
) -> torch.Tensor:
    """`[slots, dim, length]`, in pages of an engine: something lies behind each of them."""
    shape = (length, dim) if channels_last else (dim, length)
    pages = torch.full((slots, dim * length + 64), NAN, device=device).to(dtype)
    states = pages[:, : dim * length].view(slots, *shape)
    states.copy_(draw(device, dtype, slots, *shape, seed=5))
    return states.transpose(1, 2) if channels_last else states


def index(device: torch.device, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "dtype, dim, width, lengths, has_bias, activation",
    [
        (BF16, 1024, 4, [17, 1, 2, 3, 0, 40, 8], False, "silu"),
        (BF16, 8192, 4, [70], True, "silu"),
        (FP16, 96, 4, [1, 1, 1, 1, 5, 0, 0, 1], True, None),
        (FP32, 33, 3, [5, 9, 31, 2], True, "swish"),
        (BF16, 40, 2, [3, 16, 1], False, True),
        (FP16, 64, 3, [100, 33, 64, 65], True, "silu"),
        (BF16, 2056, 4, [8, 8, 16, 7, 9], False, "silu"),
        (BF16, 256, 4, [7, 6, 9, 5, 2, 2, 11, 1, 4, 3, 3, 8, 5, 13, 6, 1, 1, 9, 10, 3], False, "silu"),
    ],
    ids=str,
)
def test_sequences(
    device: torch.device, channels_last: bool, dtype: torch.dtype, dim: int, width: int, lengths: list[int],
    has_bias: bool, activation: Any,
) -> None:  # fmt: skip
    """Sequences of any length, of which some continue their state and one is padding."""
    num_sequences = len(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = draw(device, dtype, int(offsets[-1]), dim + 64)[:, :dim]
    weight, bias = draw(device, dtype, dim, width), draw(device, dtype, dim) if has_bias else None
    states = states_of(device, dtype, num_sequences + 2, dim, width, channels_last)  # one longer than it need be
    before = states.clone()
    slots = [(5 * i + 1) % (num_sequences + 2) for i in range(num_sequences)]
    if len(set(slots)) < num_sequences:
        slots = list(range(num_sequences))
    if num_sequences > 2:
        slots[2] = -1
    initial = [i % 3 != 1 for i in range(num_sequences)]
    output = causal_conv1d_fn(
        x.T, weight, bias, states, offsets.to(device, torch.int32), index(device, slots),
        torch.tensor(initial, device=device), activation,
    )  # fmt: skip
    assert output.shape == x.T.shape and output.stride() == (1, dim)
    untouched = set(range(len(states)))
    for i, slot in enumerate(slots):
        rows = slice(int(offsets[i]), int(offsets[i + 1]))
        if slot < 0:
            assert not output[:, rows].any()
            continue
        history = before[slot, :, : width - 1].T if initial[i] else None
        expected, inputs = causal_conv1d(x[rows], weight, bias, history, activation is not None)
        assert_close(output[:, rows].T, expected)
        if lengths[i]:
            assert torch.equal(states[slot, :, : width - 1].T.cpu().double(), inputs[-(width - 1) :])
            assert torch.equal(states[slot, :, width - 1 :], before[slot, :, width - 1 :])
            untouched.discard(slot)
    for slot in untouched:
        assert torch.equal(states[slot], before[slot])


def test_chunks_of_a_prompt(device: torch.device) -> None:
    """A prompt in pieces is the prompt at once."""
    dim, x = 64, draw(device, BF16, 100, 64)
    weight, states = draw(device, BF16, dim, 4), states_of(device, BF16, 1, dim, 3)
    whole, inputs = causal_conv1d(x, weight, None, None, True)
    outputs, begin = [], 0
    for length in (1, 2, 1, 30, 3, 63):
        arguments = index(device, [0, length]), None, torch.tensor([begin > 0], device=device)
        outputs.append(causal_conv1d_fn(x[begin : begin + length].T, weight, None, states, *arguments))
        begin += length
    assert_close(torch.cat(outputs, dim=1).T, whole)
    assert torch.equal(states[0].T.cpu().double(), inputs[-3:])


def test_without_states_and_tokens_of_no_sequence(device: torch.device) -> None:
    x, weight = draw(device, BF16, 30, 128), draw(device, BF16, 128, 4)
    output = causal_conv1d_fn(x.T, weight, None, None, index(device, [2, 9, 9, 25], torch.int64))
    assert not output[:, :2].any() and not output[:, 25:].any()
    for begin, end in ((2, 9), (9, 25)):
        assert_close(output[:, begin:end].T, causal_conv1d(x[begin:end], weight, None, None, True)[0])
    nothing = causal_conv1d_fn(x.T, weight, None, None, index(device, [3]))
    assert nothing.shape == (128, 30) and not nothing.any()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype, dim, width", [(BF16, 8192, 4), (FP16, 100, 3), (FP32, 33, 2), (BF16, 64, 4)], ids=str)
def test_update(device: torch.device, channels_last: bool, dtype: torch.dtype, dim: int, width: int) -> None:
    batch, slots = 5, [6, 0, -1, 3, 2]
    weight, bias = draw(device, dtype, dim, width), draw(device, dtype, dim)
    states = states_of(device, dtype, 8, dim, width - 1, channels_last)
    for step in range(3):
        x, before = draw(device, dtype, batch, dim, seed=step), states.clone()
        output = causal_conv1d_update(x, states, weight, bias, "silu", index(device, slots))
        assert output.shape == x.shape and not output[2].any()
        for i, slot in enumerate(slots):
            if slot >= 0:
                expected, inputs = causal_conv1d(x[i : i + 1], weight, bias, before[slot].T, True)
                assert_close(output[i], expected[0])
                assert torch.equal(states[slot].T.cpu().double(), inputs[1:])
        for slot in (1, 4, 5, 7):
            assert torch.equal(states[slot], before[slot])


@pytest.mark.parametrize("packed", [False, True])
def test_update_by_several_tokens(device: torch.device, packed: bool) -> None:
    dim, lengths, slots = 64, [3, 3] if not packed else [3, 0, 1, 6], [2, 0, 3, 1]
    weight, states = draw(device, BF16, dim, 4), states_of(device, BF16, 4, dim, 3)
    before = states.clone()
    x = draw(device, BF16, sum(lengths), dim)
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    slots = slots[: len(lengths)]
    if packed:
        output = causal_conv1d_update(
            x, states, weight, None, "silu", index(device, slots), query_start_loc=index(device, offsets)
        )
    else:
        batched = x.view(2, 3, dim).transpose(1, 2)
        output = causal_conv1d_update(batched, states, weight, None, "silu", index(device, slots))
        assert output.shape == batched.shape
        output = output.transpose(1, 2).reshape(6, dim)
    for i, slot in enumerate(slots):
        rows = slice(offsets[i], offsets[i + 1])
        expected, inputs = causal_conv1d(x[rows], weight, None, before[slot].T, True)
        assert_close(output[rows], expected)
        assert torch.equal(states[slot].T.cpu().double(), inputs[-3:])


def test_drafts(device: torch.device) -> None:
    """Drafts of four tokens, of which the next call says how many stay: outputs are those of the accepted tokens in a
    row."""
    dim, batch, drafted = 128, 3, 4
    weight = draw(device, BF16, dim, 4)
    states = states_of(device, BF16, 5, dim, 2 + drafted)
    slots, accepted = [4, -1, 2], [1, 1, 1]
    kept = {0: states[4, :, :3].T.clone(), 2: states[2, :, :3].T.clone()}  # all accepted inputs so far
    for step, next_accepted in enumerate(([3, 0, 1], [4, 0, 2], [1, 0, 1])):
        x = draw(device, BF16, batch * drafted, dim, seed=step)
        output = causal_conv1d_update(
            x, states, weight, None, "silu", index(device, slots), index(device, accepted),
            index(device, [0, 4, 8, 12]), max_query_len=drafted,
        )  # fmt: skip
        assert not output[4:8].any()
        for i in kept:
            rows = x[i * drafted : (i + 1) * drafted]
            expected, _ = causal_conv1d(rows, weight, None, kept[i][-3:], True)
            assert_close(output[i * drafted : (i + 1) * drafted], expected)
            kept[i] = torch.cat([kept[i], rows[: next_accepted[i]]])
        accepted = next_accepted


@pytest.mark.parametrize("null_slot", [0, 3])
def test_a_slot_that_stands_for_padding(device: torch.device, null_slot: int) -> None:
    x, weight = draw(device, BF16, 2, 64), draw(device, BF16, 64, 4)
    states = states_of(device, BF16, 4, 64, 3)
    before, slots = states.clone(), index(device, [null_slot, 1])
    for output in (
        causal_conv1d_update(x, states, weight, None, "silu", slots, pad_slot_id=null_slot),
        causal_conv1d_fn(x.T, weight, None, states, index(device, [0, 1, 2]), slots, pad_slot_id=null_slot).T,
    ):
        assert not output[0].any() and output[1].any()
    assert torch.equal(states[null_slot], before[null_slot])


@pytest.mark.parametrize("tokens, batch", [(0, 0), (0, 2)])
def test_nothing_to_do(device: torch.device, tokens: int, batch: int) -> None:
    weight, states = draw(device, BF16, 64, 4), states_of(device, BF16, 3, 64, 3)
    before, x = states.clone(), torch.empty(tokens, 64, dtype=BF16, device=device)
    assert causal_conv1d_fn(x.T, weight, None, states, index(device, [0] * (batch + 1))).shape == (64, 0)
    assert causal_conv1d_update(x, states, weight, query_start_loc=index(device, [0] * (batch + 1))).shape == (0, 64)
    assert torch.equal(states, before)


@pytest.mark.gpu
def test_hostile_indices() -> None:
    """What the host cannot see writes nothing outside: slots past the states, sequences past the tokens."""
    device = torch.device("cuda")
    memory = states_of(device, BF16, 8, 64, 3)
    states, before = memory[3:5], memory.clone()
    x, weight = draw(device, BF16, 12, 64), draw(device, BF16, 64, 4)
    offsets = index(device, [0, 4, 8, 100])
    output = causal_conv1d_fn(x.T, weight, None, states, offsets, index(device, [2, 1, -7])).T
    assert not output[:4].any() and not output[8:].any()
    assert_close(output[4:8], causal_conv1d(x[4:8], weight, None, None, True)[0])
    causal_conv1d_fn(x.T, weight, None, None, index(device, [-5, 9, 3, 1 << 30]))
    wrong = torch.tensor([0, 4, -(1 << 31) - 1, 12], device=device)  # of which 32 bits are the largest number
    causal_conv1d_fn(x.T, weight, None, states, wrong, torch.tensor([1, 0, 1], device=device))
    for accepted in (-3, 0, 9, 1 << 30):
        causal_conv1d_update(x[:2], states, weight, None, None, index(device, [5, -1]), index(device, [accepted] * 2))
    assert torch.equal(memory[:4], before[:4]) and torch.equal(memory[5:], before[5:])
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    device = torch.device("cuda")
    x, weight, states = draw(device, BF16, 4, 256), draw(device, BF16, 256, 4), states_of(device, BF16, 6, 256, 3)
    before, slots = states.clone(), index(device, [0, 1, 2, 3])
    causal_conv1d_update(x, states, weight, None, "silu", slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = causal_conv1d_update(x, states, weight, None, "silu", slots)
    slots.copy_(index(device, [5, -1, 0, 2]))
    states.copy_(before)
    graph.replay()
    assert not output[1].any()
    assert_close(output[0], causal_conv1d(x[:1], weight, None, before[5].T, True)[0][0])


def test_torch_compile(device: torch.device) -> None:
    x, weight, states = draw(device, BF16, 9, 64), draw(device, BF16, 64, 4), states_of(device, BF16, 3, 64, 3)
    offsets, slots = index(device, [0, 4, 9]), index(device, [2, 0])

    def layer(x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        y = causal_conv1d_fn(x.T, weight, None, states, offsets, slots).T
        return causal_conv1d_update(y[:2], states, weight, None, "silu", slots)

    eager, compiled = states.clone(), states.clone()
    expected = layer(x, eager)
    torch._dynamo.reset()
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, compiled)
    assert torch.equal(actual, expected) and torch.equal(compiled, eager)


# ------------------------------------------------------------------------------------------------------------- refusals


def _call(**changes: Any) -> None:
    cpu = torch.device("cpu")
    arguments: dict[str, Any] = {
        "x": draw(cpu, BF16, 10, 64).T, "weight": draw(cpu, BF16, 64, 4), "bias": None,
        "conv_states": states_of(cpu, BF16, 3, 64, 3), "query_start_loc": index(cpu, [0, 4, 10]),
        "cache_indices": index(cpu, [2, 0]), "has_initial_state": torch.tensor([True, False]),
    }  # fmt: skip
    arguments |= {name: change(arguments.get(name)) if callable(change) else change for name, change in changes.items()}
    causal_conv1d_fn(**arguments)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": lambda x: x.contiguous()}, ValueError, "stride 10 between channels; expected 1"),
    ({"x": lambda x: x[None]}, ValueError, r"expected \[dim, tokens\]"),
    ({"x": None}, TypeError, "x is NoneType"),
    ({"x": lambda x: x.double()}, UnsupportedConfig, "x is torch.float64"),
    ({"weight": None}, TypeError, "weight is NoneType"),
    ({"weight": lambda w: w[:32]}, ValueError, "weight has shape"),
    ({"weight": lambda w: w.half()}, ValueError, "weight is torch.float16"),
    ({"weight": lambda w: w[:, :1].contiguous()}, UnsupportedConfig, "width=1 is not supported"),
    ({"bias": torch.zeros(64)}, ValueError, "bias is torch.float32"),
    ({"conv_states": lambda s: s[:, :, :2]}, ValueError, "conv_states has shape"),
    ({"conv_states": lambda s: s.float()}, ValueError, "conv_states is torch.float32"),
    ({"conv_states": lambda s: s[:1].expand(3, -1, -1)}, ValueError, "overlap in memory"),
    ({"conv_states": None}, ValueError, "has_initial_state is given, conv_states is None"),
    ({"query_start_loc": None}, TypeError, "query_start_loc is NoneType"),
    ({"query_start_loc": torch.tensor([0, 4, 11], dtype=torch.int32)}, IndexError, "query_start_loc ends at 11"),
    ({"query_start_loc": torch.tensor([0, 8, 4], dtype=torch.int32)}, ValueError, "never descend"),
    ({"query_start_loc": torch.tensor([0, 4, 10])}, ValueError, "cache_indices is torch.int32; expected torch.int64"),
    ({"cache_indices": torch.tensor([0, 3], dtype=torch.int32)}, IndexError, r"cache_indices\[1\] is 3"),
    ({"cache_indices": torch.tensor([0], dtype=torch.int32)}, ValueError, "cache_indices has shape"),
    ({"cache_indices": None, "conv_states": lambda s: s[:1]}, ValueError, "1 slots for 2 sequences"),
    ({"has_initial_state": torch.tensor([1, 0])}, ValueError, "has_initial_state is torch.int64"),
    ({"activation": "gelu"}, UnsupportedConfig, "activation='gelu'"),
    ({"pad_slot_id": 0.5}, TypeError, "expected an integer"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", WRONG, ids=[f"{next(iter(c))}-{m}" for c, _, m in WRONG])
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"conv_state": None}, TypeError, "conv_state is NoneType"),
        ({"conv_state_indices": torch.tensor([4, 0])}, IndexError, r"conv_state_indices\[0\] is 4"),
        ({"num_accepted_tokens": torch.tensor([0, 1])}, IndexError, r"num_accepted_tokens\[0\] is 0"),
        ({"x": torch.zeros(2, 3, 64).bfloat16().transpose(1, 2), "num_accepted_tokens": torch.tensor([1, 1])},
         ValueError, "a draft of 3 needs 5"),
        ({"query_start_loc": torch.tensor([0, 3])}, IndexError, "query_start_loc ends at 3"),
    ],
)  # fmt: skip
def test_refusals_of_updates(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    cpu = torch.device("cpu")
    states: Optional[torch.Tensor] = states_of(cpu, BF16, 4, 64, 3)
    arguments = {"x": draw(cpu, BF16, 2, 64), "conv_state": states, "weight": draw(cpu, BF16, 64, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d_update(**{**arguments, **changes})  # type: ignore[arg-type]
