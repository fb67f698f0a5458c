# SPDX-License-Identifier: Apache-2.0
"""flashinfer: kernels for serving large language models, precompiled where possible and compiled in under a second
where not.

Importing is free: names are resolved to their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from flashinfer.version import __version__

# public name -> module that defines it
_EXPORTS = {
    name: module
    for module, names in {
        "activation": ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_quant"),
        "attention": (
            "BatchAttention",
            "BatchAttentionWithAttentionSinkWrapper",
            "BatchDecodeWithAttentionSinkWrapper",
        ),
        "autotuner": ("autotune_v2",),
        "cascade": (
            "merge_state",
            "merge_state_in_place",
            "merge_states",
            "MultiLevelCascadeAttentionWrapper",
            "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
            "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
        ),
        "concat_ops": ("concat_mla_k",),
        "decode": (
            "single_decode_with_kv_cache",
            "BatchDecodeWithPagedKVCacheWrapper",
            "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
            "fast_decode_plan",
        ),
        "events": ("tag",),
        "gemm": ("SegmentGEMMWrapper", "bmm_fp8", "gemm_fp8_nt_groupwise", "group_gemm_fp8_nt_groupwise"),
        "mla": ("BatchMLAPagedAttentionWrapper", "sparse_mla_decode", "sparse_mla_prefill"),
        "norm": (
            "rmsnorm",
            "fused_add_rmsnorm",
            "gemma_rmsnorm",
            "gemma_fused_add_rmsnorm",
            "layernorm",
            "rmsnorm_quant",
            "fused_add_rmsnorm_quant",
            "gated_rmsnorm",
            "gated_rmsnorm_quant",
        ),
        "page": ("append_paged_kv_cache", "append_paged_mla_kv_cache", "get_batch_indices_positions", "get_seq_lens"),
        "pod": ("BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"),
        "prefill": (
            "single_prefill_with_kv_cache",
            "single_prefill_with_kv_cache_return_lse",
            "BatchPrefillWithPagedKVCacheWrapper",
            "BatchPrefillWithRaggedKVCacheWrapper",
        ),
        "quantization": ("packbits", "segment_packbits"),
        "rope": (
            "apply_rope",
            "apply_rope_inplace",
            "apply_rope_pos_ids",
            "apply_rope_pos_ids_inplace",
            "apply_llama31_rope",
            "apply_llama31_rope_inplace",
            "apply_llama31_rope_pos_ids",
            "apply_llama31_rope_pos_ids_inplace",
            "apply_rope_with_cos_sin_cache",
            "apply_rope_with_cos_sin_cache_inplace",
            "rope_append_paged_kv_cache",
            "fused_qk_rmsnorm_rope",
        ),
        "sampling": (
            "sampling_from_probs",
            "sampling_from_logits",
            "top_p_sampling_from_probs",
            "top_k_sampling_from_probs",
            "min_p_sampling_from_probs",
            "top_k_top_p_sampling_from_logits",
            "top_k_top_p_sampling_from_probs",
            "top_p_renorm_probs",
            "top_k_renorm_probs",
            "top_k_mask_logits",
            "chain_speculative_sampling",
        ),
        "sparse": ("BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper"),
        "variants": ("variant", "mask"),
        "topk": ("top_k", "top_k_page_table_transform", "top_k_ragged_transform", "TopKTieBreak"),
    }.items()
    for name in names
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"flashinfer.{_EXPORTS[name]}"), name)
    else:
        try:
            value = importlib.import_module(f"flashinfer.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"flashinfer.{name}":
                raise
            value = importlib.import_module("flashinfer.absent").names_of("flashinfer")(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
