# SPDX-License-Identifier: Apache-2.0
"""The causal convolution of each channel from the equation, in FP64 on the CPU."""

from __future__ import annotations

from typing import Optional

import torch


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    history: Optional[torch.Tensor],
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: x `[tokens, channels]`, history `[width - 1, channels]` before it or None for zeros. The outputs,
    and all inputs, history included."""
    x, weight = x.cpu().double(), weight.cpu().double()
    width = weight.shape[1]
    before = torch.zeros(width - 1, x.shape[1], dtype=torch.float64) if history is None else history.cpu().double()
    inputs = torch.cat([before, x])
    output = torch.zeros_like(x) if bias is None else bias.cpu().double().expand_as(x).clone()
    for j in range(width):
        output += weight[:, j] * inputs[j : j + len(x)]
    return (output / (1.0 + torch.exp(-output)) if silu else output), inputs
