"""flashinfer as an attention implementation of Hugging Face Transformers.

Registers an attention implementation and runs a Llama of the true Llama-3.2-1B shape (two layers, random weights)
with it and with PyTorch's SDPA: the logits agree.

    python examples/transformers_llama.py [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Optional

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import flashinfer

NAME = "fi"  # Transformers takes any name with "flash" in it for one of its own


def flashinfer_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one batch without padding.

    Transformers passes `[batch, heads, length, head_dim]` and wants `[batch, length, heads, head_dim]` back. Keys may
    be longer than queries (a cache holds the past); causal is aligned to their end, as both libraries define it.
    """
    if attention_mask is not None:
        raise NotImplementedError("padding masks are not part of this example; batch sequences of equal length")
    outputs = [
        flashinfer.single_prefill_with_kv_cache(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            causal=True,
            sm_scale=scaling,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            logits_soft_cap=softcap,
        )
        for q, k, v in zip(query, key, value)
    ]
    return torch.stack(outputs), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    AttentionInterface.register(NAME, flashinfer_attention)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=4096,
        rope_theta=500000.0,
    )
    dtype = torch.float32 if device == "cpu" else torch.float16  # tensor cores attend in half precision
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 77), device=device)

    logits, generated = {}, {}
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(tokens).logits.double()
            generated[implementation] = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, max_new_tokens=8, do_sample=False
            )
    error = (logits[NAME] - logits["sdpa"]).norm() / logits["sdpa"].norm()
    print(f"logits of 2 x 77 tokens: relative difference from SDPA {error:.1e}")
    same = torch.equal(generated[NAME], generated["sdpa"])
    print(f"8 tokens generated greedily, reading the past from the cache: {'the same' if same else 'different'}")
    if not error < (1e-5 if device == "cpu" else 5e-3):
        sys.exit("the logits differ")


if __name__ == "__main__":
    main()
