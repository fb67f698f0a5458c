# SPDX-License-Identifier: Apache-2.0
"""Operands whose rows lie unevenly in memory: several strided tensors that group their rows differently."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from flashinfer.host.rows import common_rows
from tests.oracles import activation as activation_oracle
from tests.oracles import norm as norm_oracle
from tests.tolerances import assert_close

EPS = 1e-5
Shape = tuple[int, ...]

# --------------------------------------------------------------------------------------------------------- layouts


def draw_layout(shape: Shape, choose: random.Random) -> tuple[list[int], list[tuple[int, int]]]:
    """An order of the leading axes in memory, and how much padding stands before and behind each axis."""
    leading = list(range(len(shape) - 1))
    if choose.random() < 0.3:
        choose.shuffle(leading)
    pads = [(choose.choice((0, 0, 0, 1)), choose.choice((0, 0, 0, 1, 2))) for _ in leading]
    return leading, [*pads, (0, choose.choice((0, 0, 8, 3)))]


def lay_out(values: Tensor, poison: float, choose: random.Random) -> tuple[Tensor, Tensor]:
    """The values in a view of a buffer of poison, and that buffer."""
    order, pads = draw_layout(values.shape, choose)
    axes = [*order, values.dim() - 1]
    sizes = [values.shape[axis] + sum(pads[axis]) for axis in axes]
    buffer = torch.full(sizes, poison).to(values.device, values.dtype)
    view = buffer
    for at, axis in enumerate(axes):
        view = view.narrow(at, pads[axis][0], values.shape[axis])
    view = view.permute([axes.index(axis) for axis in range(values.dim())])
    view.copy_(values)
    return view, buffer


def outside(buffer: Tensor, view: Tensor) -> Tensor:
    """The bytes of a buffer that are not in the view."""
    is_outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
    is_outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return buffer.view(torch.uint8).reshape(*buffer.shape, buffer.element_size())[is_outside]


def row_offsets(tensor: Tensor) -> list[int]:
    """Where each row starts, in order: from the definition of strides."""
    indices = itertools.product(*map(range, tensor.shape[:-1]))
    return [sum(i * stride for i, stride in zip(index, tensor.stride())) for index in indices]


def have_two_levels(*tensors: Tensor) -> bool:
    """Whether one number of rows per group makes the rows of all of them lie evenly within groups, and the groups too.
    Tried out on every row."""
    offsets = [row_offsets(tensor) for tensor in tensors]
    num_rows = len(offsets[0])

    def fits(starts: list[int], size: int) -> bool:
        row, group = (starts[1] if size > 1 else 0), (starts[size] if size < num_rows else 0)
        return all(start == r // size * group + r % size * row for r, start in enumerate(starts))

    return any(all(fits(starts, size) for starts in offsets) for size in range(1, num_rows + 1) if num_rows % size == 0)


# ------------------------------------------------------------------------------------------------------- operators


def total(given: dict[str, Tensor]) -> Tensor:
    return given["input"].cpu().double() + given["residual"].cpu().double()


def rmsnorm(given: dict[str, Tensor], **options: Any) -> Tensor:
    return norm_oracle.rmsnorm(given["input"], given["weight"], EPS, **options)


def added(given: dict[str, Tensor], **options: Any) -> Tensor:
    return norm_oracle.rmsnorm(total(given), given["weight"], EPS, **options)


def call_fused(function: Callable[..., None]) -> Callable[..., None]:
    return lambda given: function(given["input"], given["residual"], given["weight"], EPS)


def call_gate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda given: function(given["input"], out=given["out"])


E4M3 = torch.float8_e4m3fn
Expected = dict[str, Callable[[dict[str, Tensor]], Tensor]]
# name -> (columns of input per column of out, strided operands, call, what each written operand holds afterwards)
OPS: dict[str, tuple[int, tuple[str, ...], Callable[[dict[str, Tensor]], object], Expected]] = {
    "rmsnorm": (
        1, ("input", "out"),
        lambda given: flashinfer.rmsnorm(given["input"], given["weight"], EPS, out=given["out"]),
        {"out": rmsnorm},
    ),
    "gemma_rmsnorm": (
        1, ("input", "out"),
        lambda given: flashinfer.gemma_rmsnorm(given["input"], given["weight"], EPS, out=given["out"]),
        {"out": lambda given: rmsnorm(given, gemma=True)},
    ),
    "fused_add_rmsnorm": (
        1, ("input", "residual"), call_fused(flashinfer.fused_add_rmsnorm), {"input": added, "residual": total}
    ),
    "gemma_fused_add_rmsnorm": (
        1, ("input", "residual"), call_fused(flashinfer.gemma_fused_add_rmsnorm),
        {"input": lambda given: added(given, gemma=True), "residual": total},
    ),
    "rmsnorm_quant": (
        1, ("input", "out"),
        lambda given: flashinfer.rmsnorm_quant(given["out"], given["input"], given["weight"], 0.5, EPS),
        {"out": lambda given: rmsnorm(given) / 0.5},
    ),
    "fused_add_rmsnorm_quant": (
        1, ("input", "residual", "out"),
        lambda given: flashinfer.fused_add_rmsnorm_quant(
            given["out"], given["input"], given["residual"], given["weight"], 0.5, EPS
        ),
        {"out": lambda given: added(given) / 0.5, "residual": total},
    ),
    "silu_and_mul": (
        2, ("input", "out"), call_gate(flashinfer.silu_and_mul),
        {"out": lambda given: activation_oracle.act_and_mul("silu", given["input"])},
    ),
    "gelu_and_mul": (
        2, ("input", "out"), call_gate(flashinfer.gelu_and_mul),
        {"out": lambda given: activation_oracle.act_and_mul("gelu", given["input"])},
    ),
    "gelu_tanh_and_mul": (
        2, ("input", "out"), call_gate(flashinfer.gelu_tanh_and_mul),
        {"out": lambda given: activation_oracle.act_and_mul("gelu_tanh", given["input"])},
    ),
    "silu_and_mul_quant": (
        2, ("input", "out"), lambda given: flashinfer.silu_and_mul_quant(given["out"], given["input"], 0.5),
        {"out": lambda given: activation_oracle.act_and_mul("silu", given["input"]) / 0.5},
    ),
}  # fmt: skip


def make_operands(
    name: str, shape: Shape, device: torch.device, choose: random.Random
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Operands of random layouts and their buffers. What is read has NaN around it, what is written 7."""
    wider, names, _, expected = OPS[name]
    generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
    given = {"weight": torch.randn(shape[-1], generator=generator).to(device)}
    buffers = {}
    for operand in names:
        columns = shape[-1] * (wider if operand == "input" else 1)
        values = torch.randn(*shape[:-1], columns, generator=generator).to(device)
        if operand == "out":
            values = values.to(E4M3 if name.endswith("_quant") else values.dtype)
        poison = 7.0 if operand in expected else math.nan
        given[operand], buffers[operand] = lay_out(values, poison, choose)
    return given, buffers


def assert_written(name: str, given: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Call; compare what is written with the oracle, and see that nothing around it changed."""
    *_, call, expected = OPS[name]
    before = {operand: tensor.clone() for operand, tensor in given.items()}
    around = {operand: outside(buffers[operand], given[operand]).clone() for operand in buffers}
    call(given)
    for operand, tensor in given.items():
        if operand not in expected:
            assert torch.equal(tensor.view(torch.uint8), before[operand].view(torch.uint8)), f"{operand} changed"
        elif tensor.dtype == E4M3:  # a step of fp8 is an eighth
            torch.testing.assert_close(tensor.cpu().double(), expected[operand](before), rtol=0.07, atol=0.002)
        else:
            assert_close(tensor, expected[operand](before))
        if operand in buffers:
            assert torch.equal(outside(buffers[operand], tensor), around[operand]), f"the memory around {operand}"


@pytest.mark.parametrize("name", OPS)
def test_any_layout_is_right_or_refused(device: torch.device, name: str) -> None:
    """Right wherever two levels of rows hold in all operands together, else a ValueError that leaves all as it was."""
    choose = random.Random(name)
    num_right = num_refused = 0
    for _ in range(120):
        leading = tuple(choose.choice((1, 2, 2, 3, 4)) for _ in range(choose.randrange(5)))
        given, buffers = make_operands(name, (*leading, choose.choice((5, 16))), device, choose)
        strided = [given[operand] for operand in OPS[name][1]]
        if have_two_levels(*strided):
            assert_written(name, given, buffers)
            num_right += 1
        else:
            before = {operand: buffer.clone() for operand, buffer in buffers.items()}
            with pytest.raises(ValueError, match=rf"^{name}: .*\.contiguous\(\)"):
                OPS[name][2](given)
            for operand, buffer in buffers.items():
                assert torch.equal(buffer.view(torch.uint8), before[operand].view(torch.uint8))
            num_refused += 1
    assert num_right > 20 and num_refused > 5


def test_groups_of_different_sizes(device: torch.device) -> None:
    """Rows in groups of six and out in groups of two: each alone has two levels, together there are three."""
    x = torch.randn(2, 8, 64, device=device)[:, :6].view(2, 3, 2, 64)
    buffer = torch.full((6, 3, 64), 7.0, device=device)
    with pytest.raises(ValueError, match=r"rmsnorm: the rows of input \(strides .*\) and out \(strides .*\) group"):
        flashinfer.rmsnorm(x, torch.ones(64, device=device), out=buffer[:, :2].view(2, 3, 2, 64))
    assert (buffer == 7.0).all()
    # A third axis that only one of them needs is two levels together.
    out = buffer[:, :2].view(2, 3, 2, 64)
    even = torch.randn(2, 3, 2, 64, device=device)
    flashinfer.rmsnorm(even, torch.ones(64, device=device), EPS, out=out)
    assert_close(out, norm_oracle.rmsnorm(even, torch.ones(64), EPS))
    assert (buffer[:, 2] == 7.0).all()


def test_many_groups_and_many_rows_in_a_group(device: torch.device) -> None:
    """More of either than an axis of a grid holds, of which only the first passes 65535."""
    for leading in ((70_000, 2), (2, 70_000)):
        x = torch.randn(leading[0], leading[1] + 1, 8, device=device)[:, : leading[1]]
        buffer = torch.full((leading[0], leading[1] + 2, 4), 7.0, device=device)
        out = buffer[:, : leading[1]]
        flashinfer.silu_and_mul(x, out=out)
        assert_close(out, activation_oracle.act_and_mul("silu", x))
        assert (buffer[:, leading[1] :] == 7.0).all()
        flashinfer.rmsnorm(x[..., :4], torch.ones(4, device=device), EPS, out=out)
        assert_close(out, norm_oracle.rmsnorm(x[..., :4], torch.ones(4), EPS))


def test_input_may_overlap_itself(device: torch.device) -> None:
    """An expanded input is only read."""
    row, weight = torch.randn(64, device=device), torch.randn(32, device=device)
    assert_close(
        flashinfer.rmsnorm(row[:32].expand(2, 3, 32), weight, EPS),
        norm_oracle.rmsnorm(row[:32].expand(2, 3, 32), weight, EPS),
    )
    assert_close(flashinfer.silu_and_mul(row.expand(4, 64)), activation_oracle.act_and_mul("silu", row.expand(4, 64)))
    windows = row.as_strided((30, 32), (1, 1))
    assert_close(flashinfer.rmsnorm(windows, weight, EPS), norm_oracle.rmsnorm(windows, weight, EPS))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("overlap", ["expanded", "sliding"])
def test_what_is_written_may_not_overlap_itself(device: torch.device, name: str, overlap: str) -> None:
    """Also when one layout of the same shape was prepared before."""
    *_, call, expected = OPS[name]
    for written in expected:
        choose = random.Random(written)
        given, _ = make_operands(name, (3, 16), device, choose)
        call(given)
        tensor = given[written]
        base = torch.full((tensor[0].numel() + 2,), 7.0, device=device).to(tensor.dtype)
        given[written] = base.as_strided(tensor.shape, (0 if overlap == "expanded" else 1, 1))
        with pytest.raises(ValueError, match=rf"{name}: elements of {written} overlap in memory"):
            call(given)
        assert (base.float() == 7.0).all()


@pytest.mark.parametrize(
    "function",
    [flashinfer.fused_add_rmsnorm, flashinfer.gemma_fused_add_rmsnorm],
    ids=lambda function: function.__name__,
)
def test_residual_is_not_input(device: torch.device, function: Callable[..., None]) -> None:
    """Both are written: one memory cannot hold both results. Known signatures are no exception."""
    x, weight = torch.randn(4, 16, device=device), torch.ones(16, device=device)
    function(x.clone(), x.clone(), weight)
    before = x.clone()
    for residual in (x, x.view(4, 16)):
        with pytest.raises(ValueError, match="input and residual are one tensor"):
            function(x, residual, weight)
    assert torch.equal(x, before)


def test_residual_is_not_out(device: torch.device) -> None:
    x, weight = torch.randn(4, 16, device=device), torch.ones(16, device=device)
    out = torch.zeros(4, 16, device=device).to(E4M3)
    residual = torch.empty(4, 64, dtype=torch.uint8, device=device)
    overlapping = residual[:, :16].view(E4M3)
    flashinfer.fused_add_rmsnorm_quant(out, x, residual.view(torch.float32), weight, 1.0)
    with pytest.raises(ValueError, match="out and residual are one tensor"):
        flashinfer.fused_add_rmsnorm_quant(overlapping, x, residual.view(torch.float32), weight, 1.0)


# ------------------------------------------------------------------------------------------------------------ edges

EMPTY: list[Shape] = [(0, 16), (3, 0, 16), (2, 3, 0, 16), (0, 0), (2, 3, 0), (2, 2, 2, 0), (0,)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do(device: torch.device, name: str, shape: Shape) -> None:
    """In any layout: there is no row to find."""
    for seed in range(5):
        given, buffers = make_operands(name, shape, device, random.Random(seed))
        assert_written(name, given, buffers)


@pytest.mark.parametrize("name", OPS)
def test_empty_operands_are_checked_too(device: torch.device, name: str) -> None:
    """What is wrong does not become right by being empty."""
    given, _ = make_operands(name, (0, 16), device, random.Random(0))
    for operand in OPS[name][1]:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            OPS[name][2]({**given, operand: given[operand].new_empty(0, 8)})
    with pytest.raises((ValueError, UnsupportedConfig), match=rf"^{name}: "):
        OPS[name][2]({operand: tensor.to(torch.float64) for operand, tensor in given.items()})


@pytest.mark.parametrize("name", OPS)
def test_no_dimensions(device: torch.device, name: str) -> None:
    given, _ = make_operands(name, (2, 16), device, random.Random(0))
    for operand in OPS[name][1]:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            OPS[name][2]({**given, operand: given[operand][0, 0]})
    scalars = {operand: tensor.flatten()[0] for operand, tensor in given.items()}
    with pytest.raises(ValueError, match=rf"^{name}: input has (no dimensions|shape \[\])"):
        OPS[name][2](scalars)
    if OPS[name][0] == 2 and not name.endswith("_quant"):
        with pytest.raises(ValueError, match=r"input has shape \[\]"):
            OPS[name][2]({**scalars, "out": None})  # type: ignore[dict-item]


def test_more_rows_than_an_int32_counts() -> None:
    """Rows are counted in 32 bits. 2^31 of them, of one column, that all lie in one place."""
    x = torch.zeros(1, 1).expand(1 << 31, 1)
    with pytest.raises(ValueError, match=r"rmsnorm: input has 2147483648 rows; expected at most 2147483647"):
        common_rows("rmsnorm", {"input": x})


def test_common_rows_of_one_tensor() -> None:
    """The geometry itself, of what one can check by eye."""
    base = torch.zeros(4, 6, 8, 10)

    def strides(tensor: Tensor) -> tuple[int, int, int]:
        num_rows, rows_per_group, ((row, group),) = common_rows("op", {"x": tensor})
        assert num_rows == tensor[..., 0].numel()
        return rows_per_group, row, group

    assert strides(base[0, 0, 0]) == (1, 0, 0)
    assert strides(base) == (1, 0, 10)
    assert strides(base[:, :, :, :7]) == (1, 0, 10)
    assert strides(base[:, :, :5]) == (5, 10, 80)
    assert strides(base[:, :3]) == (24, 10, 480)
    assert strides(base[:, :3, :1]) == (3, 80, 480)
    assert strides(base[:, :, 0]) == (1, 0, 80)
    assert strides(base[:1, :3, :5]) == (5, 10, 80)
    with pytest.raises(ValueError, match=r"op: the rows of x \(strides \[480, 80, 10, 1\]\) lie unevenly"):
        strides(base[:, :3, :5])
