"""Where the names are defined that __init__.py finds on first use: for type checkers, which do not run it."""

from flashinfer import activation as activation
from flashinfer import attention as attention
from flashinfer import autotuner as autotuner
from flashinfer import cascade as cascade
from flashinfer import concat_ops as concat_ops
from flashinfer import decode as decode
from flashinfer import events as events
from flashinfer import gemm as gemm
from flashinfer import mla as mla
from flashinfer import norm as norm
from flashinfer import page as page
from flashinfer import prefill as prefill
from flashinfer import quantization as quantization
from flashinfer import rope as rope
from flashinfer import sampling as sampling
from flashinfer import topk as topk
from flashinfer.activation import gelu_and_mul as gelu_and_mul
from flashinfer.activation import gelu_tanh_and_mul as gelu_tanh_and_mul
from flashinfer.activation import silu_and_mul as silu_and_mul
from flashinfer.activation import silu_and_mul_quant as silu_and_mul_quant
from flashinfer.attention import BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper
from flashinfer.attention import BatchDecodeWithAttentionSinkWrapper as BatchDecodeWithAttentionSinkWrapper
from flashinfer.autotuner import autotune_v2 as autotune_v2
from flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper as BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
)
from flashinfer.cascade import (
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper as BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from flashinfer.cascade import MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper
from flashinfer.cascade import merge_state as merge_state
from flashinfer.cascade import merge_state_in_place as merge_state_in_place
from flashinfer.cascade import merge_states as merge_states
from flashinfer.concat_ops import concat_mla_k as concat_mla_k
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper
from flashinfer.decode import CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan as fast_decode_plan
from flashinfer.decode import single_decode_with_kv_cache as single_decode_with_kv_cache
from flashinfer.events import tag as tag
from flashinfer.gemm import bmm_fp8 as bmm_fp8
from flashinfer.mla import BatchMLAPagedAttentionWrapper as BatchMLAPagedAttentionWrapper
from flashinfer.mla import sparse_mla_decode as sparse_mla_decode
from flashinfer.mla import sparse_mla_prefill as sparse_mla_prefill
from flashinfer.norm import fused_add_rmsnorm as fused_add_rmsnorm
from flashinfer.norm import fused_add_rmsnorm_quant as fused_add_rmsnorm_quant
from flashinfer.norm import gemma_fused_add_rmsnorm as gemma_fused_add_rmsnorm
from flashinfer.norm import gemma_rmsnorm as gemma_rmsnorm
from flashinfer.norm import layernorm as layernorm
from flashinfer.norm import rmsnorm as rmsnorm
from flashinfer.norm import rmsnorm_quant as rmsnorm_quant
from flashinfer.page import append_paged_kv_cache as append_paged_kv_cache
from flashinfer.page import append_paged_mla_kv_cache as append_paged_mla_kv_cache
from flashinfer.page import get_batch_indices_positions as get_batch_indices_positions
from flashinfer.page import get_seq_lens as get_seq_lens
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper
from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper
from flashinfer.prefill import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from flashinfer.prefill import single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse
from flashinfer.quantization import packbits as packbits
from flashinfer.quantization import segment_packbits as segment_packbits
from flashinfer.rope import apply_llama31_rope as apply_llama31_rope
from flashinfer.rope import apply_llama31_rope_inplace as apply_llama31_rope_inplace
from flashinfer.rope import apply_llama31_rope_pos_ids as apply_llama31_rope_pos_ids
from flashinfer.rope import apply_llama31_rope_pos_ids_inplace as apply_llama31_rope_pos_ids_inplace
from flashinfer.rope import apply_rope as apply_rope
from flashinfer.rope import apply_rope_inplace as apply_rope_inplace
from flashinfer.rope import apply_rope_pos_ids as apply_rope_pos_ids
from flashinfer.rope import apply_rope_pos_ids_inplace as apply_rope_pos_ids_inplace
from flashinfer.rope import apply_rope_with_cos_sin_cache as apply_rope_with_cos_sin_cache
from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace as apply_rope_with_cos_sin_cache_inplace
from flashinfer.rope import fused_qk_rmsnorm_rope as fused_qk_rmsnorm_rope
from flashinfer.rope import rope_append_paged_kv_cache as rope_append_paged_kv_cache
from flashinfer.sampling import chain_speculative_sampling as chain_speculative_sampling
from flashinfer.sampling import min_p_sampling_from_probs as min_p_sampling_from_probs
from flashinfer.sampling import sampling_from_logits as sampling_from_logits
from flashinfer.sampling import sampling_from_probs as sampling_from_probs
from flashinfer.sampling import top_k_mask_logits as top_k_mask_logits
from flashinfer.sampling import top_k_renorm_probs as top_k_renorm_probs
from flashinfer.sampling import top_k_sampling_from_probs as top_k_sampling_from_probs
from flashinfer.sampling import top_k_top_p_sampling_from_logits as top_k_top_p_sampling_from_logits
from flashinfer.sampling import top_k_top_p_sampling_from_probs as top_k_top_p_sampling_from_probs
from flashinfer.sampling import top_p_renorm_probs as top_p_renorm_probs
from flashinfer.sampling import top_p_sampling_from_probs as top_p_sampling_from_probs
from flashinfer.topk import TopKTieBreak as TopKTieBreak
from flashinfer.topk import top_k as top_k
from flashinfer.version import __version__ as __version__
