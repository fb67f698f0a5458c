# SPDX-License-Identifier: Apache-2.0
"""What examples/engines/mini_sglang.py compares an engine with."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.kit import ROOT

transformers = pytest.importorskip("transformers", reason="needs transformers")


def test_plain_logits_are_those_of_transformers() -> None:
    spec = importlib.util.spec_from_file_location("mini_sglang", ROOT / "examples" / "engines" / "mini_sglang.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = {**example.LLAMA, **example.SMALL, "num_hidden_layers": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    weights = {name: weight.detach() for name, weight in llama.state_dict().items()}
    example.draw(weights)  # in place
    tokens = torch.randint(0, config["vocab_size"], (33,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = llama(tokens[None]).logits[0]
    merged = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    for layer in range(2):
        for name, parts in merged.items():
            at = f"model.layers.{layer}.{name.partition('.')[0]}."
            whole = torch.cat([weights.pop(f"{at}{part}.weight") for part in parts])
            weights[f"model.layers.{layer}.{name}.weight"] = whole
    actual = example.plain_logits(weights, config, tokens)
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
