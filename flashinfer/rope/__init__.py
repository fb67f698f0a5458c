# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys, alone or fused with its neighbours.

Pair `i` of a head, at position `p`, turns by `p * rope_theta ** (-2 i / rotary_dim) / rope_scale`. The two elements
of a pair are `(x[i], x[i + rotary_dim / 2])`, or `(x[2 i], x[2 i + 1])` with `interleave=True`; elements from
`rotary_dim` on pass through. Angles are reduced exactly, so they are as good at position 1,000,000 as at 0. The
rotation is computed in fp32.
"""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer.host import checks
from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.quant_scale import Scale
from flashinfer.rope import append, launch
from flashinfer.rope.rotation import Rotation

__all__ = [
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "rope_append_paged_kv_cache",
    "fused_qk_rmsnorm_rope",
]


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys of a ragged batch.

    Row `i` of request `b` is at position `offsets[b] + i - indptr[b]`; rows of no request, past `indptr[-1]` or before
    `indptr[0]`, are at position 0.

    Args:
        q: `[nnz, num_qo_heads, head_dim]`, fp16, bf16 or fp32, any strides with a dense last axis. head_dim is a
            multiple of 4, at most 512.
        k: `[nnz, num_kv_heads, head_dim]`, dtype of q.
        indptr: `[batch_size + 1]`, int32 or int64; where each request's rows start. Ascending, nnz at most.
        offsets: `[batch_size]`, dtype of indptr; position of each request's first row.
        rotary_dim: elements of a head that turn, a multiple of 4, at most 256; None: all.
        interleave: which elements form a pair (module docstring).
        rope_scale: divides the frequencies.
        rope_theta: base of the frequencies.

    Returns:
        `(q_rope, k_rope)`, new tensors.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride, number or type does not fit; elements of what is turned
            in place overlap.
        IndexError: offsets end past q, or a position lies outside of a table, where the host sees values
            (docs/safety.md).
        UnsupportedConfig: no kernel for this dtype or head dimension.
    """
    rotation = Rotation(rotary_dim, interleave, None, indptr, offsets, None, rope_scale, rope_theta)
    return launch.rope("apply_rope", q, k, None, None, rotation)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope`, in place."""
    rotation = Rotation(rotary_dim, interleave, None, indptr, offsets, None, rope_scale, rope_theta)
    launch.rope("apply_rope_inplace", q, k, q, k, rotation)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` with the position of every row given: pos_ids is `[nnz]`, int32 or int64."""
    rotation = Rotation(rotary_dim, interleave, pos_ids, None, None, None, rope_scale, rope_theta)
    return launch.rope("apply_rope_pos_ids", q, k, None, None, rotation)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids`, in place."""
    rotation = Rotation(rotary_dim, interleave, pos_ids, None, None, None, rope_scale, rope_theta)
    launch.rope("apply_rope_pos_ids_inplace", q, k, q, k, rotation)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` with the frequencies of Llama 3.1.

    Frequencies with fewer than low_freq_factor turns in the old context are divided by rope_scale, those with more than
    high_freq_factor turns are kept, and between the two the division fades in linearly.
    """
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rotation = Rotation(rotary_dim, interleave, None, indptr, offsets, None, *frequencies)
    return launch.rope("apply_llama31_rope", q, k, None, None, rotation)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope`, in place."""
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rotation = Rotation(rotary_dim, interleave, None, indptr, offsets, None, *frequencies)
    launch.rope("apply_llama31_rope_inplace", q, k, q, k, rotation)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_llama31_rope` with the position of every row given: pos_ids is `[nnz]`, int32 or int64."""
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rotation = Rotation(rotary_dim, interleave, pos_ids, None, None, None, *frequencies)
    return launch.rope("apply_llama31_rope_pos_ids", q, k, None, None, rotation)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids`, in place."""
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rotation = Rotation(rotary_dim, interleave, pos_ids, None, None, None, *frequencies)
    launch.rope("apply_llama31_rope_pos_ids_inplace", q, k, q, k, rotation)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by angles from a table, as vLLM and SGLang keep it.

    Args:
        positions: `[nnz]`, int32 or int64; rows of the table. One outside of it is an IndexError on the CPU, and counts
            as 0 on a GPU.
        query: `[nnz, num_qo_heads * head_size]` or `[nnz, num_qo_heads, head_size]`, fp16, bf16 or fp32.
        key: likewise with num_kv_heads; dtype of query.
        head_size: dimension of a head.
        cos_sin_cache: `[max_position, rotary_dim]`, fp32, fp16 or bf16: the cos of all rotary_dim / 2 pairs, then
            their sin.
        is_neox: True: pairs are rotary_dim / 2 apart; False: interleaved.

    Returns:
        `(query_out, key_out)`, new tensors of the shapes of query and key.

    Raises: as `apply_rope`.
    """
    op = "apply_rope_with_cos_sin_cache"
    rotation = _by_table(op, positions, head_size, cos_sin_cache, is_neox)
    return launch.rope(op, query, key, None, None, rotation, head_size)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache`, in place."""
    op = "apply_rope_with_cos_sin_cache_inplace"
    rotation = _by_table(op, positions, head_size, cos_sin_cache, is_neox)
    launch.rope(op, query, key, query, key, rotation, head_size)


def _by_table(op: str, positions: torch.Tensor, head_size: int, cos_sin_cache: torch.Tensor, is_neox: bool) -> Rotation:
    if cos_sin_cache is None or head_size is None:  # which further down mean frequencies, and heads on an axis
        raise TypeError(f"{op}: head_size is {head_size}, cos_sin_cache {type(cos_sin_cache).__name__}; expected both")
    return Rotation(None, not checks.boolean(op, "is_neox", is_neox), positions, None, None, cos_sin_cache)


def rope_append_paged_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: Optional[torch.Tensor] = None,
    kv_layout: str = "NHD",
    *,
    q_out: Optional[torch.Tensor] = None,
    pos_ids: Optional[torch.Tensor] = None,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 0,
    cos_sin_cache: Optional[torch.Tensor] = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """Turn queries and keys, and append keys and values to a paged cache, in one pass.

    The same as `apply_rope_pos_ids` followed by `append_paged_kv_cache`, except that keys go from fp32 to the cache's
    type in one rounding, and that k itself keeps its unturned values.

    Args:
        q: `[nnz, num_qo_heads, head_dim]`, fp16, bf16 or fp32.
        k, v: `[nnz, num_kv_heads, head_dim]`, dtype of q. All three may be slices of one packed tensor.
        batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len: as in `flashinfer.append_paged_kv_cache`,
            with its treatment of padding, whose queries are turned all the same.
        paged_kv_cache, kv_layout, k_scale, v_scale: as there; the cache has the dtype of q, or is fp8.
        q_out: where turned queries go, shape and dtype of q; may be q itself. Allocated when None.
        pos_ids: `[nnz]`, int32 or int64; positions to turn by, where they are not those in the cache.
        rotary_dim, interleave, rope_scale, rope_theta: as in `apply_rope`.
        low_freq_factor, high_freq_factor, old_context_len: as in `apply_llama31_rope`; old_context_len 0: plain
            frequencies.
        cos_sin_cache: `[max_position, rotary_dim]`, as in `apply_rope_with_cos_sin_cache`; replaces the frequencies.
            Its width is rotary_dim, if both are given.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Returns:
        `q_out`.

    Raises: as `apply_rope` and `flashinfer.append_paged_kv_cache`.
    """
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    turned_by = positions if pos_ids is None else pos_ids
    return append.append(
        (q, k, v, q_out),
        (batch_indices, positions, kv_indices, kv_indptr),
        paged_kv_cache,
        kv_layout,
        k_scale,
        v_scale,
        Rotation(rotary_dim, interleave, turned_by, None, None, cos_sin_cache, *frequencies),
        enable_pdl,
    )


def fused_qk_rmsnorm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    pos_ids: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 0,
    cos_sin_cache: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> None:
    """RMSNorm over each head of queries and keys (Qwen3, Gemma 3), then their rotation, in place on a packed qkv.

    Args:
        qkv: `[nnz, (num_qo_heads + num_kv_heads + …) * head_dim]` or `[nnz, num_qo_heads + num_kv_heads + …,
            head_dim]`, fp16, bf16 or fp32: query heads, then key heads; what follows (values) is not touched.
        q_weight, k_weight: `[head_dim]`, dtype of qkv.
        pos_ids: `[nnz]`, int32 or int64.
        eps: added to the mean of squares; not negative.
        weight_bias: added to the weights; 1 for Gemma.
        rotary_dim, interleave, rope_scale, rope_theta: as in `apply_rope`.
        low_freq_factor, high_freq_factor, old_context_len: as in `apply_llama31_rope`; old_context_len 0: plain
            frequencies.
        cos_sin_cache: `[max_position, rotary_dim]`, as in `apply_rope_with_cos_sin_cache`; replaces the frequencies.
            Its width is rotary_dim, if both are given.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Raises: as `apply_rope`.
    """
    frequencies = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rotation = Rotation(rotary_dim, interleave, pos_ids, None, None, cos_sin_cache, *frequencies)
    launch.qk_norm(qkv, (q_weight, k_weight), (num_qo_heads, num_kv_heads), eps, weight_bias, rotation, enable_pdl)
