# SPDX-License-Identifier: Apache-2.0
"""Attention in FP64, from the equations. Knows nothing of tiles, splits or kernels.

One request at a time: `attention` takes the queries, keys and values of one sequence. `paged_request` collects the keys
and values of one request from a paged cache, page by page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of the ALiBi paper: a geometric sequence for powers of two, then every other slope of the next one."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float64)


def rotate(x: Tensor, positions: Tensor, rope_scale: float, rope_theta: float) -> Tensor:
    """Rotary embedding, Llama style, of [tokens, heads, head_dim]: element i turns with element i + head_dim / 2."""
    half = x.shape[-1] // 2
    frequencies = rope_theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half) / rope_scale
    angles = positions.double()[:, None, None] * frequencies
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], dim=-1)


def attention(
    q: Tensor,  # [qo_len, num_qo_heads, head_dim_qk]
    k: Tensor,  # [kv_len, num_kv_heads, head_dim_qk]
    v: Tensor,  # [kv_len, num_kv_heads, head_dim_vo]
    *,
    causal: bool = False,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    pos_encoding_mode: str = "NONE",
    sm_scale: float | None = None,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    custom_mask: Tensor | None = None,  # [qo_len, kv_len], True = visible
    sinks: Tensor | None = None,  # [num_qo_heads]: a logit of each head, of a key whose value is zero
    variant: Callable[..., Tensor] | None = None,  # (score, request, head, positions of query and key) -> score
    mask: Callable[..., Tensor] | None = None,  # (request, head, positions of query and key) -> visible
    request_idx: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns out [qo_len, num_qo_heads, head_dim_vo] and lse [qo_len, num_qo_heads] (base 2), both FP64.

    Query i stands at position kv_len - qo_len + i. A query that sees no key gets zeros and an LSE of -inf, or that of
    the sink. Computed on the device of the queries, where FP64 may be fast; returned on the CPU.
    """
    qo_len, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    device = q.device
    q, k, v = (x.to(device).to(torch.float32).double() for x in (q, k, v))
    q, k, v = q * q_scale, k * k_scale, v * v_scale
    q_positions = torch.arange(qo_len, device=device) + kv_len - qo_len
    kv_positions = torch.arange(kv_len, device=device)
    if pos_encoding_mode == "ROPE_LLAMA":
        scale, theta = rope_scale or 1.0, rope_theta or 1e4
        q, k = rotate(q, q_positions, scale, theta), rotate(k, kv_positions, scale, theta)
    k, v = (x.repeat_interleave(num_qo_heads // num_kv_heads, dim=1) for x in (k, v))

    logits = torch.einsum("ihd,jhd->hij", q, k) * (head_dim**-0.5 if sm_scale is None else sm_scale)
    distance = kv_positions[None, :] - q_positions[:, None]
    if pos_encoding_mode == "ALIBI":
        logits = logits + alibi_slopes(num_qo_heads).to(device)[:, None, None] * distance
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)

    place = (request_idx, torch.arange(num_qo_heads, device=device)[:, None, None], q_positions[:, None], kv_positions)
    if variant is not None:
        logits = variant(logits, *place).double().expand(logits.shape)
    visible = torch.ones(num_qo_heads, qo_len, kv_len, dtype=torch.bool, device=device)
    if mask is not None:
        visible &= mask(*place)
    if custom_mask is not None:
        visible &= custom_mask.to(device).bool().reshape(qo_len, kv_len)
    elif causal:
        visible &= distance <= 0
    if window_left >= 0:
        visible &= distance >= -window_left
    logits = logits.masked_fill(~visible, -math.inf)

    lse = torch.logsumexp(logits, dim=-1) if kv_len else logits.new_full((num_qo_heads, qo_len), -math.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(device).double()[:, None])
    weights = torch.where(visible, torch.exp(logits - torch.where(lse == -math.inf, 0.0, lse)[..., None]), 0.0)
    return torch.einsum("hij,jhd->ihd", weights, v).cpu(), (lse.T * LOG2_E).cpu()


def paged_request(
    cache: Tensor | tuple[Tensor, Tensor],
    layout: str,
    pages: Sequence[int],
    last_page_len: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one request, each [kv_len, num_kv_heads, head_dim], read page by page."""
    halves = (cache[:, 0], cache[:, 1]) if isinstance(cache, Tensor) else cache
    gathered = []
    for half in halves:
        if half.dtype.itemsize == 1:
            half = half.to(torch.float32)
        half = half if layout == "NHD" else half.transpose(1, 2)
        rows = [half[page] if i + 1 < len(pages) else half[page, :last_page_len] for i, page in enumerate(pages)]
        gathered.append(torch.cat(rows) if rows else half.new_zeros(0, *half.shape[2:]))
    return gathered[0], gathered[1]
