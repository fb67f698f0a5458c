"""torch.compile(fullgraph=True) over the functional operators: no graph break, and the same values as eager calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashinfer

N, HIDDEN = 6, 64


def norms(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones_like(x[0])
    y = flashinfer.rmsnorm(x * 2, weight)
    y = flashinfer.gemma_rmsnorm(y + 1, weight, out=y)  # in place
    return flashinfer.layernorm(y, weight.float(), weight.float())


def add_norms(x: torch.Tensor) -> torch.Tensor:
    weight, residual = torch.ones_like(x[0]), x + 1
    y = x * 3
    flashinfer.fused_add_rmsnorm(y, residual, weight)
    flashinfer.gemma_fused_add_rmsnorm(y, residual, weight)
    return y + residual


def activations(x: torch.Tensor) -> torch.Tensor:
    y = flashinfer.silu_and_mul(x) + flashinfer.gelu_and_mul(x)
    return y + flashinfer.gelu_tanh_and_mul(x, out=torch.empty_like(y))


def samplers(x: torch.Tensor) -> list[torch.Tensor]:
    probs, state = torch.softmax(x.float(), dim=-1), {"seed": 3, "offset": 0}
    per_row = torch.full((x.shape[0],), 0.7, device=x.device)
    tokens, valid = flashinfer.top_k_top_p_sampling_from_probs(probs, 5, per_row, return_valid=True, **state)
    return [
        flashinfer.sampling.softmax(x, temperature=per_row),
        flashinfer.top_p_renorm_probs(probs, 0.5),
        flashinfer.top_k_mask_logits(x, 7),
        flashinfer.sampling_from_logits(x, **state),
        flashinfer.min_p_sampling_from_probs(probs, 0.1, **state),
        flashinfer.top_k_top_p_sampling_from_logits(x, 5, 0.9, **state),
        tokens,
        valid,
    ]


@pytest.mark.parametrize("function", [norms, add_norms, activations, samplers], ids=lambda function: function.__name__)
def test_fullgraph(device: torch.device, function: Callable[[torch.Tensor], Any]) -> None:
    x = torch.randn(N, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value in (x, x[:3]):  # the second call recompiles for another number of rows
        torch.testing.assert_close(compiled(value.clone()), function(value.clone()), rtol=0, atol=0)
