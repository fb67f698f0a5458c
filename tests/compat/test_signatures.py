# SPDX-License-Identifier: Apache-2.0
"""Names, order and defaults of decode, prefill and cascade are upstream FlashInfer's.

The table is upstream 0.2.5, whose order matters because engines call these positionally, and behind it what later
releases or we added: keyword arguments, or last in line.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch  # noqa: F401  # in defaults of the table

import flashinfer
from flashinfer import cascade, concat_ops, decode, gdn_decode, gdn_prefill, mla, page, pod, prefill, sparse, topk

_FORWARD = """
    self, q, paged_kv_cache, pos_encoding_mode="NONE", q_scale=None, k_scale=None, v_scale=None, window_left=-1,
    logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None
"""
_PLAN = """
    self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE",
    window_left=-1, logits_soft_cap=None, q_data_type=None, kv_data_type=None, data_type=None, sm_scale=None,
    rope_scale=None, rope_theta=None, non_blocking=True,
    *, o_data_type=None, fixed_split_size=None, disable_split_kv=False, q_len_per_req=1, variant=None, mask=None,
    **later
"""
_PREFILL_OPTIONS = """
    head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
    use_fp16_qk_reduction=False
"""
_RUN_WITH_SINKS = """
    self, q, paged_kv_cache, sinks=None, sm_scale=None, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
    lse=None, return_lse=False, enable_pdl=None, window_left=None, **later
"""
_SPARSE_OPTIONS = """
    pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, rope_scale=None,
    rope_theta=None
"""
_POD_OPTIONS = """
    pos_encoding_mode="NONE", window_left=-1, q_data_type="float16", kv_data_type=None, data_type=None, sm_scale=None,
    rope_scale=None, rope_theta=None, non_blocking=True
"""
_RESET = "self, float_workspace_buffer, int_workspace_buffer"
_UNIQUE = "unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len"
_SHAPES = "num_qo_heads, num_kv_heads, head_dim, page_size"

# q_data_type: upstream's default is "float16", which None means here too unless data_type is given; a caller who gives
# data_type alone then gets it for q as well.
SIGNATURES: dict[Any, str] = {
    decode.single_decode_with_kv_cache: """
        q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False, q_scale=None, k_scale=None,
        v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
        return_lse=False, *, sinks=None, o_dtype=None, variant=None, mask=None
    """,
    decode.BatchDecodeWithPagedKVCacheWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, jit_args=None,
        backend="auto"
    """,
    decode.BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    decode.BatchDecodeWithPagedKVCacheWrapper.plan: _PLAN,
    decode.BatchDecodeWithPagedKVCacheWrapper.run: """
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, **later
    """,
    decode.BatchDecodeWithPagedKVCacheWrapper.forward: _FORWARD,
    decode.BatchDecodeWithPagedKVCacheWrapper.forward_return_lse: _FORWARD,
    decode.BatchDecodeWithPagedKVCacheWrapper.end_forward: "self",
    decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper.__init__: """
        self, workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, kv_layout="NHD",
        use_tensor_cores=False
    """,
    prefill.single_prefill_with_kv_cache: """
        q, k, v, custom_mask=None, packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None,
        rope_theta=None, return_lse=False, backend="auto",
        *, scale_q=None, scale_k=None, scale_v=None, k_scale=None, v_scale=None, o_dtype=None, sinks=None,
        variant=None, mask=None
    """,
    prefill.BatchPrefillWithPagedKVCacheWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None
    """,
    prefill.BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    prefill.BatchPrefillWithPagedKVCacheWrapper.plan: f"""
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, {_PREFILL_OPTIONS}, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, non_blocking=True,
        *, o_data_type=None, fixed_split_size=None, disable_split_kv=False, variant=None,
        mask=None, **later
    """,
    prefill.BatchPrefillWithPagedKVCacheWrapper.run: """
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, **later
    """,
    prefill.BatchPrefillWithPagedKVCacheWrapper.forward: """
        self, q, paged_kv_cache, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, k_scale=None,
        v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
        *, return_lse=False
    """,
    prefill.BatchPrefillWithPagedKVCacheWrapper.end_forward: "self",
    prefill.BatchPrefillWithRaggedKVCacheWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, kv_indptr_buf=None,
        custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None
    """,
    prefill.BatchPrefillWithRaggedKVCacheWrapper.plan: f"""
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, {_PREFILL_OPTIONS}, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, q_data_type="float16",
        kv_data_type=None, *, o_data_type=None, fixed_split_size=None, disable_split_kv=False, variant=None,
        mask=None, **later
    """,
    prefill.BatchPrefillWithRaggedKVCacheWrapper.run: """
        self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, out=None, lse=None,
        return_lse=False, enable_pdl=None, sinks=None, **later
    """,
    prefill.BatchPrefillWithRaggedKVCacheWrapper.forward: """
        self, q, k, v, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, *, return_lse=False
    """,
    decode.BatchDecodeMlaWithPagedKVCacheWrapper.__init__: """
        self, float_workspace_buffer, use_cuda_graph=False, use_tensor_cores=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None
    """,
    decode.BatchDecodeMlaWithPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    decode.BatchDecodeMlaWithPagedKVCacheWrapper.plan: """
        self, indptr, indices, last_page_len, num_qo_heads, head_dim_compressed_kv, page_size, sm_scale, window_left=-1,
        logits_soft_cap=None, data_type="float16", q_data_type=None, rope_scale=None, rope_theta=None
    """,
    decode.BatchDecodeMlaWithPagedKVCacheWrapper.run: """
        self, q_nope, q_pe, paged_ckv_cache, paged_kpe_cache, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None
    """,
    mla.BatchMLAPagedAttentionWrapper.__init__: """
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None, backend="auto"
    """,
    mla.BatchMLAPagedAttentionWrapper.reset_workspace_buffer: _RESET,
    mla.BatchMLAPagedAttentionWrapper.plan: """
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type, use_profiler=False, **later
    """,
    mla.BatchMLAPagedAttentionWrapper.run: """
        self, q_nope, q_pe, ckv_cache, kpe_cache=None, out=None, lse=None, return_lse=False, profiler_buffer=None,
        kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None,
        *, ckv_scale=None, kpe_scale=None, enable_pdl=None, **later
    """,
    flashinfer.BatchAttentionWithAttentionSinkWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", pos_encoding_mode="NONE", use_fp16_qk_reduction=False,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, head_dim_qk=128, head_dim_vo=128, window_left=-1
    """,
    flashinfer.BatchAttentionWithAttentionSinkWrapper.run: _RUN_WITH_SINKS,
    flashinfer.BatchDecodeWithAttentionSinkWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", backend="auto", q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16, head_dim_qk=128, head_dim_vo=128, window_left=-1, **kwargs
    """,
    decode.xqa_batch_decode_with_kv_cache: """
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0, bmm2_scale=1.0,
        window_left=-1, out=None, sinks=None, kv_layout="NHD", enable_pdl=None, q_len_per_req=1, o_scale=1.0, mask=None,
        kv_cache_sf=None, q_cu_seq_lens=None
    """,
    decode.trtllm_batch_decode_with_kv_cache: """
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0, bmm2_scale=1.0,
        window_left=-1, out=None, out_dtype=None, o_sf_scale=None, o_sf_vec_size=None, sinks=None, kv_layout="HND",
        enable_pdl=None, backend="auto", q_len_per_req=1, o_scale=1.0, mask=None, max_q_len=None, cum_seq_lens_q=None,
        skip_softmax_threshold_scale_factor=None, kv_cache_sf=None, uses_shared_paged_kv_idx=True, lse=None,
        return_lse=False, **later
    """,
    prefill.trtllm_batch_context_with_kv_cache: """
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale,
        batch_size, cum_seq_lens_q, cum_seq_lens_kv, window_left=-1, out=None, out_dtype=None, o_sf_scale=None,
        o_sf_vec_size=None, kv_layout="HND", enable_pdl=None, sinks=None, kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None, uses_shared_paged_kv_idx=True, causal=True, lse=None,
        return_lse=False, multi_ctas_kv_counter_buffer=None, use_fp16_softmax=None, uses_spcompress=None,
        backend="trtllm-gen", window_right=-1, **later
    """,
    flashinfer.BatchAttention.__init__: 'self, kv_layout="NHD", device="cuda"',
    flashinfer.BatchAttention.plan: """
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo,
        page_size, causal=False, sm_scale=None, logits_soft_cap=None, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16, use_profiler=False
    """,
    flashinfer.BatchAttention.prewarm_paged_kv_stride_variant: 'self, variant="independent"',
    flashinfer.BatchAttention.run: """
        self, q, kv_cache, out=None, lse=None, k_scale=None, v_scale=None, logits_soft_cap=0.0, profiler_buffer=None,
        kv_cache_sf=None
    """,
    pod.PODWithPagedKVCacheWrapper.__init__: """
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, jit_args=None
    """,
    pod.PODWithPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    pod.PODWithPagedKVCacheWrapper.plan: f"self, indptr, indices, last_page_len, {_SHAPES}, {_POD_OPTIONS}",
    pod.PODWithPagedKVCacheWrapper.run: """
        self, q_p, k_p, v_p, q_d, paged_kv_cache_d, custom_mask_p=None, packed_custom_mask_p=None, causal_p=False,
        kv_layout_p="NHD", pos_encoding_mode_p="NONE", sm_scale_p=None, window_left_p=-1, rope_scale_p=None,
        rope_theta_p=None, return_lse_p=False, custom_mask_d=None, packed_custom_mask_d=None, causal_d=False,
        kv_layout_d="NHD", pos_encoding_mode_d="NONE", sm_scale_d=None, window_left_d=-1, rope_scale_d=None,
        rope_theta_d=None, q_scale=None, k_scale=None, v_scale=None, return_lse_d=False, use_fp16_qk_reduction=False,
        enable_pdl=None, *args
    """,
    pod.PODWithPagedKVCacheWrapper.end_forward: "self",
    pod.BatchPODWithPagedKVCacheWrapper.__init__: 'self, float_workspace_buffer, kv_layout="NHD"',
    pod.BatchPODWithPagedKVCacheWrapper.plan: f"""
        self, qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, qo_indptr_d, kv_indptr_d, kv_indices_d,
        last_page_len_d, {_SHAPES}, {_POD_OPTIONS}
    """,
    pod.BatchPODWithPagedKVCacheWrapper.run: """
        self, q_p, paged_kv_cache_p, q_d, paged_kv_cache_d, custom_mask_p=None, packed_custom_mask_p=None,
        causal_p=False, q_scale=None, k_scale=None, v_scale=None, return_lse=False, use_fp16_qk_reduction=False,
        enable_pdl=None
    """,
    pod.BatchPODWithPagedKVCacheWrapper.end_forward: "self",
    sparse.BlockSparseAttentionWrapper.__init__: 'self, float_workspace_buffer, backend="auto"',
    sparse.BlockSparseAttentionWrapper.reset_workspace_buffer: _RESET,
    sparse.BlockSparseAttentionWrapper.plan: f"""
        self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None, packed_mask=None,
        causal=False, {_SPARSE_OPTIONS}, q_data_type="float16", kv_data_type=None, o_data_type="float16",
        non_blocking=True, block_mask=None, kv_block_lens=None, q2k_indices=None, q2k_num=None, kv_splits=None,
        use_clc=None, q_scale=None, k_scale=None, v_scale=None
    """,
    sparse.BlockSparseAttentionWrapper.run: """
        self, q, k, v, scale_q=None, scale_k=None, scale_v=None, out=None, lse=None, return_lse=False, enable_pdl=None
    """,
    sparse.BlockSparseAttentionWrapper.forward: f"""
        self, q, k, v, scale_q=None, scale_k=None, scale_v=None, {_SPARSE_OPTIONS}
    """,
    sparse.BlockSparseAttentionWrapper.end_forward: "self",
    sparse.VariableBlockSparseAttentionWrapper.__init__: 'self, float_workspace_buffer, backend="auto"',
    sparse.VariableBlockSparseAttentionWrapper.reset_workspace_buffer: _RESET,
    sparse.VariableBlockSparseAttentionWrapper.plan: f"""
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
        {_SPARSE_OPTIONS}, non_blocking=True, q_data_type="float16", kv_data_type=None, q_scale=None, k_scale=None,
        v_scale=None
    """,
    sparse.VariableBlockSparseAttentionWrapper.run: """
        self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None
    """,
    sparse.VariableBlockSparseAttentionWrapper.forward: f"self, q, k, v, {_SPARSE_OPTIONS}",
    sparse.convert_bsr_mask_layout: "mask, indptr",
    page.block_sparse_indices_to_vector_sparse_offsets: """
        block_sparse_indices, block_sparse_indptr, vector_sparse_offsets, vector_sparse_indptr, kv_lens, stride_block,
        stride_n, block_size
    """,
    topk.top_k_page_table_transform: """
        input, src_page_table, lengths, k, row_to_batch=None, deterministic=False, tie_break=0, dsa_graph_safe=False,
        row_starts=None, page_table_row_starts=None, *, page_size=1, out=None, out_raw_indices=None
    """,
    topk.top_k_ragged_transform: """
        input, offsets, lengths, k, deterministic=False, tie_break=0, dsa_graph_safe=False, row_starts=None
    """,
    gdn_decode.gated_delta_rule_decode: """
        q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True, backend="auto"
    """,
    gdn_decode.gated_delta_rule_decode_pretranspose: """
        q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True, initial_state=None,
        initial_state_indices=None, output_state_indices=None,
        intermediate_states_buffer=None, disable_state_update=False, backend="auto"
    """,
    gdn_decode.gated_delta_rule_mtp: """
        q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale=None, output=None,
        intermediate_states_buffer=None, ssm_state_indices=None, disable_state_update=None, use_qk_l2norm=True,
        output_state_indices=None, cache_replayssm=False, replayssm_rawv=None, replayssm_rawk=None, replayssm_g=None,
        replayssm_beta=None
    """,
    gdn_prefill.chunk_gated_delta_rule: """
        q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        use_qk_l2norm_in_kernel=False, output=None, output_state=None, state_checkpoints=None,
        checkpoint_cu_starts=None, checkpoint_every_n_tokens=0, use_cp="auto", state_indices=None, _cp_chunk_len=None,
        backend="auto", max_seqlen=None, *, gate_domain="linear", use_gate_in_kernel=False, A_log=None, dt_bias=None,
        beta_is_logit=False, cu_seqlens_cpu=None, output_state_indices=None, checkpoint_state_indices=None,
        prefix_lens=None
    """,
    concat_ops.concat_mla_k: 'k, k_nope, k_rope, *, backend="default"',
    cascade.merge_state: "v_a, s_a, v_b, s_b",
    cascade.merge_state_in_place: "v, s, v_other, s_other, mask=None",
    cascade.merge_states: "v, s",
    cascade.variable_length_merge_states: "v, s, indptr",
    cascade.MultiLevelCascadeAttentionWrapper.__init__: """
        self, num_levels, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf_arr=None,
        paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None
    """,
    cascade.MultiLevelCascadeAttentionWrapper.reset_workspace_buffer: """
        self, float_workspace_buffer, int_workspace_buffers
    """,
    cascade.MultiLevelCascadeAttentionWrapper.plan: f"""
        self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, {_SHAPES}, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None
    """,
    cascade.MultiLevelCascadeAttentionWrapper.run: "self, q, paged_kv_cache",
    cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.__init__: 'self, float_workspace_buffer, kv_layout="NHD"',
    cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward: f"""
        self, {_UNIQUE}, {_SHAPES}, data_type="float16"
    """,
    cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward: "self, q, k_shared, v_shared, unique_kv_cache",
    cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.end_forward: "self",
    cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.__init__: 'self, float_workspace_buffer, kv_layout="NHD"',
    cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.reset_workspace_buffer: _RESET,
    cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward: f"""
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, {_SHAPES}, **options
    """,
    cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward: """
        self, q, k_shared, v_shared, unique_kv_cache, causal=False, use_fp16_qk_reduction=False, sm_scale=None,
        rope_scale=None, rope_theta=None
    """,
    cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.end_forward: "self",
}


def shape(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature(function: Any) -> None:
    arguments = " ".join(SIGNATURES[function].split())
    assert shape(function) == shape(eval(f"lambda {arguments}: None"))


def test_other_names() -> None:
    wrapper, cascaded = decode.BatchDecodeWithPagedKVCacheWrapper, cascade.MultiLevelCascadeAttentionWrapper
    assert callable(wrapper.run_return_lse)
    assert wrapper.begin_forward is wrapper.plan
    assert cascaded.begin_forward is cascaded.plan and cascaded.forward is cascaded.run
    for cls, names in (
        (wrapper, ("is_cuda_graph_enabled", "use_tensor_cores")),
        (cascaded, ("is_cuda_graph_enabled",)),
    ):
        assert all(isinstance(inspect.getattr_static(cls, name), property) for name in names)
