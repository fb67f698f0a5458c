"""One small call of every public function and wrapper, for what has to hold for all of them.

A call takes its tensors from `Inputs`, which are made before it, and returns what it returned or wrote. Functions are
looked up by their public names when the call is made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashinfer
from flashinfer import cascade, causal_conv1d, decode, gdn_decode, gdn_prefill, prefill, quantization, sampling, utils
from flashinfer.host.memo import Memo

TOKENS, HEADS, KV_HEADS, DIM, PAGE = 5, 4, 2, 64, 4
VOCAB = 40
SHAPES = (HEADS, KV_HEADS, DIM, PAGE)


class Inputs:
    """Tensors on one device; the same in every instance."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        draw = torch.Generator(device="cpu").manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device, dtype)

        def index(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.x, self.gated, self.residual = random(TOKENS, 32), random(TOKENS, 64), random(TOKENS, 32)
        self.weight, self.fp8 = random(32), torch.zeros(TOKENS, 32, device=device).to(torch.float8_e4m3fn)
        self.scale = torch.full((1,), 0.5, dtype=torch.float32, device=device)
        self.bits, self.segments = random(70) > 0, index(0, 3, 3, 60)
        self.q, self.k, self.v = (random(TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.kv = (random(12, KV_HEADS, DIM), random(12, KV_HEADS, DIM))
        self.lse, self.lse_other = (random(TOKENS, HEADS, dtype=torch.float32) for _ in range(2))
        self.qkv, self.head_weight = random(TOKENS, HEADS + 2 * KV_HEADS, DIM), random(DIM)
        self.positions, self.table = index(*range(TOKENS)), random(16, DIM, dtype=torch.float32)
        # Requests of three and two queries, over seven and nine keys in pages of four.
        self.qo_indptr, self.kv_indptr = index(0, 3, 5), index(0, 2, 5)
        self.pages, self.last_page_len = index(4, 0, 2, 1, 3), index(3, 1)
        self.cache = random(6, 2, PAGE, KV_HEADS, DIM)
        self.batch_indices, self.slots = index(0, 0, 0, 1, 1), index(4, 5, 6, 7, 8)
        self.mask = random(3 * 7 + 2 * 9) > 0
        self.shared = [index(0, 5), index(0, 1), index(5), index(4)]  # one page for all queries
        self.latent = random(6, PAGE, 96)
        self.latent_rows, self.latent_q = random(6, PAGE, 576), random(TOKENS, HEADS, 576)
        self.kv_lens, self.rows = index(7, 9), index(*[(7 * row) % 25 - 1 for row in range(TOKENS * 6)]).view(TOKENS, 6)
        self.logits = random(TOKENS, VOCAB, dtype=torch.float32)
        self.lengths = index(40, 7, 0, 3, 31)
        self.probs = torch.softmax(self.logits, dim=-1)
        self.per_row = torch.full((TOKENS,), 0.7, dtype=torch.float32, device=device)
        self.drafts, self.counts = index(*range(2 * TOKENS)).view(TOKENS, 2), index(*[1] * TOKENS)
        self.chain = self.probs[:, None].repeat(1, 3, 1)
        self.sinks = random(HEADS, dtype=torch.float32)
        a, b = random(TOKENS, 1, HEADS), random(TOKENS, 1, HEADS)
        a_log, dt_bias = random(HEADS, dtype=torch.float32), random(HEADS, dtype=torch.float32)
        self.delta_rule = (self.k[:, None], self.k.flip(0)[:, None], self.q[:, None], a_log, a, dt_bias, b)
        self.delta_rows = random(TOKENS, 2, 128)
        self.workspace = torch.empty(16 << 20 if device.type == "cuda" else 8, dtype=torch.uint8, device=device)

    @property
    def paged(self) -> tuple[Tensor, ...]:
        return self.kv_indptr, self.pages, self.last_page_len


def tensors(result: Any) -> list[Tensor]:
    """Those of a result, as bits that can be compared."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


def prepared_launches() -> list[Memo[Any]]:
    """The memos of all operators, each a global of its module; those of wrappers end with them."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("flashinfer.")]
    return [found for module in modules for found in vars(module).values() if type(found) is Memo]


def forget_prepared_launches() -> None:
    """So that the next call is the first of its kind."""
    for memo in prepared_launches():
        memo.clear()


Call = Callable[[Inputs], Any]
CALLS: dict[str, Call] = {}


def call(name: str) -> Callable[[Call], Call]:
    def add(function: Call) -> Call:
        CALLS[name] = function
        return function

    return add


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

# ------------------------------------------------------------------------------------------------------------ attention

CALLS["single_decode_with_kv_cache"] = lambda i: [
    flashinfer.single_decode_with_kv_cache(i.q[0], *i.kv, return_lse=True),
    flashinfer.single_decode_with_kv_cache(i.q[0], *i.kv, return_lse=True, sinks=i.sinks),
]
for _name in ("single_prefill_with_kv_cache", "single_prefill_with_kv_cache_return_lse"):
    CALLS[_name] = lambda i, _name=_name: [
        getattr(flashinfer, _name)(i.q, *i.kv, causal=True),
        getattr(flashinfer, _name)(i.q, *i.kv, pos_encoding_mode="ALIBI"),
        getattr(flashinfer, _name)(i.q, *i.kv, sinks=i.sinks),
        getattr(flashinfer, _name)(i.q, *i.kv, custom_mask=(i.kv[0][None, :, 0, 0] > i.q[:, :1, 0])),
    ]
DECODE_PLAN: dict[str, Any] = {"q_data_type": torch.bfloat16, "pos_encoding_mode": "ALIBI"}


@call("BatchDecodeWithPagedKVCacheWrapper")
def _batch_decode(i: Inputs) -> Any:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(i.workspace)
    wrapper.plan(*i.paged, *SHAPES, **DECODE_PLAN)
    results = [wrapper.run(i.q[:2], i.cache), wrapper.run(i.q[:2], i.cache, return_lse=True)]
    wrapper.plan(*(tensor.cpu() for tensor in i.paged), *SHAPES, q_data_type="bfloat16", window_left=3)
    return [*results, wrapper.forward(i.q[:2], i.cache)]


@call("CUDAGraphBatchDecodeWithPagedKVCacheWrapper")
def _graph_decode(i: Inputs) -> Any:
    buffers = [torch.zeros_like(tensor) for tensor in i.paged]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(i.workspace, *buffers)
    wrapper.plan(*i.paged, *SHAPES, **DECODE_PLAN)
    return [wrapper.run(i.q[:2], i.cache), *buffers]


@call("fast_decode_plan")
def _fast_decode_plan(i: Inputs) -> Any:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(i.workspace)
    flashinfer.fast_decode_plan(wrapper, *i.paged, *SHAPES, **DECODE_PLAN)
    return wrapper.run(i.q[:2], i.cache)


@call("BatchPrefillWithPagedKVCacheWrapper")
def _paged_prefill(i: Inputs) -> Any:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(i.workspace)
    results = []
    masks = [{"custom_mask": mask} for mask in (i.mask, i.mask.cpu())]
    for options in ({"causal": True}, *masks, {"pos_encoding_mode": "ALIBI"}):
        wrapper.plan(i.qo_indptr, *i.paged, *SHAPES, q_data_type=torch.bfloat16, **options)
        results.append(wrapper.run(i.q, i.cache, return_lse=True))
    return [*results, wrapper.forward(i.q, i.cache, causal=True)]


@call("BatchPrefillWithRaggedKVCacheWrapper")
def _ragged_prefill(i: Inputs) -> Any:
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(i.workspace)
    wrapper.plan(i.qo_indptr, i.qo_indptr * 2, HEADS, KV_HEADS, DIM, causal=True, q_data_type=torch.bfloat16)
    return [wrapper.run(i.q, *i.kv, return_lse=True), wrapper.run(i.q, *i.kv, sinks=i.sinks)]


@call("BatchAttentionWithAttentionSinkWrapper")
def _prefill_with_sinks(i: Inputs) -> Any:
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(i.workspace)
    wrapper.plan(i.qo_indptr, *i.paged, *SHAPES, causal=True, q_data_type=torch.bfloat16)
    return wrapper.run(i.q, i.cache, i.sinks, 0.2, return_lse=True)


@call("BatchDecodeWithAttentionSinkWrapper")
def _decode_with_sinks(i: Inputs) -> Any:
    wrapper = flashinfer.BatchDecodeWithAttentionSinkWrapper(i.workspace)
    wrapper.plan(*i.paged, *SHAPES, q_data_type=torch.bfloat16)
    return wrapper.run(i.q[:2], i.cache, i.sinks, 0.2, return_lse=True)


def _latent(i: Inputs, num_queries: int) -> tuple[Tensor, ...]:
    """Queries and cache in two parts."""
    q, rows = i.latent_q[:num_queries], i.latent_rows
    return q[..., :512], q[..., 512:], rows[..., :512], rows[..., 512:]


@call("BatchMLAPagedAttentionWrapper")
def _mla(i: Inputs) -> Any:
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(i.workspace)
    shapes, dtypes = (HEADS, 512, 64, PAGE, True, 0.07), (torch.bfloat16, torch.bfloat16)
    wrapper.plan(i.qo_indptr, i.kv_indptr, i.pages, i.kv_lens, *shapes, *dtypes)
    results = [wrapper.run(*_latent(i, TOKENS)), wrapper.run(*_latent(i, TOKENS), return_lse=True)]
    wrapper.plan(i.qo_indptr.cpu(), i.kv_indptr.cpu(), i.pages.cpu(), i.kv_lens.cpu(), *shapes, "bfloat16", "bfloat16")
    return [*results, wrapper.run_return_lse(*_latent(i, TOKENS))]


@call("decode.BatchDecodeMlaWithPagedKVCacheWrapper")
def _mla_decode(i: Inputs) -> Any:
    wrapper = decode.BatchDecodeMlaWithPagedKVCacheWrapper(i.workspace)
    wrapper.plan(*i.paged, HEADS, 512, PAGE, 0.07, data_type=torch.bfloat16)
    return [wrapper.run(*_latent(i, 2)), wrapper.run_return_lse(*_latent(i, 2))]


@call("sparse_mla_prefill")
def _sparse_mla_prefill(i: Inputs) -> Any:
    rows, given = i.latent_rows.flatten(0, 1), (i.rows, 0.07)
    out = flashinfer.sparse_mla_prefill(i.latent_q, rows, *given, out=torch.empty_like(i.latent_q[..., :512]))
    return [out, flashinfer.sparse_mla_prefill(i.latent_q, rows, *given, return_lse=True)]


@call("sparse_mla_decode")
def _sparse_mla_decode(i: Inputs) -> Any:
    given = i.latent_rows, i.rows[:, None], 0.07
    return flashinfer.sparse_mla_decode(i.latent_q[:, None], *given, return_lse=True)


def _block_table(i: Inputs) -> tuple[Tensor, ...]:
    table = torch.stack([torch.cat([i.pages[:2], i.pages[:1]]), i.pages[2:]])
    return i.cache, i.workspace, table, i.kv_lens


@call("decode.xqa_batch_decode_with_kv_cache")
def _xqa(i: Inputs) -> Any:
    given = _block_table(i)
    drafts = decode.xqa_batch_decode_with_kv_cache(i.q[:4], *given, 9, 0.1, q_len_per_req=2)
    return [decode.xqa_batch_decode_with_kv_cache(i.q[:2], *given, 9, i.scale, 0.5), drafts]


@call("decode.trtllm_batch_decode_with_kv_cache")
def _trtllm_decode(i: Inputs) -> Any:
    return decode.trtllm_batch_decode_with_kv_cache(i.q[:2], *_block_table(i), 9, kv_layout="NHD", return_lse=True)


@call("prefill.trtllm_batch_context_with_kv_cache")
def _trtllm_context(i: Inputs) -> Any:
    lengths, scales = (i.qo_indptr, i.kv_indptr), (0.1, i.scale)
    return prefill.trtllm_batch_context_with_kv_cache(
        i.q, *_block_table(i), 3, 9, *scales, 2, *lengths, kv_layout="NHD", return_lse=True
    )


@call("gdn_prefill.chunk_gated_delta_rule")
def _delta_rule_prefill(i: Inputs) -> Any:
    rows = (i.delta_rows[:, :1], i.delta_rows[:, 1:2], i.delta_rows)
    gates = (torch.sigmoid(i.lse[:, :2]), torch.sigmoid(i.lse[:, 2:]))
    states = torch.zeros(2, 2, 128, 128, dtype=torch.float32, device=i.device)
    return gdn_prefill.chunk_gated_delta_rule(*rows, *gates, None, states, True, i.qo_indptr, True)


@call("BatchAttention")
def _batch_attention(i: Inputs) -> Any:
    wrapper = flashinfer.BatchAttention(device=i.device)
    given = (i.qo_indptr, i.kv_indptr, i.pages, i.kv_lens)
    wrapper.plan(*given, HEADS, KV_HEADS, DIM, DIM, PAGE, causal=True)
    results = [wrapper.run(i.q, i.cache), wrapper.run(i.q, i.cache, logits_soft_cap=3.0)]
    wrapper.plan(*(tensor.cpu() for tensor in given), HEADS, KV_HEADS, DIM, DIM, PAGE)
    return [*results, wrapper.run(i.q, i.cache)]


@call("BatchPODWithPagedKVCacheWrapper")
def _batch_pod(i: Inputs) -> Any:
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(i.workspace)
    ones = torch.arange(3, dtype=torch.int32, device=i.device)
    results = []
    for of_decode in (ones, ones.cpu()):
        wrapper.plan(i.qo_indptr, *i.paged, of_decode, *i.paged, *SHAPES, q_data_type=torch.bfloat16)
        results.append(wrapper.run(i.q, i.cache, i.q[:2], i.cache, causal_p=True, return_lse=True))
    return [part for pair in results for part in pair]


@call("PODWithPagedKVCacheWrapper")
def _pod(i: Inputs) -> Any:
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(i.workspace)
    wrapper.plan(*i.paged, *SHAPES, q_data_type=torch.bfloat16)
    return wrapper.run(i.q, *i.kv, i.q[:2], i.cache, causal_p=True)


def _blocks(i: Inputs) -> tuple[Tensor, Tensor]:
    """Of 5 queries by 12 keys, in blocks of 2 by 4: rows of two, no and one block."""
    starts = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=i.device)
    return starts, torch.tensor([0, 2, 1], dtype=torch.int32, device=i.device)


@call("BlockSparseAttentionWrapper")
def _block_sparse(i: Inputs) -> Any:
    wrapper = flashinfer.BlockSparseAttentionWrapper(i.workspace)
    sizes = (TOKENS, 12, 2, 4, HEADS, KV_HEADS, DIM)
    results = []
    for options in ({}, {"causal": True}, {"mask": i.bits[:24].view(3, 2, 4)}):
        wrapper.plan(*_blocks(i), *sizes, q_data_type=torch.bfloat16, **options)
        results.append(wrapper.run(i.q, *i.kv, return_lse=True))
    return [*results, wrapper.forward(i.q, *i.kv, logits_soft_cap=3.0)]


@call("VariableBlockSparseAttentionWrapper")
def _variable_block_sparse(i: Inputs) -> Any:
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(i.workspace)
    rows, columns = ([[2, 3], [4, 1]], [[4, 4, 4], [8, 0, 4]])
    given = [torch.tensor(sizes, dtype=torch.int32, device=i.device) for sizes in (rows, columns)]
    blocks = i.bits[:12].view(2, 2, 3)
    wrapper.plan(blocks, *given, HEADS, KV_HEADS, DIM, q_data_type=torch.bfloat16)
    operands = [x.transpose(0, 1).contiguous() for x in (i.q, *i.kv)]
    results = [wrapper.run(*operands, return_lse=True), wrapper.forward(*operands, sm_scale=0.1)]
    wrapper.plan(*(x.cpu() for x in (blocks, *given)), KV_HEADS, KV_HEADS, DIM, q_data_type=torch.bfloat16)
    return [*results, wrapper.run(operands[0][:KV_HEADS], *operands[1:])]


@call("sparse.convert_bsr_mask_layout")
def _bsr_mask(i: Inputs) -> Any:
    from flashinfer import sparse

    return sparse.convert_bsr_mask_layout(i.bits[:24].view(3, 2, 4), _blocks(i)[0])


@call("page.block_sparse_indices_to_vector_sparse_offsets")
def _vector_offsets(i: Inputs) -> Any:
    from flashinfer import page

    offsets = torch.full_like(i.lengths, -1).repeat(4)
    return page.block_sparse_indices_to_vector_sparse_offsets(
        i.pages, i.kv_indptr, offsets, i.kv_indptr * 4, i.kv_lens, 8, 2, PAGE
    )


@call("MultiLevelCascadeAttentionWrapper")
def _cascade(i: Inputs) -> Any:
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, i.workspace)
    levels = [[shared, unique] for shared, unique in zip(i.shared, (i.qo_indptr, *i.paged))]
    wrapper.plan(*levels, *SHAPES, causal=True, q_data_type=torch.bfloat16)
    return wrapper.run(i.q, i.cache)


@call("BatchDecodeWithSharedPrefixPagedKVCacheWrapper")
def _shared_prefix_decode(i: Inputs) -> Any:
    wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(i.workspace)
    wrapper.begin_forward(*i.paged, *SHAPES, data_type=torch.bfloat16)
    return wrapper.forward(i.q[:2], *i.kv, i.cache)


@call("BatchPrefillWithSharedPrefixPagedKVCacheWrapper")
def _shared_prefix_prefill(i: Inputs) -> Any:
    wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(i.workspace)
    wrapper.begin_forward(i.qo_indptr, *i.paged, *SHAPES, q_data_type=torch.bfloat16)
    return wrapper.forward(i.q, *i.kv, i.cache, causal=True)


# -------------------------------------------------------------------------------------------------------------- helpers

CALLS["utils.get_alibi_slopes"] = lambda i: [utils.get_alibi_slopes(6), utils.get_alibi_slopes(6, i.device)]
CALLS["utils.get_indptr"] = lambda i: utils.get_indptr(i.last_page_len)


NO_OPERATORS = {"TopKTieBreak", "autotune_v2", "mask", "tag", "variant"}  # an enumeration, contexts, decorators


@functools.cache
def public_names() -> frozenset[str]:
    """What the package exports, and what its modules export besides."""
    names = set(flashinfer._EXPORTS)
    attention = ("cascade", "decode", "mla", "pod", "prefill", "sparse")
    rows = ("activation", "gemm", "norm", "quantization", "rope", "sampling", "topk")
    for module in (*attention, *rows, "concat_ops", "page"):
        exported = getattr(flashinfer, module).__all__
        names |= {f"{module}.{name}" for name in exported if name not in flashinfer._EXPORTS}
    return frozenset(names - NO_OPERATORS)


ALIASES = {
    "mla.BatchDecodeMlaWithPagedKVCacheWrapper",
    "sampling.top_p_renorm_prob",
    "sampling.top_k_renorm_prob",
}  # upstream's older names
