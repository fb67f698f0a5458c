# SPDX-License-Identifier: Apache-2.0
"""examples/transformers_llama.py as an attention implementation: tiny models of Transformers, in wider numbers too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kit import ROOT

transformers = pytest.importorskip("transformers", reason="needs transformers")

SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 320, "max_position_embeddings": 256,
}  # fmt: skip
SLIDING = {"sliding_window": 9}
# What each has that the others have not, and the implementation that computes it too.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "mistral": ("Mistral", SLIDING, "sdpa"),  # a window in every layer
    "qwen3": ("Qwen3", {}, "sdpa"),
    "gemma2": ("Gemma2", {**SLIDING, "query_pre_attn_scalar": 100}, "eager"),  # in every other, soft caps, a scale
    "gpt_oss": ("GptOss", {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 2}, "eager"),  # sinks
}


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("transformers_llama", ROOT / "examples" / "transformers_llama.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transformers_llama"] = module
    spec.loader.exec_module(module)
    module.register()
    return module


def model_of(name: str, device: torch.device) -> tuple[Any, str]:
    family, options, reference = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # scores apart, and sinks that matter
        for parameter_name, parameter in model.named_parameters():
            if "proj" in parameter_name or "sinks" in parameter_name:
                parameter.normal_(0, 1.0 if "sinks" in parameter_name else 0.15)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")
    return model.to(device, dtype_on(device)).eval(), reference


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def batch(device: torch.device, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 320, (3, 41), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 30)):
        mask[row, :padding] = side != "left"
        mask[row, 41 - padding :] = side != "right"
    return tokens, mask


def check(model: Any, implementations: tuple[str, str], run: Callable[[Any, torch.device], torch.Tensor]) -> None:
    """The error of ours, the second, is that of the other one, give or take: of roundings elsewhere in the model."""
    device, results = model.device, []
    for implementation in implementations:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(run(model, device).double().cpu())
    model.set_attn_implementation(implementations[0])
    # Eager attention takes the softmax in FP32, where a mask made for FP64 leaves nothing of rows that are padding.
    wide = torch.float32 if implementations[0] == "eager" else torch.float64
    with torch.no_grad():
        truth = run(model.to("cpu", wide), torch.device("cpu")).double()
    theirs, ours = (float((result - truth).norm() / truth.norm()) for result in results)
    assert truth.isfinite().all() and ours < 1.5 * theirs + (2e-6 if device.type == "cpu" else 1e-3), (ours, theirs)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, side: str, example: Any, device: torch.device) -> None:
    model, reference = model_of(name, device)

    def run(model: Any, device: torch.device) -> torch.Tensor:
        tokens, mask = batch(device, side)
        logits: torch.Tensor = model(tokens, attention_mask=mask).logits
        return logits[mask.bool()]

    check(model, (reference, example.NAME), run)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_grows(name: str, example: Any, device: torch.device) -> None:
    """Past the window, in rows that are padded on the left."""
    model, reference = model_of(name, device)

    def run(model: Any, device: torch.device) -> torch.Tensor:
        tokens, mask = batch(device, "left")
        cache = model(tokens[:, :33], attention_mask=mask[:, :33], use_cache=True).past_key_values
        steps = []
        for end in (34, 35, 41):
            begin = cache.get_seq_length()
            step = model(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            steps.append(step.logits)
        return torch.cat(steps, dim=1)

    check(model, (reference, example.NAME), run)


def test_an_encoder_sees_both_ways(example: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, vocab_size=320
    )
    model = transformers.BertModel(config).to(device, dtype_on(device)).eval()

    def run(model: Any, device: torch.device) -> torch.Tensor:
        tokens, mask = batch(device, "right")
        hidden: torch.Tensor = model(tokens, attention_mask=mask).last_hidden_state
        return hidden[mask.bool()]

    check(model, ("sdpa", example.NAME), run)


def test_packed_sequences(example: Any, device: torch.device) -> None:
    """A batch without padding: one row, and where its sequences begin."""
    model, _ = model_of("mistral", device)
    lengths = (5, 30, 1, 20)

    def run(model: Any, device: torch.device) -> torch.Tensor:
        rows = [torch.randint(3, 320, (1, n), generator=torch.Generator().manual_seed(n)).to(device) for n in lengths]
        if model.config._attn_implementation == "sdpa":
            return torch.cat([model(row).logits for row in rows], dim=1)
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        logits: torch.Tensor = model(
            torch.cat(rows, dim=1), position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
            max_length_q=30, max_length_k=30, use_cache=False,
        ).logits  # fmt: skip
        return logits

    check(model, ("sdpa", example.NAME), run)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuous_batching(name: str, example: Any) -> None:
    """More requests than fit a batch, prompts in pieces, on the CPU, where greedy tokens are the same."""
    pytest.importorskip("transformers", minversion="5.24", reason="earlier ones have another continuous batching")
    model, _ = model_of(name, torch.device("cpu"))
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 320, (n,), generator=draw).tolist() for n in (3, 40, 17, 1, 60, 9)]
    greedy = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    before = transformers.AttentionInterface()["sdpa"]
    model.set_attn_implementation("sdpa")
    with example.instead_of_sdpa():
        assert transformers.AttentionInterface()["sdpa"] is example.flashinfer_attention
        served = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=config)
    assert transformers.AttentionInterface()["sdpa"] is before
    assert len(served) == len(prompts)
    for prompt, output in zip(prompts, served.values()):
        with torch.no_grad():
            alone = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=greedy
            )
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


def test_what_it_refuses(example: Any) -> None:
    model, _ = model_of("llama", torch.device("cpu"))
    model.set_attn_implementation(example.NAME)
    tokens, mask = batch(torch.device("cpu"), "left")
    with pytest.raises(NotImplementedError, match="no backward pass"):
        model(tokens)
    with pytest.raises(NotImplementedError, match=r"expected \[3, .*Static caches"), torch.no_grad():
        model.generate(tokens, attention_mask=mask, pad_token_id=0, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="is not supported"):  # as docs/engines.md says
        model.generate_batch([[5, 6]], generation_config=transformers.GenerationConfig(max_new_tokens=2))
