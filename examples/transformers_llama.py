# SPDX-License-Identifier: Apache-2.0
"""flashinfer as an attention implementation of Hugging Face Transformers.

`register()` is all that a program needs; models that take attention implementations then run on our kernels, with
grouped heads, windows, soft caps, sinks, padded batches, packed sequences and a cache that grows. `instead_of_sdpa()`
has Transformers' continuous batching call them too.

As a program, this file runs a Llama of the true Llama-3.2-1B shape (two layers, random weights) with it and with
PyTorch's SDPA: prompts in a padded batch, tokens that are generated from them, and the same by continuous batching.

    python examples/transformers_llama.py [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Optional

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import flash_attention_mask

import flashinfer

NAME = "fi"  # Transformers takes any name with "flash" in it for one of its own
WORKSPACE_BYTES = 128 << 20

_wrappers: dict[tuple[type, str, torch.device], Any] = {}


def register(name: str = NAME) -> None:
    """Models may then be loaded with `attn_implementation=name`, or told by `set_attn_implementation(name)`."""
    AttentionInterface.register(name, flashinfer_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)  # what is padding, [batch, kv_len], or None


@contextlib.contextmanager
def instead_of_sdpa() -> Iterator[None]:
    """Continuous batching of Transformers 5.24 refuses every name but its own, and gives "sdpa" all that we need."""
    before = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", flashinfer_attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", before)


def flashinfer_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[torch.Tensor] = None,
    cu_seq_lens_q: Optional[torch.Tensor] = None,
    cu_seq_lens_k: Optional[torch.Tensor] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a batch, without a backward pass.

    Transformers passes `[batch, heads, length, head_dim]` and wants `[batch, length, heads, head_dim]` back. Keys may
    be longer than queries (a cache holds the past); causal is aligned to their end, as both libraries define it.

    Args:
        attention_mask: bool `[batch, kv_len]`, True for tokens and False for padding at either end of a row, or None.
        s_aux: `[heads]`, attention sinks.
        cu_seq_lens_q, cu_seq_lens_k: of a batch of one row, where its sequences begin, and its end. They say all that
            a mask could.
    """
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise NotImplementedError("no dropout and no backward pass; use torch.no_grad()")
    is_packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if attention_mask is not None and not is_packed and attention_mask.shape != (key.shape[0], key.shape[2]):
        raise NotImplementedError(
            f"a mask of shape {list(attention_mask.shape)}; expected [{key.shape[0]}, {key.shape[2]}], which says what "
            "is padding. Static caches have others: use the default one"
        )
    causal = is_packed or bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options = {
        "causal": causal,
        "sm_scale": scaling,
        "window_left": -1 if sliding_window is None else sliding_window - 1,
        "logits_soft_cap": softcap,
        "q_data_type": query.dtype,
    }
    sinks = None if s_aux is None else s_aux.float()
    batch_size, qo_len = query.shape[0], query.shape[2]
    q = query.transpose(1, 2).flatten(0, 1)
    if is_packed or (batch_size == 1 and attention_mask is None):
        out = _over_rows(q, key[0], value[0], cu_seq_lens_q, cu_seq_lens_k, options, sinks)
    else:
        out = _over_padded_rows(q, key, value, attention_mask, qo_len, options, sinks)
    return out.unflatten(0, (batch_size, qo_len)), None


def _over_rows(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens_q: Optional[torch.Tensor],
    cu_seq_lens_k: Optional[torch.Tensor],
    options: dict[str, Any],
    sinks: Optional[torch.Tensor],
) -> torch.Tensor:
    """Keys and values as Transformers has them, heads first: ragged ones in the layout HND."""
    wrapper = _wrapper(flashinfer.BatchPrefillWithRaggedKVCacheWrapper, "HND", q.device)
    offsets = (torch.tensor([0, length], dtype=torch.int32) for length in (len(q), key.shape[1]))
    qo_indptr, kv_indptr = (
        own if given is None else given.int() for given, own in zip((cu_seq_lens_q, cu_seq_lens_k), offsets)
    )
    wrapper.plan(qo_indptr, kv_indptr, q.shape[1], len(key), q.shape[2], value.shape[2], **options)
    return wrapper.run(q, key, value, sinks=sinks)


def _over_padded_rows(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    qo_len: int,
    options: dict[str, Any],
    sinks: Optional[torch.Tensor],
) -> torch.Tensor:
    """`[batch, heads, length, head_dim]` is a cache with pages of one token, and a list of pages says which are no
    padding. No key is copied, and nothing waits for the device."""
    batch_size, num_heads, kv_len, _ = key.shape
    device = q.device
    first = torch.zeros(batch_size, dtype=torch.int64, device=device)  # of each row that is no padding
    lengths = torch.full_like(first, kv_len)
    if mask is not None:
        first = mask.int().argmax(dim=1)
        # Behind a causal query nothing is seen, of which padding at the end is a part.
        lengths = kv_len - first if options["causal"] else mask.sum(dim=1)
    token = torch.arange(kv_len, device=device)
    is_used = (token >= first[:, None]) & (token < (first + lengths)[:, None])
    page = torch.arange(batch_size, device=device)[:, None] * num_heads * kv_len + token
    used_first = torch.argsort(~is_used.flatten(), stable=True)
    wrapper = _wrapper(flashinfer.BatchPrefillWithPagedKVCacheWrapper, "HND", device)
    wrapper.plan(
        torch.arange(batch_size + 1, dtype=torch.int32, device=device) * qo_len,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        page.flatten()[used_first].int(),
        torch.ones(batch_size, dtype=torch.int32, device=device),
        q.shape[1], num_heads, q.shape[2], 1, value.shape[3], **options,
    )  # fmt: skip
    return wrapper.run(q, (_as_pages(key), _as_pages(value)), sinks=sinks)


def _as_pages(rows: torch.Tensor) -> torch.Tensor:
    """`[num_pages, heads, 1, head_dim]` over `[batch, heads, length, head_dim]`: token t of row b is page
    b * heads * length + t. Other pages begin in the heads of a row; no list names them."""
    batch_size, num_heads, length, head_dim = rows.shape
    rows = rows.contiguous()
    num_pages = (batch_size - 1) * num_heads * length + length
    return rows.as_strided((num_pages, num_heads, 1, head_dim), (head_dim, length * head_dim, head_dim, 1))


def _wrapper(kind: type, layout: str, device: torch.device) -> Any:
    key = (kind, layout, device)
    if key not in _wrappers:
        size = WORKSPACE_BYTES if device.type == "cuda" else 1
        _wrappers[key] = kind(torch.empty(size, dtype=torch.uint8, device=device), layout)
    return _wrappers[key]


# ------------------------------------------------------------------------------------------------------ as a program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    dtype = torch.float32 if device == "cpu" else torch.float16  # tensor cores attend in half precision
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    tokens = torch.randint(0, config.vocab_size, (3, 77), device=device)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 5, 40)):  # on the left, as for generation
        mask[row, :padding] = 0

    logits, generated = {}, {}
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(tokens, attention_mask=mask).logits.double()[mask.bool()]
            generated[implementation] = model.generate(
                tokens, attention_mask=mask, pad_token_id=0, max_new_tokens=8, do_sample=False
            )
    error = (logits[NAME] - logits["sdpa"]).norm() / logits["sdpa"].norm()
    print(f"logits of 3 prompts in rows of 77 tokens: relative difference from SDPA {error:.1e}")
    same = torch.equal(generated[NAME], generated["sdpa"])
    print(f"8 tokens generated greedily, reading the past from the cache: {'the same' if same else 'different'}")

    if not error < (1e-5 if device == "cpu" else 5e-3):
        sys.exit("the logits differ")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        return print(f"continuous batching wants Transformers 5.24; this is {transformers.__version__}")
    prompts = [row[row_mask.bool()].tolist() for row, row_mask in zip(tokens, mask)]
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    with instead_of_sdpa():
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
        served = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small)
    answers = [output.generated_tokens for output in served.values()]
    same = answers == [row[-8:].tolist() for row in generated[NAME]]
    print(f"8 tokens of each by continuous batching: {'the same' if same else 'different'}")


if __name__ == "__main__":
    main()
