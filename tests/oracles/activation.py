# SPDX-License-Identifier: Apache-2.0
"""Gated activations from the equations, in FP64 on the CPU."""

from __future__ import annotations

import math

import torch


def act_and_mul(gate: str, x: torch.Tensor) -> torch.Tensor:
    x = x.cpu().double()
    hidden_size = x.shape[-1] // 2
    a, b = x[..., :hidden_size], x[..., hidden_size:]
    if gate == "silu":
        activated = a / (1.0 + torch.exp(-a))
    elif gate == "gelu":
        activated = 0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0)))
    else:
        activated = 0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)))
    return activated * b
