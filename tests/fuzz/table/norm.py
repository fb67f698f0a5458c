# SPDX-License-Identifier: Apache-2.0
"""Normalization."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, near, near_fp8, nothing
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.oracles import norm as oracle


def _shape(d: Draw, hidden_size: int, most: int = 3) -> tuple[int, ...]:
    return (*[d.size() for _ in range(d.random.randint(0, most))], hidden_size)


def _require_rows(input: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> None:
    if not input.is_floating_point() or input.dim() == 0 or weight.shape != input.shape[-1:]:
        raise Refused("weight does not fit input")
    for other in others:
        if other.shape != input.shape or not other.is_floating_point():
            raise Refused("an operand of another shape, or of no floating type")


def _rmsnorm(gemma: bool, d: Draw) -> Iterator[Call]:
    name = "gemma_rmsnorm" if gemma else "rmsnorm"
    dtype, hidden_size = d.kernel(*FLOATS), d.kernel(64, 8, 33, 1)
    shape = _shape(d, hidden_size)
    arguments: dict[str, Any] = {
        "input": d.normal(*shape, dtype=dtype, groups=2), "weight": d.dense(d.values(hidden_size, dtype=dtype)),
        "eps": d.choice((1e-6, 1e-5, 0.1)), "out": None, "enable_pdl": d.choice((None, True, False)),
    }  # fmt: skip
    if d.chance(0.6):
        arguments["out"] = arguments["input"] if d.chance(0.25) else d.blank(*shape, dtype=dtype, groups=2)

    def expect(input: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_rows(input, weight, *([] if out is None else [out]))
        expected = near(oracle.rmsnorm(input, weight, number(eps), gemma=gemma), input.dtype)
        return {"return": expected} if out is None else {"return": expected, "out": expected}

    function = getattr(flashinfer, name)
    yield from d.maybe_hostile(Call(name, function, arguments, expect, ("out",), (("out", "input"),)))


def _fused_add_rmsnorm(gemma: bool, d: Draw) -> Iterator[Call]:
    name = "gemma_fused_add_rmsnorm" if gemma else "fused_add_rmsnorm"
    dtype, hidden_size = d.kernel(*FLOATS), d.kernel(64, 8, 33)
    shape = _shape(d, hidden_size, 2)
    arguments = {
        "input": d.normal(*shape, dtype=dtype, groups=2), "residual": d.normal(*shape, dtype=dtype),
        "weight": d.dense(d.values(hidden_size, dtype=dtype)), "eps": d.choice((1e-6, 1e-5, 0.1)),
        "enable_pdl": d.choice((None, True, False)),
    }  # fmt: skip

    def expect(input: Any, residual: Any, weight: Any, eps: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_rows(input, weight, residual)
        total = input.double() + residual.double()
        return {
            "return": nothing, "residual": near(total, residual.dtype),
            "input": near(oracle.rmsnorm(total, weight, number(eps), gemma=gemma), input.dtype),
        }  # fmt: skip

    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, ("input", "residual")))


def _scale(d: Draw) -> Any:
    return d.dense(torch.tensor([0.5])) if d.chance(0.4) else d.choice((1.0, 0.01, 2))


def _rmsnorm_quant(d: Draw) -> Iterator[Call]:
    dtype, hidden_size, out_dtype = d.kernel(*FLOATS), d.kernel(64, 8, 33), d.kernel(*FP8)
    shape = _shape(d, hidden_size)
    arguments = {
        "out": d.blank(*shape, dtype=out_dtype, groups=2), "input": d.normal(*shape, dtype=dtype, groups=2),
        "weight": d.dense(d.values(hidden_size, dtype=dtype)), "scale": _scale(d), "eps": 1e-6, "enable_pdl": None,
    }  # fmt: skip

    def expect(out: Any, input: Any, weight: Any, scale: Any, eps: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_rows(input, weight, out)
        expected = near_fp8(oracle.rmsnorm(input, weight, number(eps)) / scale_of(scale), out.dtype)
        return {"return": expected, "out": expected}

    yield from d.maybe_hostile(Call("rmsnorm_quant", flashinfer.rmsnorm_quant, arguments, expect, ("out",)))


def _fused_add_rmsnorm_quant(d: Draw) -> Iterator[Call]:
    dtype, hidden_size, out_dtype = d.kernel(*FLOATS), d.kernel(64, 8, 33), d.kernel(*FP8)
    shape = _shape(d, hidden_size)
    arguments = {
        "out": d.blank(*shape, dtype=out_dtype, groups=2), "input": d.normal(*shape, dtype=dtype, groups=2),
        "residual": d.normal(*shape, dtype=dtype), "weight": d.dense(d.values(hidden_size, dtype=dtype)),
        "scale": _scale(d), "eps": 1e-6, "enable_pdl": None,
    }  # fmt: skip

    def expect(
        out: Any, input: Any, residual: Any, weight: Any, scale: Any, eps: Any, enable_pdl: Any
    ) -> Mapping[str, Check]:
        _require_rows(input, weight, out, residual)
        total = input.double() + residual.double()
        return {
            "return": nothing, "residual": near(total, residual.dtype),
            "out": near_fp8(oracle.rmsnorm(total, weight, number(eps)) / scale_of(scale), out.dtype),
        }  # fmt: skip

    function = flashinfer.fused_add_rmsnorm_quant
    yield from d.maybe_hostile(Call("fused_add_rmsnorm_quant", function, arguments, expect, ("out", "residual")))


def _require_finite(gate: torch.Tensor) -> None:
    if bool(gate.isinf().any()):
        raise Unspecified  # the limit of silu, or what the formula gives: NaN


def _gated_rmsnorm(d: Draw) -> Iterator[Call]:
    dtype, hidden_size = d.kernel(*FLOATS), d.kernel(64, 8, 33)
    shape = _shape(d, hidden_size, 2)
    arguments: dict[str, Any] = {
        "input": d.normal(*shape, dtype=dtype, groups=2), "gate": d.normal(*shape, dtype=dtype),
        "weight": d.dense(d.values(hidden_size, dtype=dtype)), "eps": d.choice((1e-6, 1e-5, 0.1)), "out": None,
        "enable_pdl": None,
    }  # fmt: skip
    if d.chance(0.6):
        arguments["out"] = arguments["input"] if d.chance(0.25) else d.blank(*shape, dtype=dtype)

    def expect(input: Any, gate: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> Mapping[str, Check]:
        _require_rows(input, weight, gate, *([] if out is None else [out]))
        _require_finite(gate)
        expected = near(oracle.gated_rmsnorm(input, gate, weight, number(eps)), input.dtype)
        return {"return": expected} if out is None else {"return": expected, "out": expected}

    aliases = (("out", "input"),)
    yield from d.maybe_hostile(Call("gated_rmsnorm", flashinfer.gated_rmsnorm, arguments, expect, ("out",), aliases))


def _gated_rmsnorm_quant(d: Draw) -> Iterator[Call]:
    dtype, hidden_size, out_dtype = d.kernel(*FLOATS), d.kernel(64, 8, 33), d.kernel(*FP8)
    shape = _shape(d, hidden_size, 2)
    arguments = {
        "out": d.blank(*shape, dtype=out_dtype), "input": d.normal(*shape, dtype=dtype, groups=2),
        "gate": d.normal(*shape, dtype=dtype), "weight": d.dense(d.values(hidden_size, dtype=dtype)),
        "scale": _scale(d), "eps": 1e-6, "enable_pdl": None,
    }  # fmt: skip

    def expect(
        out: Any, input: Any, gate: Any, weight: Any, scale: Any, eps: Any, enable_pdl: Any
    ) -> Mapping[str, Check]:
        _require_rows(input, weight, out, gate)
        _require_finite(gate)
        expected = oracle.gated_rmsnorm(input, gate, weight, number(eps)) / scale_of(scale)
        return {"return": near_fp8(expected, out.dtype), "out": near_fp8(expected, out.dtype)}

    function = flashinfer.gated_rmsnorm_quant
    yield from d.maybe_hostile(Call("gated_rmsnorm_quant", function, arguments, expect, ("out",)))


def scale_of(scale: Any) -> float:
    return 1.0 if scale is None else number(scale)


def number(scale: Any) -> float:
    """As the oracle takes it: a number, or a tensor that holds one. One so large that results underflow is anything."""
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise Refused("a scale of several elements")
        return float(scale.reshape(()))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise Refused("a scale that is no number")
    if 1e10 < abs(scale) < math.inf:
        raise Unspecified
    return float(scale)


def _layernorm(d: Draw) -> Iterator[Call]:
    dtype, hidden_size, weight_dtype = d.kernel(*FLOATS), d.kernel(64, 8, 33), d.kernel(*FLOATS)
    arguments = {
        "input": d.normal(*_shape(d, hidden_size), dtype=dtype, groups=2),
        "gemma": d.dense(d.values(hidden_size, dtype=weight_dtype)),
        "beta": d.dense(d.values(hidden_size, dtype=weight_dtype)), "eps": d.choice((1e-6, 0.1)),
    }  # fmt: skip

    def expect(input: Any, gemma: Any, beta: Any, eps: Any) -> Mapping[str, Check]:
        _require_rows(input, gemma)
        if beta.shape != gemma.shape or not beta.is_floating_point():
            raise Refused("beta does not fit gemma")
        # Of one element the deviation is zero, which eps divides: what is left is rounding.
        return {"return": near(oracle.layernorm(input, gemma, beta, number(eps)), input.dtype)}

    yield from d.maybe_hostile(Call("layernorm", flashinfer.layernorm, arguments, expect))


CASES: dict[str, Case] = {
    "rmsnorm": functools.partial(_rmsnorm, False),
    "gemma_rmsnorm": functools.partial(_rmsnorm, True),
    "fused_add_rmsnorm": functools.partial(_fused_add_rmsnorm, False),
    "gemma_fused_add_rmsnorm": functools.partial(_fused_add_rmsnorm, True),
    "rmsnorm_quant": _rmsnorm_quant,
    "fused_add_rmsnorm_quant": _fused_add_rmsnorm_quant,
    "gated_rmsnorm": _gated_rmsnorm,
    "gated_rmsnorm_quant": _gated_rmsnorm_quant,
    "layernorm": _layernorm,
}
