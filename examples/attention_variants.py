# SPDX-License-Identifier: Apache-2.0
"""Attention variants as functions, one for each example of docs/variants.md.

flashinfer variants check examples.attention_variants:t5 compares one with itself on tensors, on this machine's targets.
"""

from __future__ import annotations

import flashinfer
from flashinfer.variants import clamp, tanh


@flashinfer.variant(bias="f32[num_heads, 2*L + 1]", L="int > 0")
def t5(score, b, h, q, k, x):
    """A learned bias by distance, clipped (T5, relative transformers)."""
    return score + x.bias[h, clamp(q - k, -x.L, x.L) + x.L]


@flashinfer.variant(slopes="f32[num_heads]")
def alibi(score, b, h, q, k, x):
    """pos_encoding_mode="ALIBI", with slopes of one's own."""
    return score + x.slopes[h] * (k - q)


@flashinfer.variant(cap="float > 0")
def soft_cap(score, b, h, q, k, x):
    """logits_soft_cap."""
    return x.cap * tanh(score / x.cap)


@flashinfer.mask()
def causal(b, h, q, k):
    """causal=True."""
    return k <= q


@flashinfer.mask(window=int, num_first=int)
def window_and_first(b, h, q, k, x):
    """A window, and the first tokens of the request (StreamingLLM)."""
    return (k <= q) & ((q - k <= x.window) | (k < x.num_first))


@flashinfer.mask(prefix_len="i32[batch_size]")
def prefix_lm(b, h, q, k, x):
    """A prefix that sees all of itself, and causal behind it (PaliGemma, T5 in one stack)."""
    return (k <= q) | (k < x.prefix_len[b])


@flashinfer.mask(document="i32[batch_size, longest]")
def documents(b, h, q, k, x):
    """Several documents in one sequence, which do not see each other."""
    return (k <= q) & (x.document[b, q] == x.document[b, k])


@flashinfer.mask(bounds=lambda b, q, x: (x.start[b, q], q), start="i32[batch_size, longest]")
def documents_from(b, h, q, k, x):
    """The same by where the document of each token starts: keys before it are not even loaded."""
    return k <= q


@flashinfer.mask(num_seen="i32[batch_size]", ancestors="i32[batch_size, longest]")
def tree(b, h, q, k, x):
    """Drafts of a tree: each sees what was there before, and of the drafts those whose bit its word has."""
    draft = k - x.num_seen[b]
    return (draft < 0) | ((x.ancestors[b, q - x.num_seen[b]] >> draft & 1) == 1)


@flashinfer.mask(chunk="int > 0")
def chunked(b, h, q, k, x):
    """Chunks of the sequence that do not see each other (Llama 4)."""
    return (k <= q) & (k >= q // x.chunk * x.chunk)


@flashinfer.variant(scale="f32[num_heads]")
def head_scale(score, b, h, q, k, x):
    """A temperature for each head."""
    return score * x.scale[h]


@flashinfer.variant(bias="f32[batch_size, longest]")
def key_bias(score, b, h, q, k, x):
    """A logit to add for each key, of what a retriever thinks of its document, say."""
    return score + x.bias[b, k]


@flashinfer.mask(is_local="bool[num_heads]", window=int)
def some_heads_local(b, h, q, k, x):
    """A window on some heads alone."""
    return (k <= q) & (~x.is_local[h] | (q - k <= x.window))
