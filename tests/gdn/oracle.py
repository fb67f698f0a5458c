# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464) token by token, in FP64 on the CPU.

With the state S of a head as `[V, K]`, decay α = exp(g) and write strength β:

    S ← α S
    S ← S + β (v − S k) kᵀ
    o = scale · S q

Of q, k and v, those with fewer heads are shared by runs of consecutive heads of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch


class Rule(NamedTuple):
    output: torch.Tensor  # [tokens, heads, V]
    states: torch.Tensor  # [tokens + 1, heads, V, K]: before the first token, and after each; or the last alone

    @property
    def final_state(self) -> torch.Tensor:
        return self.states[-1]


def fp64(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().double()


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    x = fp64(x)
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + eps)


def log_decay(a_log: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """g = −exp(a_log) · softplus(a + dt_bias), without the overflow of exp."""
    x = fp64(a) + fp64(dt_bias)
    return -fp64(a_log).exp() * torch.logaddexp(x, torch.zeros_like(x))


def write_strength(b: torch.Tensor) -> torch.Tensor:
    """β = sigmoid(b)."""
    return torch.sigmoid(fp64(b))


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: Optional[torch.Tensor] = None,
    *,
    scale: Optional[float] = None,
    use_qk_l2norm: bool = False,
    keep_states: bool = False,
) -> Rule:
    """One sequence. q, k `[tokens, heads, K]`, v `[tokens, heads, V]`, g (a logarithm) and beta `[tokens, heads]`,
    state `[heads, V, K]`, zero when None; heads being the most that any of q, k and v has."""
    q, k = (l2_normalize(x) if use_qk_l2norm else fp64(x) for x in (q, k))
    v, alpha, beta = fp64(v), fp64(g).exp(), fp64(beta)
    num_heads = max(x.shape[1] for x in (q, k, v))
    q, k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = torch.zeros(num_heads, v.shape[-1], k.shape[-1], dtype=torch.float64) if state is None else fp64(state).clone()
    output = torch.empty(v.shape, dtype=torch.float64)
    states = [s.clone()] if keep_states else []
    for t in range(len(q)):
        s *= alpha[t, :, None, None]
        error = v[t] - torch.bmm(s, k[t, :, :, None]).squeeze(-1)
        s += (beta[t, :, None] * error)[:, :, None] * k[t, :, None, :]
        output[t] = scale * torch.bmm(s, q[t, :, :, None]).squeeze(-1)
        if keep_states:
            states.append(s.clone())
    return Rule(output, torch.stack(states) if keep_states else s[None])


def packed_sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: Sequence[int],
    states: Optional[torch.Tensor] = None,
    *,
    scale: Optional[float] = None,
    use_qk_l2norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences one after the other, from cu_seqlens[i] to cu_seqlens[i + 1]: outputs `[tokens, heads, V]` and final
    states `[sequences, heads, V, K]`. Tokens before the first and after the last are NaN in the output."""
    num_heads = max(x.shape[1] for x in (q, k, v))
    output = torch.full((len(q), num_heads, v.shape[-1]), torch.nan, dtype=torch.float64)
    finals = torch.empty(len(cu_seqlens) - 1, num_heads, v.shape[-1], k.shape[-1], dtype=torch.float64)
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        rows = slice(int(begin), int(end))
        rule = gated_delta_rule(
            q[rows], k[rows], v[rows], g[rows], beta[rows], None if states is None else states[i],
            scale=scale, use_qk_l2norm=use_qk_l2norm,
        )  # fmt: skip
        output[rows], finals[i] = rule.output, rule.final_state
    return output, finals
