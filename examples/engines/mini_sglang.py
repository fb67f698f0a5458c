# SPDX-License-Identifier: Apache-2.0
"""mini-sglang with FlashInfer's attention, norms, RoPE, activations and sampler beside plain PyTorch.

    PYTHONPATH=mini-sglang/python python examples/engines/mini_sglang.py [--layers 4] [--eager] [--json FILE]

A model of the shape of Llama-3-8B, a few layers, random weights: nothing is downloaded. Greedy tokens are compared with
logits that PyTorch computes in fp32 over the same tokens; then tokens per second are measured. README.md beside this
file says how to install.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 1000,
}  # fmt: skip
LENGTHS = (5, 17, 33, 64, 100, 129, 200, 257, 400, 512, 777, 1024, 1500, 2047, 2500, 3000)
SHARED = 100  # prompts longer than this begin alike: later ones find the beginning in the radix cache
NEAR = 0.1  # in log-probability, how near a tie is that bf16 may decide differently: three steps


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A configuration, and a tokenizer that the engine loads and nobody needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2}, unk_token="?"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", bos_token="<s>", eos_token="</s>", chat_template="none"
    ).save_pretrained(folder)


def draw(weights: dict[str, torch.Tensor]) -> None:
    """With dummy weights attention hardly matters. These keep activations of unit size, and scores apart."""
    for name, weight in weights.items():
        generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.encode()))
        if weight.dim() == 1:
            weight.normal_(1.0, 0.1, generator=generator)
        else:
            deviation = 1.0 if "embed" in name else 1.28 / weight.shape[-1] ** 0.5
            weight.normal_(0.0, deviation, generator=generator)


@torch.inference_mode()
def plain_logits(weights: dict[str, torch.Tensor], config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """fp32 `[tokens, vocabulary]` of one sequence, by PyTorch alone."""
    heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    positions = torch.arange(len(tokens), device=tokens.device, dtype=torch.float64)
    frequencies = config["rope_theta"] ** (-torch.arange(0, dim, 2, device=tokens.device, dtype=torch.float64) / dim)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos().float(), angles.sin().float()

    def weight(name: str) -> torch.Tensor:
        return weights[name].float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight(name), config["rms_norm_eps"])

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [heads, tokens, dim]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = functional.embedding(tokens, weight("model.embed_tokens.weight"))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        qkv = norm(x, at + "input_layernorm.weight") @ weight(at + "self_attn.qkv_proj.weight").T
        rows = qkv.view(len(tokens), heads + 2 * kv_heads, dim).transpose(0, 1)
        q, k, v = rows.split((heads, kv_heads, kv_heads))
        attended = functional.scaled_dot_product_attention(
            rotated(q)[None], rotated(k)[None], v[None], is_causal=True, enable_gqa=True
        )[0]
        x = x + attended.transpose(0, 1).flatten(1) @ weight(at + "self_attn.o_proj.weight").T
        gate_up = norm(x, at + "post_attention_layernorm.weight") @ weight(at + "mlp.gate_up_proj.weight").T
        gate, up = gate_up.chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ weight(at + "mlp.down_proj.weight").T
    return norm(x, "model.norm.weight") @ weight("lm_head.weight").T


def compare(llm: Any, config: dict[str, Any], prompts: list[list[int]], outputs: list[list[int]]) -> dict[str, Any]:
    """Of every token that the engine chose, how much likelier PyTorch's choice is by PyTorch's probabilities."""
    weights = llm.engine.model.state_dict()
    equal, gaps = 0, []
    for prompt, output in zip(prompts, outputs):
        tokens = torch.tensor(prompt + output, device=llm.device)
        logits = plain_logits(weights, config, tokens)[len(prompt) - 1 : -1]
        behind = logits.max(dim=-1).values - logits.gather(1, tokens[len(prompt) :, None])[:, 0]
        equal += int((behind == 0).sum())
        gaps += behind.tolist()
    return {"tokens": len(gaps), "equal": equal, "mean": statistics.fmean(gaps), "gap": max(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each row")
    parser.add_argument("--small", action="store_true", help="a small model and short prompts, and nothing is timed")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--json", metavar="FILE", help="also write everything here")
    arguments = parser.parse_args()
    config = {**LLAMA, **(SMALL if arguments.small else {}), "num_hidden_layers": arguments.layers}
    lengths = LENGTHS[:8] if arguments.small else LENGTHS
    draw_tokens = random.Random(1)

    def prompts_of(lengths: tuple[int, ...], shared: int = 0) -> list[list[int]]:
        head = draw_tokens.choices(range(3, config["vocab_size"]), k=shared)
        rows = [draw_tokens.choices(range(3, config["vocab_size"]), k=length) for length in lengths]
        return [head + row[shared:] if shared and len(row) > shared else row for row in rows]

    from minisgl.core import SamplingParams
    from minisgl.llm import LLM

    results: dict[str, Any] = {}

    def note(row: str, **found: Any) -> None:
        results[row] = found
        print(row, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items()), flush=True)

    with tempfile.TemporaryDirectory(prefix="mini-sglang-") as folder:
        write_model(Path(folder), config)
        begin = time.perf_counter()
        llm = LLM(
            folder, attention_backend="fi", use_dummy_weight=True, page_size=1, max_running_req=64,
            num_page_override=4096 if arguments.small else 300000,
            cuda_graph_bs=[] if arguments.eager else [1, 2, 4, 8, 16, 32, 64],
        )  # fmt: skip
    draw(llm.engine.model.state_dict())

    def generate(prompts: list[list[int]], tokens: int, **how: Any) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **how)
        found = [row["token_ids"] for row in llm.generate(prompts, params)]
        return time.perf_counter() - begin, found

    prompts = prompts_of(lengths, SHARED)
    generate(prompts, 1)
    import flashinfer

    note("cold", seconds=time.perf_counter() - begin, version=flashinfer.__version__, file=flashinfer.__file__)
    _, outputs = generate(prompts, 48)
    note("greedy", **compare(llm, config, prompts, outputs))
    _, again = generate(prompts, 48)  # what the radix cache holds is not computed again
    note("greedy, cached", **compare(llm, config, prompts, again))
    _, sampled = generate(prompts, 48, temperature=0.8, top_k=50, top_p=0.9)
    inside = all(0 <= token < config["vocab_size"] for row in sampled for token in row)
    note("top-k top-p", differ=sum(a != b for a, b in zip(sampled, outputs)), inside=inside)
    for name, count, length, tokens in (
        ("prefill 32 x 2048", 32, 2048, 1), ("decode 64 at 2048", 64, 2048, 130), ("decode 1 at 2048", 1, 2048, 130)
    ) if not arguments.small else ():  # fmt: skip
        speeds = []
        rows = prompts_of((length,) * count)
        for _ in range(arguments.repeats + 1):
            if tokens == 1:  # other prompts each time, or the radix cache would answer
                rows, rest = prompts_of((length,) * count), 0.0
            else:
                rest, _ = generate(rows, 2)  # what is not decode
            seconds, _ = generate(rows, tokens)
            speeds.append(count * (length if tokens == 1 else tokens - 2) / (seconds - rest))
        note(name, unit="tokens/s", median=statistics.median(speeds[1:]), best=max(speeds[1:]), worst=min(speeds[1:]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))
    wide = [row for row in ("greedy", "greedy, cached") if not results[row]["gap"] <= NEAR]  # or NaN
    if wide:
        sys.exit(f"tokens differ where there is no tie: {', '.join(wide)}")
    if not inside:
        sys.exit("top-k and top-p drew tokens that the vocabulary has not")


if __name__ == "__main__":
    main()
