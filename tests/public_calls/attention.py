# SPDX-License-Identifier: Apache-2.0
"""Calls of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashinfer
from flashinfer import decode, gdn_prefill, prefill
from tests.public_calls.inputs import CALLS, DIM, HEADS, KV_HEADS, PAGE, SHAPES, TOKENS, Inputs, call

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
