# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm from the equations, in FP64 on the CPU."""

from __future__ import annotations

import torch


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, gemma: bool = False) -> torch.Tensor:
    x, weight = x.cpu().double(), weight.cpu().double()
    scale = 1.0 / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return x * scale * (weight + 1.0 if gemma else weight)


def gated_rmsnorm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    gate = gate.cpu().double()
    return rmsnorm(x, weight, eps) * gate / (1.0 + torch.exp(-gate))


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight, bias = x.cpu().double(), weight.cpu().double(), bias.cpu().double()
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / torch.sqrt((centered * centered).mean(dim=-1, keepdim=True) + eps) * weight + bias
