# SPDX-License-Identifier: Apache-2.0
"""Gated activations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, near_each, near_fp8
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.fuzz.table.norm import scale_of
from tests.oracles import activation as oracle


def _require_halves(input: torch.Tensor, out: Any) -> None:
    if not input.is_floating_point() or input.dim() == 0 or input.shape[-1] % 2:
        raise Refused("input is not two halves")
    if bool(input.double().isinf().any()):
        raise Unspecified  # the limit, or what the formula gives: NaN
    if out is not None and out.shape != (*input.shape[:-1], input.shape[-1] // 2):
        raise Refused("out is not as long as a half")


def _input(d: Draw) -> torch.Tensor:
    hidden_size = d.kernel(64, 0, 1, 7, 8)
    leading = [d.size() for _ in range(d.random.randint(0, 3))]
    return d.normal(*leading, 2 * hidden_size, dtype=d.kernel(*FLOATS), scale=2.0)


def _act_and_mul(name: str, gate: str, d: Draw) -> Iterator[Call]:
    input = _input(d)
    out = d.blank(*input.shape[:-1], input.shape[-1] // 2, dtype=input.dtype) if d.chance(0.6) else None

    def expect(input: Any, out: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_halves(input, out)
        expected = near_each(oracle.act_and_mul(gate, input), input.dtype)  # a gate far below zero is 1 - 0.9999
        return {"return": expected} if out is None else {"return": expected, "out": expected}

    arguments = {"input": input, "out": out, "enable_pdl": d.choice((None, True, False))}
    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, ("out",)))


def _silu_and_mul_quant(d: Draw) -> Iterator[Call]:
    input = _input(d)
    out = d.blank(*input.shape[:-1], input.shape[-1] // 2, dtype=d.kernel(*FP8))
    scale = d.dense(torch.tensor([0.5])) if d.chance(0.4) else d.choice((1.0, 0.01, 2))

    def expect(out: Any, input: Any, scale: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_halves(input, out)
        expected = near_fp8(oracle.act_and_mul("silu", input) / scale_of(scale), out.dtype)
        return {"return": expected, "out": expected}

    arguments = {"out": out, "input": input, "scale": scale, "enable_pdl": None}
    yield from d.maybe_hostile(Call("silu_and_mul_quant", flashinfer.silu_and_mul_quant, arguments, expect, ("out",)))


CASES: dict[str, Case] = {
    "silu_and_mul": functools.partial(_act_and_mul, "silu_and_mul", "silu"),
    "gelu_and_mul": functools.partial(_act_and_mul, "gelu_and_mul", "gelu"),
    "gelu_tanh_and_mul": functools.partial(_act_and_mul, "gelu_tanh_and_mul", "gelu_tanh"),
    "silu_and_mul_quant": _silu_and_mul_quant,
}
