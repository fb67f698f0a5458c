# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding from the equations, in FP64 on the CPU. Angles are formed and reduced in FP64."""

from __future__ import annotations

import math

import torch


def frequencies(rotary_dim: int, scale: float = 1.0, theta: float = 1e4) -> torch.Tensor:
    """Radians per position of each pair."""
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim) / scale


def llama31_frequencies(
    rotary_dim: int, scale: float = 8.0, theta: float = 5e5, low: float = 1.0, high: float = 4.0, context: int = 8192
) -> torch.Tensor:
    """As published with Llama 3.1: by wavelength, long ones scaled, short ones kept, a blend between."""
    plain = frequencies(rotary_dim, 1.0, theta)
    result = []
    for frequency in plain.tolist():
        wavelength = 2.0 * math.pi / frequency
        if wavelength < context / high:
            result.append(frequency)
        elif wavelength > context / low:
            result.append(frequency / scale)
        else:
            blend = (context / wavelength - low) / (high - low)
            result.append((1.0 - blend) * frequency / scale + blend * frequency)
    return torch.tensor(result, dtype=torch.float64)


def rotate(x: torch.Tensor, angles: torch.Tensor, interleave: bool = False) -> torch.Tensor:
    """x: [num_tokens, num_heads, head_dim]; angles: [num_tokens, rotary_dim / 2] radians."""
    return rotate_by(x, angles.cos(), angles.sin(), interleave)


def rotate_by(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = False) -> torch.Tensor:
    out = x.detach().cpu().double().clone()
    cos, sin = cos.cpu().double()[:, None], sin.cpu().double()[:, None]
    num_pairs = cos.shape[-1]
    pair = torch.arange(num_pairs)
    first = 2 * pair if interleave else pair
    second = 2 * pair + 1 if interleave else pair + num_pairs
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def angles_of(positions: torch.Tensor, radians_per_position: torch.Tensor) -> torch.Tensor:
    return positions.cpu().double()[:, None] * radians_per_position


def ragged_positions(indptr: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    positions = torch.zeros(num_tokens, dtype=torch.int64)
    for request in range(len(offsets)):
        begin, end = int(indptr[request]), int(indptr[request + 1])
        positions[begin:end] = int(offsets[request]) + torch.arange(end - begin)
    return positions
