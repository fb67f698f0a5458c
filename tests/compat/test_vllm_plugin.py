# SPDX-License-Identifier: Apache-2.0
"""examples/engines/vllm_plugin in a stand-in for vLLM: what it registers has the signatures that vLLM 0.25 asks for,
and computes what the layers of vLLM do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import flashinfer
from tests.kit import ROOT
from tests.tolerances import assert_close

NORM = "(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor"
SUM = "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) -> (Tensor, Tensor)"


class Operator:
    """Of vllm.ir."""

    def __init__(self, schema: str) -> None:
        self.impls: dict[str, Any] = {"native": None}
        self.schema = schema

    def register_impl(self, provider: str, *, supports_args: Callable[..., bool], inplace: bool = False) -> Any:
        def register(function: Callable[..., Any]) -> None:
            assert torch.library.infer_schema(function, mutates_args=[]) == self.schema
            assert provider not in self.impls
            self.impls[provider] = SimpleNamespace(call=function, takes=supports_args, inplace=inplace)

        return register


class Layer:
    """Of vllm.model_executor.layers."""

    instead: ClassVar[dict[str, type]] = {}
    use_flashinfer = False

    @classmethod
    def register_oot(cls, name: str) -> Callable[[type], None]:
        return lambda other: cls.instead.update({name: other})


class Builder:
    """FlashInferMetadataBuilder: what it would wait for, where nobody tells it."""

    def __init__(self, spec: object, layers: list[str], config: Any, device: torch.device) -> None:
        self.use_dcp = config.use_dcp

    def build(self, prefix: int, batch: Any, fast: bool = False) -> Any:
        return "copied back" if batch._seq_lens_cpu is None else batch._seq_lens_cpu


class Event:
    """Of torch.cuda."""

    log: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.log.append(name)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operators, once the plugin was loaded, and loaded again."""
    layers = "vllm.model_executor.layers"
    operators = SimpleNamespace(rms_norm=Operator(NORM), fused_add_rms_norm=Operator(SUM))
    found = {"vllm": {"ir": SimpleNamespace(ops=operators)}, "vllm.model_executor": {}, layers: {}}
    found[f"{layers}.activation"] = {"SiluAndMul": type("SiluAndMul", (Layer,), {})}
    found[f"{layers}.rotary_embedding"] = {}
    found[f"{layers}.rotary_embedding.base"] = {"RotaryEmbedding": type("RotaryEmbedding", (Layer,), {})}
    backends: dict[object, str] = {}
    found |= {"vllm.v1": {}, "vllm.v1.attention": {}, "vllm.v1.attention.backends": {}}
    found["vllm.v1.attention.backends.registry"] = {
        "AttentionBackendEnum": SimpleNamespace(FLASHINFER="FLASHINFER"),
        "register_backend": lambda name, path: backends.update({name: path}),
    }
    found["vllm.v1.attention.backends.flashinfer"] = {"FlashInferBackend": object, "FlashInferMetadataBuilder": Builder}
    for name, values in found.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "engines" / "vllm_plugin"))
    plugin = importlib.import_module("vllm_flashinfer")
    plugin.register()
    plugin.register()
    assert list(backends) == ["FLASHINFER"]
    module_name, _, class_name = backends["FLASHINFER"].rpartition(".")
    operators.backend = getattr(importlib.import_module(module_name), class_name)
    return operators


def normalized(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def test_norms(vllm: Any, device: torch.device) -> None:
    x, residual = torch.randn(2, 5, 256, device=device, dtype=torch.bfloat16)
    weight = torch.rand(256, device=device).bfloat16()
    norm, of_sum = vllm.rms_norm.impls["flashinfer"], vllm.fused_add_rms_norm.impls["flashinfer"]
    assert_close(norm.call(x, weight, 1e-5), normalized(x.double(), weight.double()))
    summed = x.double() + residual.double()
    out, total = of_sum.call(x, residual, weight, 1e-5)
    assert of_sum.inplace and out is x and total is residual
    assert_close(total, summed)
    assert_close(out, normalized(summed, weight.double()))
    assert norm.takes(x, weight, 1e-5) and of_sum.takes(x, residual, weight, 1e-5)
    for refused in ((None, 1e-5), (weight.float(), 1e-5), (weight, 1e-5, 128)):
        assert not norm.takes(x, *refused) and not of_sum.takes(x, residual, *refused)
    assert not of_sum.takes(x, residual.float(), weight, 1e-5)
    wide = torch.empty(1, 1 << 16, device=device, dtype=torch.bfloat16)
    for rows in (x.double(), wide):
        assert not norm.takes(rows, torch.ones_like(rows[0]), 1e-5)


def test_layers(vllm: Any, device: torch.device) -> None:
    x = torch.randn(5, 512, device=device, dtype=torch.bfloat16)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(Layer.instead["SiluAndMul"]().forward_cuda(x), torch.nn.functional.silu(gate) * up)
    assert Layer.instead["RotaryEmbedding"].use_flashinfer and not Layer.use_flashinfer


def test_rotary_embedding(device: torch.device) -> None:
    """As vLLM calls us then: slices of the packed projection, positions in 64 bits, cosines and sines in fp32."""
    heads, dim, theta = 4, 64, 1e4
    packed = torch.randn(5, (2 * heads + heads) * dim, device=device, dtype=torch.bfloat16)
    query, key, value = packed.split(heads * dim, dim=-1)
    positions = torch.tensor([0, 7, 3, 90, 99], device=device)
    angles = torch.outer(torch.arange(100, device=device), theta ** (-torch.arange(0, dim, 2, device=device) / dim))
    table, before = torch.cat([angles.cos(), angles.sin()], -1), packed.double().unflatten(-1, (3, heads, dim))
    flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
        positions=positions, query=query, key=key, head_size=dim, cos_sin_cache=table, is_neox=True
    )
    cos, sin = (part.double()[positions, None] for part in table.chunk(2, dim=-1))
    for i, turned in enumerate((query, key)):
        first, second = before[:, i].chunk(2, dim=-1)
        expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        assert_close(turned.unflatten(-1, (heads, dim)), expected)
    assert torch.equal(value.double(), before[:, 2].flatten(1))


@pytest.mark.parametrize("speculation, use_dcp", [(None, False), ("ngram", False), (None, True)])
def test_lengths_of_a_batch(vllm: Any, monkeypatch: pytest.MonkeyPatch, speculation: str | None, use_dcp: bool) -> None:
    """The host's lengths are taken where they are exact, once the copies of the build before have been made."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    config = SimpleNamespace(speculative_config=speculation, use_dcp=use_dcp)
    builder = vllm.backend.get_builder_cls()(None, [], config, torch.device("cpu"))
    batches = [SimpleNamespace(_seq_lens_cpu=None, seq_lens_cpu_upper_bound=bound) for bound in ([3, 4], None)]
    is_exact = speculation is None and not use_dcp
    assert [builder.build(0, batch) for batch in batches] == [[3, 4] if is_exact else "copied back", "copied back"]
    assert Event.log == ["synchronize"] * is_exact + ["record"] * 2
    known = SimpleNamespace(_seq_lens_cpu=[3, 3], seq_lens_cpu_upper_bound=[3, 4])
    assert builder.build(0, known) == [3, 3]
