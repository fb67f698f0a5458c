# SPDX-License-Identifier: Apache-2.0
"""Arguments of sampling: their ranges, one for all rows or one a row, what does not fit, what must not matter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flashinfer import sampling
from flashinfer.errors import FlashInferError, UnsupportedConfig
from flashinfer.host import indices as index_values
from tests.ops.sampling_kit import CASES, F32
from tests.oracles import sampling as oracle
from tests.tolerances import assert_close

SEEDED = {"seed": 3, "offset": 0}


def _rows(device: torch.device, num_rows: int = 4, vocab_size: int = 50) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    return oracle.softmax(logits).float().to(device)


# Every function of an argument, given the probabilities: what comes back depends on it.
Function = Callable[[torch.Tensor, Any], torch.Tensor]
TAKING: dict[str, dict[str, Function]] = {
    "top_k": {
        "top_k_renorm_probs": sampling.top_k_renorm_probs,
        "top_k_mask_logits": sampling.top_k_mask_logits,
        "top_k_sampling_from_probs": lambda x, k: sampling.top_k_sampling_from_probs(x, k, **SEEDED),
        "top_k_top_p_sampling_from_probs": lambda x, k: sampling.top_k_top_p_sampling_from_probs(x, k, 0.9, **SEEDED),
        "top_k_top_p_sampling_from_logits": lambda x, k: sampling.top_k_top_p_sampling_from_logits(x, k, 0.9, **SEEDED),
    },
    "top_p": {
        "top_p_renorm_probs": sampling.top_p_renorm_probs,
        "top_p_sampling_from_probs": lambda x, p: sampling.top_p_sampling_from_probs(x, p, **SEEDED),
        "top_k_top_p_sampling_from_probs": lambda x, p: sampling.top_k_top_p_sampling_from_probs(x, 9, p, **SEEDED),
        "top_k_top_p_sampling_from_logits": lambda x, p: sampling.top_k_top_p_sampling_from_logits(x, 9, p, **SEEDED),
    },
    "min_p": {"min_p_sampling_from_probs": lambda x, m: sampling.min_p_sampling_from_probs(x, m, **SEEDED)},
    "temperature": {"softmax": sampling.softmax},
}
FUNCTIONS = [(name, op) for name, functions in TAKING.items() for op in functions]
taking = pytest.mark.parametrize(("name", "op"), FUNCTIONS)
SAMPLERS: dict[str, Callable[..., Any]] = {
    name: lambda x, draw=draw, kwargs=kwargs, **more: draw(x, **kwargs, **more)
    for name, (draw, kwargs, _, _) in CASES.items()
}


# ---------------------------------------------------------------------------------------------------------- numbers

# What numbers mean at and beyond the ends of their ranges.
SAME = {
    "top_k": [(0, 1), (-1, 1), (-(1 << 40), 1), (50, 1 << 40), (1 << 31, 50), (np.int64(7), 7), (True, 1)],
    "top_p": [(-0.5, 0.0), (-1e30, 0.0), (0, 0.0), (1e-60, 0.0), (1, 1.0), (1e30, 1.0), (np.float32(0.5), 0.5)],
    "min_p": [(-0.5, 0.0), (-1e30, 0.0), (2, 1.0), (1e30, 1.0), (np.float64(0.5), 0.5)],
    "temperature": [(3.4e38, 3e38), (1, 1.0), (np.float16(0.5), 0.5), (1e-300, 1e-37)],
}  # fmt: skip
NUMBERS = [(name, op, *pair) for name, op in FUNCTIONS for pair in SAME[name]]


@pytest.mark.parametrize(("name", "op", "value", "same_as"), NUMBERS)
def test_numbers_beyond_the_range_mean_its_end(
    device: torch.device, name: str, op: str, value: Any, same_as: Any
) -> None:
    rows, function = _rows(device), TAKING[name][op]
    assert torch.equal(function(rows, value), function(rows, same_as))


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-44, 1e-300])
def test_the_smallest_temperatures_leave_the_largest_logit(device: torch.device, temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [-math.inf, 0.0, -1e-3]], device=device)
    expected = [[0.0, 1.0, 0.0]] * 2
    assert sampling.softmax(logits, temperature).tolist() == expected
    if temperature >= 1e-37:  # what fp32 holds without fewer bits
        assert sampling.softmax(logits, torch.full((2,), temperature, device=device)).tolist() == expected


WRONG_NUMBERS: dict[str, list[tuple[Any, type[Exception]]]] = {
    "top_k": [
        (2.5, TypeError),
        ("5", TypeError),
        (math.nan, TypeError),
        (1 << 70, ValueError),
        ([5], TypeError),
        (None, TypeError),  # no filter is another function
    ],
    "top_p": [
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        ("0.5", TypeError),
        ([0.5], TypeError),
        (1j, TypeError),
        (None, TypeError),
    ],
    "temperature": [
        (0, ValueError),
        (0.0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (10**400, TypeError),
    ],
}
WRONG_NUMBERS["min_p"] = WRONG_NUMBERS["top_p"]


@pytest.mark.parametrize(("name", "op", "value", "error"), [(*f, *w) for f in FUNCTIONS for w in WRONG_NUMBERS[f[0]]])
def test_wrong_numbers(device: torch.device, name: str, op: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{op}: {name} is ") as caught:
        TAKING[name][op](_rows(device), value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- a value for each row


def _per_row(name: str, num_rows: int) -> torch.Tensor:
    values = torch.linspace(0.1, 0.9, num_rows)
    return (values * 20).int() if name == "top_k" else values


@taking
@pytest.mark.parametrize("num_rows", [1, 4])
def test_tensors_of_one_value_a_row(device: torch.device, name: str, op: str, num_rows: int) -> None:
    """Of any dtype that holds such values, any stride, as a column; one element stands for all rows."""
    rows, function, values = _rows(device, num_rows), TAKING[name][op], _per_row(name, num_rows).to(device)
    expected = function(rows, values)
    if op == "softmax":
        assert_close(expected, oracle.softmax(rows, values.double()))
    spread = torch.zeros(num_rows, 3, dtype=values.dtype, device=device)
    spread[:, 1] = values
    dtypes = [torch.int64, torch.int16, torch.uint8] if name == "top_k" else [torch.float64]
    for same in (values[:, None], spread[:, 1], *(values.to(dtype) for dtype in dtypes)):
        assert torch.equal(function(rows, same), expected), same.shape
    one = values[0]
    for same in (one, one[None], one[None, None]):
        assert torch.equal(function(rows, same), function(rows, one.item())), same.shape


@taking
def test_tensors_that_do_not_fit(device: torch.device, name: str, op: str) -> None:
    rows, function, values = _rows(device), TAKING[name][op], _per_row(name, 4).to(device)
    for wrong in (values[:3], values[:0], torch.cat([values, values]), values.view(2, 2)):
        with pytest.raises(ValueError, match=rf"{op}: {name} is a tensor .*expected a number or \[4\]"):
            function(rows, wrong)
    for dtype in (torch.bool, torch.complex64, *([torch.float32] if name == "top_k" else [])):
        with pytest.raises(ValueError, match=rf"{op}: {name} is a tensor of {dtype}; expected"):
            function(rows, values.to(dtype))
    with pytest.raises(ValueError, match=rf"{op}: {name} is on meta, input on {device.type}"):
        function(rows, values.to("meta"))


def test_one_value_for_each_output_row(device: torch.device) -> None:
    probs = oracle.softmax(torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 2).float().to(device)
    top_k, top_p = torch.tensor([1, 2, 3, 500, 600, 7]), torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, 0.7])
    rows = [sampling.top_k_renorm_probs(probs[i : i + 1], int(k)) for i, k in enumerate(top_k)]
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(sampling.top_k_renorm_probs(probs, top_k.to(device, dtype)), torch.cat(rows))
    rows = [sampling.top_p_renorm_probs(probs[i : i + 1], float(p)) for i, p in enumerate(top_p)]
    assert torch.equal(sampling.top_p_renorm_probs(probs, top_p.to(device)), torch.cat(rows))
    # Also when several draw from one distribution.
    indices = torch.tensor([2, 2, 0], device=device)
    sets = torch.tensor([1, 500, 1], dtype=torch.int32, device=device)
    for seed in range(20):
        tokens = sampling.top_k_sampling_from_probs(probs, sets, indices=indices, seed=seed, offset=0)
        assert tokens[0] == probs[2].argmax() and tokens[2] == probs[0].argmax()


def test_hostile_values_in_tensors(device: torch.device) -> None:
    """The same as of numbers where those are legal; and whatever a value, tokens of the vocabulary and no hang."""
    rows, inf, nan = _rows(device, 8), math.inf, math.nan
    k = torch.tensor([0, -1, -(1 << 63), (1 << 63) - 1, 50, 51, 1, 49], device=device)
    expected = [sampling.top_k_renorm_probs(rows[i : i + 1], max(int(k[i]), 1)) for i in range(8)]
    assert torch.equal(sampling.top_k_renorm_probs(rows, k), torch.cat(expected))
    p = torch.tensor([-1.0, -inf, 0.0, 1.0, inf, nan, 2.0, 1e-45], device=device)
    ends = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]  # NaN is no limit
    expected = [sampling.top_p_renorm_probs(rows[i : i + 1], end) for i, end in enumerate(ends)]
    assert torch.equal(sampling.top_p_renorm_probs(rows, p), torch.cat(expected))
    for tokens in (
        sampling.top_k_sampling_from_probs(rows, k),
        sampling.top_p_sampling_from_probs(rows, p),
        sampling.min_p_sampling_from_probs(rows, p),
        sampling.top_k_top_p_sampling_from_probs(rows, k, p),
        sampling.top_k_top_p_sampling_from_logits(rows, k, p, filter_apply_order="joint"),
    ):
        assert tokens.min() >= 0 and tokens.max() < 50
    temperatures = torch.tensor([0.0, -0.0, -1.0, nan, -inf, 1.0, 0.5, 1e30], device=device)
    softmax = sampling.softmax(rows, temperatures)
    assert softmax.isnan().all(-1).tolist() == [True] * 5 + [False] * 3
    assert_close(softmax[5:], oracle.softmax(rows[5:], temperatures[5:].double()))


# ----------------------------------------------------------------------------------------------------------------- rows


def test_empty_batch(device: torch.device) -> None:
    probs = torch.empty(0, 100, device=device)
    assert sampling.softmax(probs).shape == (0, 100)
    assert sampling.top_k_sampling_from_probs(probs, 5).shape == (0,)
    assert sampling.top_k_sampling_from_probs(probs, torch.empty(0, dtype=torch.int32, device=device)).shape == (0,)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    assert sampling.sampling_from_logits(torch.zeros(3, 100, device=device), nothing).shape == (0,)


@pytest.mark.parametrize("case", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_outside_of_the_input(device: torch.device, case: str, dtype: torch.dtype) -> None:
    """On the CPU an error. On a GPU nothing is read for them: token 0, not valid, and other rows as if they were not
    there."""
    storage = torch.full((6, 60), math.nan, device=device)
    rows = storage[1:5, 3:53].copy_(_rows(device))
    ends = torch.iinfo(dtype)
    for wrong in (-1, 4, ends.max, ends.min):
        indices = torch.tensor([0, 3, wrong, 2], dtype=dtype, device=device)
        if device.type == "cpu":
            with pytest.raises(IndexError, match=rf"indices\[2\] is {wrong}; expected 0 to 3, the input has 4 rows"):
                SAMPLERS[case](rows, indices=indices)
            continue
        tokens, valid = SAMPLERS[case](rows, indices=indices, return_valid=True, **SEEDED)
        right = SAMPLERS[case](rows, indices=indices.clamp(0, 3), **SEEDED)
        assert valid.tolist() == [True, True, False, True] and tokens[2] == 0
        assert torch.equal(tokens[[0, 1, 3]], right[[0, 1, 3]])
    with pytest.raises(IndexError, match="indices names 1 rows of an empty input"):
        SAMPLERS[case](rows[:0], indices=torch.zeros(1, dtype=dtype, device=device))


@pytest.mark.gpu
def test_indices_on_a_gpu_are_looked_at_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK_INDICES", "1")
    index_values._checks_devices.cache_clear()
    try:
        probs = _rows(torch.device("cuda"), 3, 77)
        with pytest.raises(IndexError, match=r"indices\[1\] is 3; expected 0 to 2"):
            sampling.sampling_from_probs(probs, torch.tensor([0, 3], device="cuda"))
    finally:
        monkeypatch.undo()
        index_values._checks_devices.cache_clear()


def test_negative_probabilities_draw_from_the_vocabulary(device: torch.device) -> None:
    """What is drawn then is not said; that it is a token is."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 700, generator=g)
    rows[50:100] = rows[50:100].abs().neg()  # nothing to draw
    rows[100:150, 1:] = -1e-8  # the sum hangs on one token
    rows[100:150, 0] = 1.0
    rows = rows.to(device)
    for case, draw in SAMPLERS.items():
        if "logits" not in case:
            tokens, valid = draw(rows, return_valid=True)
            assert tokens.min() >= 0 and tokens.max() < 700, case
            assert not valid[50:100].any() and (tokens[100:150] == 0).all(), case


def test_infinite_probabilities(device: torch.device) -> None:
    rows = torch.tensor([[0.25, math.inf, 0.5], [0.25, 0.25, 0.5]], device=device)
    for dtype in (F32, torch.float16):
        for case, draw in SAMPLERS.items():
            if "logits" not in case:
                _, valid = draw(rows.to(dtype), return_valid=True)
                assert valid.tolist() == [False, True], case
        for renormed in (sampling.top_p_renorm_probs(rows.to(dtype), 0.9), sampling.top_k_renorm_probs(rows, 2)):
            assert renormed.isnan().all(-1).tolist() == [True, False]


def test_repeated_and_strided_rows(device: torch.device) -> None:
    row = _rows(device, 1)
    assert torch.equal(
        sampling.top_k_renorm_probs(row.expand(5, -1), 3), sampling.top_k_renorm_probs(row, 3).repeat(5, 1)
    )
    wide = torch.full((5, 130), math.nan, device=device)
    wide[:, 7:57] = row
    tokens = sampling.sampling_from_probs(wide[:, 7:57], **SEEDED)
    if device.type == "cpu":
        assert torch.equal(tokens, sampling.sampling_from_probs(row.repeat(5, 1), **SEEDED))
    else:  # rows that lie otherwise are read in other vectors, whose elements get other random words
        assert (row[0, tokens.long()] > 0).all()


def test_wrong_rows(device: torch.device) -> None:
    probs = torch.full((2, 10), 0.1, device=device)
    with pytest.raises(UnsupportedConfig, match="float64"):
        sampling.softmax(probs.double())
    with pytest.raises(UnsupportedConfig, match="int32"):
        sampling.sampling_from_logits(probs.int())
    with pytest.raises(ValueError, match="filter_apply_order"):
        sampling.top_k_top_p_sampling_from_probs(probs, 2, 0.5, filter_apply_order="top_p_first")
    with pytest.raises(ValueError, match="contiguous"):
        sampling.softmax(probs.t())
    for wrong in (probs[0], probs[None], probs[0, 0], probs[:, :0]):
        with pytest.raises(ValueError, match=r"expected \[num_rows, vocab_size\] with at least one token"):
            sampling.softmax(wrong)
        with pytest.raises(ValueError, match=r"expected \[num_rows, vocab_size\] with at least one token"):
            sampling.sampling_from_probs(wrong)
    zeros = torch.zeros(4, dtype=torch.int32, device=device)
    for indices in (zeros.float(), zeros.short(), zeros[::2], zeros.view(2, 2), zeros[0]):
        with pytest.raises(ValueError, match="expected contiguous int32 or int64"):
            sampling.sampling_from_probs(probs, indices=indices)
    many = torch.zeros(1, 10, device=device).expand((1 << 31) + 5, 10)
    for function in (sampling.softmax, sampling.sampling_from_probs):
        with pytest.raises(ValueError, match="2147483653 rows of 10 tokens; at most 268435456 of 16777216"):
            function(many)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    assert sampling.sampling_from_logits(many, one, **SEEDED).shape == (1,)


def test_no_tensor_where_one_belongs(device: torch.device) -> None:
    probs: Any = _rows(device)
    for wrong in ([[0.5, 0.5]], "text", None, np.ones((2, 2), np.float32)):
        kind = type(wrong).__name__
        for function in (sampling.softmax, sampling.sampling_from_probs):
            with pytest.raises(TypeError, match=f"the input is {kind}; expected a tensor"):
                function(wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match=f"indices is {kind}; expected a tensor"):
                sampling.sampling_from_probs(probs, wrong)


def test_devices_without_a_kernel() -> None:
    """Also after the same call on a device that has one, and for parameters elsewhere."""
    probs = _rows(torch.device("cpu"))
    for on in ("cpu", "meta"):
        expected: Any = contextlib.nullcontext()
        if on == "meta":
            expected = pytest.raises(
                UnsupportedConfig, match="device meta is not supported; expected a cuda or cpu device"
            )
        for function in (sampling.softmax, sampling.sampling_from_probs, SAMPLERS["top_k_first_probs"]):
            with expected:
                function(probs.to(on))
    for indices in (torch.zeros(2, dtype=torch.int32, device="meta"), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="indices is on"):
            sampling.sampling_from_probs(probs.to("meta") if indices.is_cpu else probs, indices)
    assert sampling.sampling_from_probs(torch.empty(0, 5, device="meta")).device.type == "meta"


# -------------------------------------------------------------------------------------------------------- ambient state


@contextlib.contextmanager
def _default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], Any]] = {
    "default device": lambda: _default_device("meta"),
    "default dtype": _default_dtype,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("ambient", AMBIENT)
def test_ambient_state_does_not_matter(device: torch.device, ambient: str) -> None:
    rows = _rows(device, 5, 777)  # a shape of its own: nothing is prepared yet
    indices = torch.tensor([4, 0], device=device)
    half = torch.full((2,), 0.5, device=device, dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(8)
        if device.type == "cuda":
            torch.cuda.manual_seed(8)
        tokens, valid = sampling.top_p_sampling_from_probs(rows, half, indices, check_nan=True, return_valid=True)
        chain = sampling.chain_speculative_sampling(rows[None, :2], indices[None], rows[None, :3])
        return [sampling.softmax(rows, 0.5), sampling.top_k_mask_logits(rows, 9), tokens, valid, *chain]

    with AMBIENT[ambient]():
        inside = results()
    outside = results()
    for ours, expected in zip(inside, outside):
        assert ours.device == expected.device and ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["fake", "freed"])
@pytest.mark.parametrize(
    "call",
    [
        sampling.softmax,
        lambda x: sampling.top_p_renorm_probs(x, 0.5),
        lambda x: sampling.top_k_renorm_probs(x, 3),
        lambda x: sampling.top_k_mask_logits(x, 3),
        sampling.sampling_from_logits,
        sampling.sampling_from_probs,
        lambda x: sampling.top_k_top_p_sampling_from_probs(x, 3, 0.5),
        lambda x: sampling.chain_speculative_sampling(
            torch.full((1, 1, 33), 1 / 33, device=x.device),
            torch.ones(1, 1, dtype=torch.int32, device=x.device),
            x[None],
        ),
    ],
    ids=["softmax", "top_p_renorm", "top_k_renorm", "mask_logits", "from_logits", "from_probs", "top_k_top_p", "chain"],
)
def test_an_input_without_memory_finds_no_launch_of_one_with(call, kind, device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.rand(2, 33, device=device).softmax(-1)
    call(x)
    if kind == "fake":
        x = FakeTensorMode().from_tensor(x)
    else:
        x = x.clone()
        x.untyped_storage().resize_(0)
    with pytest.raises((FlashInferError, RuntimeError)):
        call(x)
