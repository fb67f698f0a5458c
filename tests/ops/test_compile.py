# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) over the public functions: no graph break, and the same values as eager calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashinfer
from tests.public_calls import CALLS, Inputs, tensors

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
    chain = probs[:, None].repeat(1, 3, 1)
    drafts = torch.arange(2 * x.shape[0], device=x.device).view(-1, 2)
    counts = torch.ones(x.shape[0], dtype=torch.int32, device=x.device)
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
        *flashinfer.chain_speculative_sampling(chain[:, :2], drafts, chain, counts, **state),
    ]


def page(x: torch.Tensor) -> list[torch.Tensor]:
    tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=x.device)  # noqa: E731
    rows, num_rows = x.view(-1, 2, 32), x.shape[0]
    kv_indptr, kv_indices, last_page_len = tensor([0, 4]), tensor([2, 0, 1, 3]), tensor([4])
    seq_lens = flashinfer.get_seq_lens(kv_indptr, last_page_len, 4)
    append_indptr = torch.zeros_like(kv_indptr)
    append_indptr[1] = num_rows
    slots = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, num_rows)
    cache, fp8 = torch.zeros(4, 2, 4, 2, 32, device=x.device), torch.zeros(4, 4, 2, 32, device=x.device)
    cache, pair = cache.to(x.dtype), (fp8.to(torch.float8_e4m3fn), fp8.to(torch.float8_e4m3fn))
    table = (kv_indices, kv_indptr, last_page_len)
    flashinfer.append_paged_kv_cache(rows, rows + 1, *slots, cache, *table)
    flashinfer.append_paged_kv_cache(rows, rows, *slots, pair, *table, k_scale=0.5)
    latent = torch.zeros(4, 4, 64, device=x.device, dtype=x.dtype)
    flashinfer.append_paged_mla_kv_cache(x[:, :48], x[:, 48:], *slots, latent[..., :48], latent[..., 48:], *table)
    return [cache, pair[0].float(), latent]


def ropes(x: torch.Tensor) -> list[torch.Tensor]:
    q, k = x.view(-1, 2, 32) * 2, x.view(-1, 2, 32)[:, :1] + 1
    positions = torch.arange(x.shape[0], device=x.device)
    q, k = flashinfer.apply_rope_pos_ids(q, k, positions, 16, True)
    flashinfer.apply_llama31_rope_pos_ids_inplace(q, k, positions)
    indptr = torch.tensor([0, 2], device=x.device)
    q, k = flashinfer.apply_rope(q, k, indptr, positions[:1])
    table = positions[:, None] * torch.linspace(-0.1, 0.1, 32, device=x.device)
    return [*flashinfer.apply_rope_with_cos_sin_cache(positions, q.flatten(1), k.flatten(1), 32, table)]


def fused(x: torch.Tensor) -> list[torch.Tensor]:
    qkv = x.repeat(1, 2).view(-1, 4, 32) * 1
    positions = torch.arange(x.shape[0], device=x.device)
    weight = torch.ones_like(qkv[0, 0])
    flashinfer.fused_qk_rmsnorm_rope(qkv, weight, weight, positions, 2, 1)
    cache = torch.zeros(2, 2, 4, 1, 32, dtype=x.dtype, device=x.device)
    index = torch.arange(2, device=x.device)
    q = flashinfer.rope_append_paged_kv_cache(
        qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], positions * 0, positions, cache, index, index * 2
    )
    out = torch.zeros(x.shape, device=x.device).to(torch.float8_e4m3fn)
    half = torch.zeros(x.shape[0], HIDDEN // 2, device=x.device).to(torch.float8_e4m3fn)
    scale, residual, weight = torch.full((1,), 0.5, device=x.device), x + 1, torch.ones_like(x[0])
    flashinfer.rmsnorm_quant(out, x, weight, scale)
    first = out.float()
    flashinfer.fused_add_rmsnorm_quant(out, x, residual, weight, 0.25)
    flashinfer.silu_and_mul_quant(half, x, scale)
    return [q, cache, first, out.float(), residual, half.float()]


def packing(x: torch.Tensor) -> list[torch.Tensor]:
    bits = x.flatten() > 0
    indptr = torch.tensor([0, 3, 60], device=x.device)
    from flashinfer.quantization import segment_packbits_padded

    return [flashinfer.packbits(bits), *segment_packbits_padded(bits, indptr, "little")]


FUNCTIONS = [norms, add_norms, activations, samplers, page, ropes, fused, packing]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_fullgraph(device: torch.device, function: Callable[[torch.Tensor], Any]) -> None:
    x = torch.randn(N, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value in (x, x[:3]):  # the second call recompiles for another number of rows
        torch.testing.assert_close(compiled(value.clone()), function(value.clone()), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- public names that are wrapped

PLANNING = {  # not part of a model's graph
    "fast_decode_plan",
    "page.block_sparse_indices_to_vector_sparse_offsets",
    "sparse.convert_bsr_mask_layout",
    "utils.get_alibi_slopes",
    "utils.get_indptr",
}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in PLANNING])
def test_a_public_name_replaced_by_its_compiled_self(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Wherever the library has the name: no operator of a graph comes back to it, and values are those of eager calls.
    Of a wrapper it is run() and forward()."""
    torch._dynamo.reset()
    inputs, attribute = Inputs(device), name.rpartition(".")[2]
    expected = tensors(CALLS[name](inputs))
    module = getattr(flashinfer, name.partition(".")[0]) if "." in name else flashinfer
    public = getattr(module, attribute)
    compiled = []

    def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function)
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    if inspect.isclass(public):
        for method in ("run", "forward"):
            if hasattr(public, method):
                monkeypatch.setattr(public, method, compile_once(getattr(public, method)))
    else:
        replacement = compile_once(public)
        for other in [module for key, module in sys.modules.items() if key.partition(".")[0] == "flashinfer"]:
            if vars(other).get(attribute) is public:
                monkeypatch.setattr(other, attribute, replacement)
    found = tensors(CALLS[name](inputs))
    assert compiled and len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
