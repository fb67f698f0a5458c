# SPDX-License-Identifier: Apache-2.0
"""Scales of quantized tensors: numbers, or one float32 on the device, which only the kernel reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.attention import decode_kit, prefill_kit
from tests.attention.prefill_kit import BF16, E4M3, FP16

KINDS = ("decode", "paged", "ragged")
Result = tuple[Tensor, Tensor]
FP8: dict[str, Any] = {"q_dtype": E4M3, "o_dtype": BF16}


class Planned:
    """A planned wrapper and its batch."""

    def __init__(self, kind: str, device: torch.device, **fields: Any) -> None:
        self.kind, self.device = kind, device
        if kind == "decode":
            self.batch: Any = decode_kit.Batch(decode_kit.Case("scaled", **fields), device)
            self.wrapper: Any = decode_kit.make_wrapper(device)
            self.batch.plan(self.wrapper)
            self.operands = (self.batch.q.to(device), self.batch.cache)
        else:
            self.batch = prefill_kit.make_batch(prefill_kit.Case("scaled", storage=kind, **fields), device)
            self.wrapper = prefill_kit.make_wrapper(self.batch.case, device)
            prefill_kit.plan(self.wrapper, self.batch)
            self.operands = prefill_kit.arguments(self.batch)

    def run(self, **scales: Any) -> Result:
        result: Result = self.wrapper.run(*self.operands, return_lse=True, **scales)
        return result

    def check(self, actual: Result, **scales: float) -> None:
        if self.kind == "decode":
            decode_kit.check(actual, self.batch.expected(**scales), self.batch.case)
        else:
            prefill_kit.check(actual, prefill_kit.expect(self.batch, **scales))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


FP8_KV = {"q_dtype": FP16, "kv_dtype": E4M3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {}),
    "fp8_kv": (FP8_KV, {}),
    "soft_cap": (FP8_KV, {"logits_soft_cap": 5.0}),
    "alibi": (FP8_KV, {"pos_encoding_mode": "ALIBI"}),
}


@pytest.mark.parametrize(("fields", "options"), CASES.values(), ids=CASES)
def test_against_the_oracle(kind: str, fields: Any, options: dict[str, Any], device: torch.device) -> None:
    if kind != "decode":
        options = {"causal": True, **options}
    planned = Planned(kind, device, **fields, options=options)
    values = {"q_scale": 0.5, "k_scale": 0.7, "v_scale": 1.7}
    scales = {name: torch.tensor(value, device=device) for name, value in values.items()}
    planned.check(planned.run(**scales), **values)
    planned.check(planned.run(**{**values, "k_scale": scales["k_scale"]}), **values)
    planned.check(planned.run(v_scale=scales["v_scale"][None]), v_scale=1.7)


@pytest.mark.parametrize("kind", ["paged", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_agrees_with_numbers_of_fp8_queries(kind: str, head_dim: int, device: torch.device) -> None:
    planned = Planned(kind, device, head_dim=head_dim, **FP8)
    values = {"q_scale": 0.5, "k_scale": 0.75, "v_scale": 2.0}  # whose products are exact
    actual, expected = (
        planned.run(**{n: torch.tensor(x, device=device) for n, x in values.items()}),
        planned.run(**values),
    )
    torch.testing.assert_close(actual, expected, rtol=8e-3, atol=1e-5)  # half an ulp of bf16 where a product was fused


def test_what_the_tensor_holds_by_then_counts(kind: str, device: torch.device) -> None:
    planned, scale = Planned(kind, device), torch.ones(1, device=device)
    for value in (1.0, 0.25, 3.0):
        scale.fill_(value)
        planned.check(planned.run(k_scale=scale, v_scale=scale), k_scale=value, v_scale=value)
    scale.set_(torch.full((1,), 0.5, device=device))  # the same tensor, other memory
    planned.check(planned.run(v_scale=scale), v_scale=0.5)


def test_a_scale_of_the_output(device: torch.device) -> None:
    planned, scale = Planned("ragged", device), torch.full((), 3.0, device=device)
    planned.check(planned.run(v_scale=scale, o_scale=2.0), v_scale=1.5)
    for wrong, error in ((0, ValueError), (-1.0, ValueError), ("2", TypeError), (scale, TypeError)):
        with pytest.raises(error, match=r"o_scale is .*; expected a"):
            planned.run(o_scale=wrong)
    with pytest.raises(TypeError, match="v_scale is '2'; expected a number"):
        planned.run(v_scale="2", o_scale=2.0)


SINGLE: dict[str, Callable[..., Any]] = {
    "decode": flashinfer.single_decode_with_kv_cache,
    "prefill": functools.partial(flashinfer.single_prefill_with_kv_cache, causal=True),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single(name: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 2 * h, 64, generator=generator).to(device, FP16) for n, h in ((9, 2), (200, 1), (200, 1)))
    q = q[0] if name == "decode" else q
    scales = ("q_scale", "k_scale", "v_scale") if name == "decode" else ("scale_q", "k_scale", "scale_v")
    values = dict(zip(scales, (0.5, 0.75, 2.0)))
    for tensors in (scales, scales[1:2], scales[2:]):
        mixed = {n: torch.tensor([x], device=device) if n in tensors else x for n, x in values.items()}
        torch.testing.assert_close(
            SINGLE[name](q, k, v, **mixed), SINGLE[name](q, k, v, **values), rtol=1e-3, atol=1e-5
        )
    if name == "prefill":
        one = torch.ones((), device=device)
        with pytest.raises(UnsupportedConfig, match="two scales of one tensor"):
            SINGLE[name](q, k, v, k_scale=one, scale_k=one)


def ones(*shape: int, **options: Any) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.ones(shape, **{"device": device, **options})


BAD: dict[str, tuple[Callable[[torch.device], Any], type[Exception], str]] = {
    "of heads": (ones(2), UnsupportedConfig, r"tensor of shape \[2\]; expected one"),
    "empty": (ones(0), UnsupportedConfig, r"tensor of shape \[0\]; expected one"),
    "fp64": (ones(1, dtype=torch.float64), ValueError, "is torch.float64 of shape"),
    "bf16": (ones(dtype=BF16), ValueError, "is torch.bfloat16 of shape"),
    "integers": (ones(dtype=torch.int32), ValueError, "is torch.int32 of shape"),
    "on meta": (ones(1, device="meta"), ValueError, "is on meta"),
    "text": (lambda device: "1", TypeError, "expected a number"),
    "a list": (lambda device: [1.0], TypeError, "expected a number"),
    "NaN": (lambda device: math.nan, ValueError, "is nan; expected"),
}


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_refused(kind: str, name: str, make: Any, error: Any, message: str, device: torch.device) -> None:
    planned = Planned(kind, device)
    with pytest.raises(error, match=rf"^\w+: ({name}|q_scale \* k_scale) .*{message}"):
        planned.run(**{name: make(device)})
    planned.check(planned.run())


@pytest.mark.parametrize(
    "name, value", [("q_scale", 0.0), ("k_scale", -1.0), ("k_scale", math.inf), ("v_scale", math.nan)]
)
def test_values_on_the_cpu_are_checked(kind: str, name: str, value: float) -> None:
    planned = Planned(kind, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"^\w+: {name} is {value}; expected a"):
        planned.run(**{name: torch.tensor(value)})


@pytest.mark.gpu
def test_on_another_device(kind: str) -> None:
    planned = Planned(kind, torch.device("cuda", 0))
    with pytest.raises(ValueError, match="k_scale is on cpu, the wrapper on cuda:0; move them to one device"):
        planned.run(k_scale=torch.ones(()))


@pytest.mark.gpu
def test_the_device_is_not_waited_for_and_a_graph_reads_what_is_there(kind: str) -> None:
    device = torch.device("cuda", 0)
    planned, scale = Planned(kind, device, **FP8), torch.ones((), device=device)
    planned.run(q_scale=scale, k_scale=scale, v_scale=scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        planned.run(q_scale=scale, k_scale=scale, v_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = planned.run(k_scale=scale, v_scale=scale)
    for value in (0.5, 2.0):
        scale.fill_(value)
        graph.replay()
        expected = planned.run(k_scale=value, v_scale=value)
        torch.testing.assert_close(actual, expected, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["decode", "ragged"])
def test_compiled(kind: str, device: torch.device) -> None:
    planned, scale = Planned(kind, device), torch.full((), 0.5, device=device)
    compiled = torch.compile(lambda k, v: planned.run(k_scale=k, v_scale=v), fullgraph=True, backend="aot_eager")
    planned.check(compiled(scale, 2.0), k_scale=0.5, v_scale=2.0)
    planned.check(compiled(scale, scale), k_scale=0.5, v_scale=0.5)
