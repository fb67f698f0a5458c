# SPDX-License-Identifier: Apache-2.0
"""Calls of what works on rows: norms, activations, packing, merging, caches, rope, matrix products, sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashinfer
from flashinfer import cascade, causal_conv1d, gdn_decode, quantization, sampling
from tests.public_calls.inputs import CALLS, DIM, HEADS, KV_HEADS, PAGE, TOKENS, Inputs, call

# ------------------------------------------------------------------------------------------------- norms, activations

for _name in ("rmsnorm", "gemma_rmsnorm"):
    CALLS[_name] = lambda i, _name=_name: [
        getattr(flashinfer, _name)(i.x, i.weight),
        getattr(flashinfer, _name)(i.x, i.weight, out=torch.empty_like(i.x)),
    ]
CALLS["gated_rmsnorm"] = lambda i: [
    flashinfer.gated_rmsnorm(i.x, i.residual, i.weight),
    flashinfer.gated_rmsnorm(i.x, i.residual, i.weight, out=torch.empty_like(i.x)),
]
CALLS["gated_rmsnorm_quant"] = lambda i: flashinfer.gated_rmsnorm_quant(
    torch.empty_like(i.fp8), i.x, i.residual, i.weight, i.scale
)
for _name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
    CALLS[_name] = lambda i, _name=_name: [
        getattr(flashinfer, _name)(i.gated),
        getattr(flashinfer, _name)(i.gated, out=torch.empty_like(i.x)),
    ]
for _name in ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm"):

    @call(_name)
    def _fused_add(i: Inputs, _name: str = _name) -> Any:
        x, residual = i.x.clone(), i.residual.clone()
        getattr(flashinfer, _name)(x, residual, i.weight)
        return x, residual


CALLS["layernorm"] = lambda i: flashinfer.layernorm(i.x, i.weight.float(), i.weight.float())


@call("rmsnorm_quant")
def _rmsnorm_quant(i: Inputs) -> Any:
    return [flashinfer.rmsnorm_quant(i.fp8.clone(), i.x, i.weight, scale) for scale in (0.5, i.scale)]


@call("fused_add_rmsnorm_quant")
def _fused_add_rmsnorm_quant(i: Inputs) -> Any:
    out, residual = i.fp8.clone(), i.residual.clone()
    flashinfer.fused_add_rmsnorm_quant(out, i.x, residual, i.weight, 0.5)
    return out, residual


@call("silu_and_mul_quant")
def _silu_and_mul_quant(i: Inputs) -> Any:
    return [flashinfer.silu_and_mul_quant(i.fp8.clone(), i.gated, scale) for scale in (0.5, i.scale)]


# -------------------------------------------------------------------------------------------------------------- packing

CALLS["packbits"] = lambda i: [flashinfer.packbits(i.bits), flashinfer.packbits(i.bits.int(), "little")]
CALLS["quantization.segment_packbits_padded"] = lambda i: quantization.segment_packbits_padded(i.bits, i.segments)


@call("segment_packbits")
def _segment_packbits(i: Inputs) -> Any:
    packed, packed_indptr = flashinfer.segment_packbits(i.bits, i.segments)
    return packed[: int(packed_indptr[-1])], packed_indptr  # compiled, it is as long as it can get


# -------------------------------------------------------------------------------------------------------------- merging

CALLS["merge_state"] = lambda i: flashinfer.merge_state(i.q, i.lse, i.q.flip(0), i.lse_other)
CALLS["merge_states"] = lambda i: flashinfer.merge_states(
    torch.stack([i.q, i.q.flip(0)], 1), torch.stack([i.lse, i.lse_other], 1)
)
CALLS["cascade.variable_length_merge_states"] = lambda i: cascade.variable_length_merge_states(i.q, i.lse, i.qo_indptr)


@call("merge_state_in_place")
def _merge_state_in_place(i: Inputs) -> Any:
    results = []
    for mask in (None, i.lse[:, 0] > 0):
        v, s = i.q.clone(), i.lse.clone()
        flashinfer.merge_state_in_place(v, s, i.q.flip(0), i.lse_other, mask)
        results += [v, s]
    return results


# ----------------------------------------------------------------------------------------------------------------- page


@call("append_paged_kv_cache")
def _append_paged_kv_cache(i: Inputs) -> Any:
    cache, pair = i.cache.clone(), tuple(i.cache[:, half].to(torch.float8_e4m3fn) for half in (0, 1))
    place = (i.batch_indices, i.slots)
    flashinfer.append_paged_kv_cache(i.k, i.v, *place, cache, i.pages, i.kv_indptr, i.last_page_len)
    flashinfer.append_paged_kv_cache(i.k, i.v, *place, pair, i.pages, i.kv_indptr, None, k_scale=0.5, v_scale=i.scale)
    return cache, pair


@call("append_paged_mla_kv_cache")
def _append_paged_mla_kv_cache(i: Inputs) -> Any:
    latent, rows = i.latent.clone(), (i.x, i.gated)
    place = (i.batch_indices, i.slots)
    flashinfer.append_paged_mla_kv_cache(*rows, *place, latent[..., :32], latent[..., 32:], i.pages, i.kv_indptr, None)
    return latent


CALLS["get_batch_indices_positions"] = lambda i: flashinfer.get_batch_indices_positions(
    i.qo_indptr, flashinfer.get_seq_lens(i.kv_indptr, i.last_page_len, PAGE), TOKENS
)
CALLS["get_seq_lens"] = lambda i: flashinfer.get_seq_lens(i.kv_indptr, i.last_page_len, PAGE)


@call("causal_conv1d.causal_conv1d_fn")
def _causal_conv1d_fn(i: Inputs) -> Any:
    states = i.residual[:, :, None].expand(-1, -1, 3).contiguous()
    arguments = i.x.T, i.gated[0].repeat(2).view(32, 4), i.weight, states, i.qo_indptr, i.pages[:2]
    return causal_conv1d.causal_conv1d_fn(*arguments), states


@call("causal_conv1d.causal_conv1d_update")
def _causal_conv1d_update(i: Inputs) -> Any:
    states = i.residual[:, :, None].expand(-1, -1, 3).contiguous()
    arguments = i.x, states, i.gated[0].repeat(2).view(32, 4), i.weight, "silu", i.pages
    return causal_conv1d.causal_conv1d_update(*arguments), states


@call("gdn_decode.gated_delta_rule_decode")
def _gated_delta_rule_decode(i: Inputs) -> Any:
    state = torch.ones(TOKENS, HEADS, DIM, DIM, dtype=torch.float32, device=i.device)
    return gdn_decode.gated_delta_rule_decode(*i.delta_rule[:3], state, *i.delta_rule[3:])


@call("gdn_decode.gated_delta_rule_decode_pretranspose")
def _gated_delta_rule_decode_pretranspose(i: Inputs) -> Any:
    pool = torch.ones(6, HEADS, DIM, DIM, dtype=torch.float32, device=i.device)
    return gdn_decode.gated_delta_rule_decode_pretranspose(
        *i.delta_rule[:3], None, *i.delta_rule[3:], initial_state=pool, initial_state_indices=i.pages
    )


@call("gdn_decode.gated_delta_rule_mtp")
def _gated_delta_rule_mtp(i: Inputs) -> Any:
    pool = torch.ones(6, HEADS, DIM, DIM, dtype=torch.float32, device=i.device)
    kept = torch.ones(TOKENS, 1, HEADS, DIM, DIM, dtype=torch.float32, device=i.device)
    inputs = *i.delta_rule[:3], pool, i.pages, *i.delta_rule[3:]
    return gdn_decode.gated_delta_rule_mtp(*inputs, intermediate_states_buffer=kept), kept


@call("concat_mla_k")
def _concat_mla_k(i: Inputs) -> Any:
    k = i.q.new_zeros(TOKENS, HEADS, 96)
    flashinfer.concat_mla_k(k, i.q, i.k[:, :1, :32])
    return k


# ----------------------------------------------------------------------------------------------------------------- rope

for _name in ("apply_rope", "apply_llama31_rope"):
    CALLS[_name] = lambda i, _name=_name: getattr(flashinfer, _name)(i.q, i.k, i.qo_indptr, i.last_page_len)
    CALLS[f"{_name}_pos_ids"] = lambda i, _name=_name: getattr(flashinfer, f"{_name}_pos_ids")(i.q, i.k, i.positions)
for _name in ("apply_rope_inplace", "apply_llama31_rope_inplace"):

    @call(_name)
    def _rope_inplace(i: Inputs, _name: str = _name) -> Any:
        q, k = i.q.clone(), i.k.clone()
        getattr(flashinfer, _name)(q, k, i.qo_indptr, i.last_page_len)
        return q, k


for _name in ("apply_rope_pos_ids_inplace", "apply_llama31_rope_pos_ids_inplace"):

    @call(_name)
    def _rope_pos_ids_inplace(i: Inputs, _name: str = _name) -> Any:
        q, k = i.q.clone(), i.k.clone()
        getattr(flashinfer, _name)(q, k, i.positions)
        return q, k


CALLS["apply_rope_with_cos_sin_cache"] = lambda i: flashinfer.apply_rope_with_cos_sin_cache(
    i.positions, i.q.flatten(1), i.k.flatten(1), DIM, i.table
)


@call("apply_rope_with_cos_sin_cache_inplace")
def _apply_rope_with_cos_sin_cache_inplace(i: Inputs) -> Any:
    q, k = i.q.flatten(1).clone(), i.k.flatten(1).clone()
    flashinfer.apply_rope_with_cos_sin_cache_inplace(i.positions, q, k, DIM, i.table)
    return q, k


@call("rope_append_paged_kv_cache")
def _rope_append_paged_kv_cache(i: Inputs) -> Any:
    cache = i.cache.clone()
    q = flashinfer.rope_append_paged_kv_cache(
        i.q, i.k, i.v, i.batch_indices, i.slots, cache, i.pages, i.kv_indptr, i.last_page_len
    )
    return q, cache


@call("fused_qk_rmsnorm_rope")
def _fused_qk_rmsnorm_rope(i: Inputs) -> Any:
    qkv = i.qkv.clone()
    flashinfer.fused_qk_rmsnorm_rope(qkv, i.head_weight, i.head_weight, i.positions, HEADS, KV_HEADS)
    return qkv


# ------------------------------------------------------------------------------------------------------ matrix products

CALLS["bmm_fp8"] = lambda i: flashinfer.bmm_fp8(
    i.x.to(torch.float8_e4m3fn)[None], i.table[:, :32].contiguous().to(torch.float8_e4m3fn).mT[None], i.scale, i.scale,
    torch.bfloat16,
)  # fmt: skip


@call("SegmentGEMMWrapper")
def _segment_gemm(i: Inputs) -> Any:
    weights = i.gated[:, None, :].expand(TOKENS, 16, 64).reshape(TOKENS, 32, 32).contiguous()
    wrapper = flashinfer.SegmentGEMMWrapper(i.workspace)
    return wrapper.run(i.x, weights, 2, True, seg_indptr=i.qo_indptr, weight_indices=i.batch_indices[2:4])


def _scaled(i: Inputs) -> tuple[Tensor, ...]:
    """Rows and a weight of 32, in fp8, and scales of each."""
    a, b = i.x.to(torch.float8_e4m3fn), i.table[:, :32].contiguous().to(torch.float8_e4m3fn)
    return a, b, i.logits[:, :1].abs().contiguous(), i.scale[:, None]


CALLS["gemm_fp8_nt_groupwise"] = lambda i: flashinfer.gemm_fp8_nt_groupwise(*_scaled(i), "K")


@call("group_gemm_fp8_nt_groupwise")
def _group_gemm(i: Inputs) -> Any:
    a, b, a_scale, b_scale = _scaled(i)
    weights, scales = b.view(2, 8, 32), b_scale.expand(2, 1, 1)
    return flashinfer.group_gemm_fp8_nt_groupwise(a, weights, a_scale, scales, i.qo_indptr, scale_major_mode="K")


CALLS["gemm.fp8_blockscale_gemm_sm90"] = lambda i: flashinfer.gemm.fp8_blockscale_gemm_sm90(
    i.q.flatten(1), i.table.repeat(1, HEADS).to(torch.float8_e4m3fn), None, i.scale[:, None].expand(1, 2)
)


# ------------------------------------------------------------------------------------------------------------- sampling

STATE = {"seed": 3, "offset": 0}
CALLS |= {
    "sampling.softmax": lambda i: [sampling.softmax(i.logits), sampling.softmax(i.logits, temperature=i.per_row)],
    "top_p_renorm_probs": lambda i: [flashinfer.top_p_renorm_probs(i.probs, top_p) for top_p in (0.5, i.per_row)],
    "top_k_renorm_probs": lambda i: flashinfer.top_k_renorm_probs(i.probs, 5),
    "top_k_mask_logits": lambda i: flashinfer.top_k_mask_logits(i.logits, 5),
    "top_k_page_table_transform": lambda i: flashinfer.top_k_page_table_transform(
        i.logits, i.pages.expand(TOKENS, -1), i.lengths, 6, page_size=8
    ),
    "top_k_ragged_transform": lambda i: flashinfer.top_k_ragged_transform(i.logits, i.slots, i.lengths, 6, tie_break=1),
    "top_k": lambda i: [*flashinfer.top_k(i.logits, 5, sorted=True), *flashinfer.top_k(i.logits, 5, True, tie_break=1)],
    "sampling_from_probs": lambda i: flashinfer.sampling_from_probs(i.probs, **STATE),
    "sampling_from_logits": lambda i: flashinfer.sampling_from_logits(i.logits, **STATE),
    "top_p_sampling_from_probs": lambda i: flashinfer.top_p_sampling_from_probs(i.probs, 0.5, **STATE),
    "top_k_sampling_from_probs": lambda i: flashinfer.top_k_sampling_from_probs(i.probs, 5, **STATE),
    "min_p_sampling_from_probs": lambda i: flashinfer.min_p_sampling_from_probs(i.probs, 0.1, **STATE),
    "top_k_top_p_sampling_from_logits": lambda i: flashinfer.top_k_top_p_sampling_from_logits(
        i.logits, 5, i.per_row, **STATE
    ),
    "top_k_top_p_sampling_from_probs": lambda i: flashinfer.top_k_top_p_sampling_from_probs(
        i.probs, 5, 0.9, return_valid=True, **STATE
    ),
    "chain_speculative_sampling": lambda i: flashinfer.chain_speculative_sampling(
        i.chain[:, :2], i.drafts, i.chain, i.counts.clone(), **STATE
    ),
}
