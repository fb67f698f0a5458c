# SPDX-License-Identifier: Apache-2.0
"""Products of segments of rows, from the equations, in FP64."""

from __future__ import annotations

import itertools
from typing import Optional

import torch

BLOCK = 128  # of the depth, and of columns, that has a scale


def segments(
    x: torch.Tensor, weights: torch.Tensor, indptr: list[int], indices: Optional[list[int]], untouched: torch.Tensor
) -> torch.Tensor:
    """weights: `[num_weights, d_out, d_in]`. untouched: what rows of no segment hold."""
    result = untouched.cpu().double().clone()
    for i, (begin, end) in enumerate(itertools.pairwise(indptr)):
        weight = weights[i if indices is None else indices[i]].cpu().double()
        result[begin:end] = x[begin:end].cpu().double() @ weight.T
    return result


def dequantized(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: `[..., rows, depth]` in 8 bits; scale: `[..., rows or blocks of them, blocks of the depth]`."""
    x, scale = x.double(), scale.double()
    if scale.shape[-2] != x.shape[-2] or x.shape[-2] == 1:
        scale = scale.repeat_interleave(BLOCK, dim=-2)
    scale = scale.repeat_interleave(BLOCK, dim=-1)
    return x * scale[..., : x.shape[-2], : x.shape[-1]]


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 1 x 128 elements: what they are in 8 bits, as FP64, and their scales `[rows, blocks]`."""
    blocks = x.cpu().double().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1) / 448.0
    values = (blocks / scale.clamp(min=1e-30)[..., None]).float().to(torch.float8_e4m3fn).double()
    return values.flatten(-2), scale
