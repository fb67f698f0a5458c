# SPDX-License-Identifier: Apache-2.0
"""The public functions, as engines call them."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch

from flashinfer.attention.block_table.bind import Given, Options, require_scale
from flashinfer.attention.block_table.launch import call
from flashinfer.attention.compat import causal_by_window, check_later_arguments
from flashinfer.attention.planned import DataType, Result
from flashinfer.host import checks
from flashinfer.host.paged_cache import PagedCache

Scale = Union[float, torch.Tensor]


def xqa_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: Scale = 1.0,
    bmm2_scale: Scale = 1.0,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_layout: str = "NHD",
    enable_pdl: Optional[bool] = None,
    q_len_per_req: Optional[int] = 1,
    o_scale: Optional[float] = 1.0,
    mask: Optional[torch.Tensor] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    q_cu_seq_lens: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`trtllm_batch_decode_with_kv_cache` under another name, for layout NHD unless it is told otherwise.

    Args:
        q_cu_seq_lens: cum_seq_lens_q there.
        query, …: as there.
    """
    op = "xqa_batch_decode"
    check_later_arguments(op, {"kv_cache_sf": kv_cache_sf})
    require_scale(op, "o_scale", o_scale)
    q_len = 1 if q_len_per_req is None else q_len_per_req
    options = Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, q_len)
    given = Given(query, kv_cache, workspace_buffer, block_tables, seq_lens, q_cu_seq_lens, mask, sinks, out)
    result = call(op, given, options)
    assert isinstance(result, torch.Tensor)
    return result


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: Scale = 1.0,
    bmm2_scale: Scale = 1.0,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[DataType] = None,
    o_sf_scale: Optional[float] = None,
    o_sf_vec_size: Optional[int] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_layout: str = "HND",
    enable_pdl: Optional[bool] = None,
    backend: str = "auto",
    q_len_per_req: Optional[int] = 1,
    o_scale: Optional[float] = 1.0,
    mask: Optional[torch.Tensor] = None,
    max_q_len: Optional[int] = None,
    cum_seq_lens_q: Optional[torch.Tensor] = None,
    skip_softmax_threshold_scale_factor: Optional[float] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
    **later: Any,
) -> Result:
    """Attention of the last tokens of every request over a paged cache, whose pages are in a block table.

    Query i of a request stands at position `seq_len - q_len + i` and sees keys up to its own position. Needs no plan
    and does not wait for the device: a call may be captured in a CUDA graph, and replayed for other lengths and pages.

    Args:
        query: `[num_tokens, num_qo_heads, head_dim]`, the queries of a request side by side: fp16 or bf16 (fp32 on the
            CPU), or fp8 e4m3 over a cache of it.
        kv_cache: a pair of tensors `[num_pages, num_kv_heads, page_size, head_dim]` (HND; NHD has page_size before the
            heads), or one with K and V on an axis of 2 behind the first; an axis of 1 is both. Any page size, any
            strides over whole rows; dtype of query, or fp8 e4m3 or e5m2.
        workspace_buffer: scratch memory on the device, of any contents; 128 MB suffice for every common shape. Calls on
            one stream may share it. On the CPU any tensor will do.
        block_tables: int32 `[batch_size, max_pages]`, of the pages of each request; those beyond its length may be
            anything.
        seq_lens: int32 or uint32 `[batch_size]`, keys of each request, its queries' own included; 0 for padding.
        bmm1_scale: factor of q·k: that of the softmax times those of quantized query and keys. A number, or one float32
            in a tensor on the device, which only the kernel reads.
        bmm2_scale: factor of the output: that of quantized values. As bmm1_scale.
        window_left: keys seen before the query's own position; -1 for all.
        out, out_dtype: `[num_tokens, num_qo_heads, head_dim_vo]` or its dtype, that of query by default; of 16 bits.
        sinks: fp32 `[num_qo_heads]`, one more logit of every head without a value (GPT-OSS).
        q_len_per_req: queries of every request, unless cum_seq_lens_q is given.
        cum_seq_lens_q: int32 `[batch_size + 1]`; request i owns tokens `[cum_seq_lens_q[i], cum_seq_lens_q[i + 1])`.
        mask: None, and queries of a request see each other causally; or, for a tree of drafts, integers of which each
            token has a row of `ceil(q_len / 32)` words of 32 bits, little-endian: bit j is whether it sees query j of
            its request. q_len is q_len_per_req or, with cum_seq_lens_q, max_q_len.
        lse: fp32 `[num_tokens, num_qo_heads]`; allocated when None and return_lse.
        return_lse: also return the base-2 logarithm of the sum of exponentials.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
        max_q_len: the most queries of a request; needed with both cum_seq_lens_q and mask.
        max_seq_len, backend, o_scale: accepted for compatibility; o_scale of a 16-bit output cancels out.
        o_sf_scale, …, later: what asks for nothing that is not here (compat.py).

    Returns:
        out, or (out, lse). A query that sees no key gives zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or the workspace is too small.
        IndexError: on the CPU, a page number past the cache; a GPU reads where it points to.
        UnsupportedConfig: no kernel for these arguments.
    """
    op = "trtllm_batch_decode"
    asked = {
        "o_sf_scale": o_sf_scale, "o_sf_vec_size": o_sf_vec_size,
        "skip_softmax_threshold_scale_factor": skip_softmax_threshold_scale_factor, "kv_cache_sf": kv_cache_sf,
        "uses_shared_paged_kv_idx": uses_shared_paged_kv_idx,
    }  # fmt: skip
    if later:
        asked.update(later)
        cp_world, _ = asked.pop("cp_world", 1), asked.pop("cp_rank", 0)  # looked at with causal_seqlens_kv_global alone
        checks.integer(op, "cp_world", cp_world, 1)
    check_later_arguments(op, asked)
    require_scale(op, "o_scale", o_scale)
    q_len = 1 if q_len_per_req is None else q_len_per_req
    if cum_seq_lens_q is not None and max_q_len is not None:
        q_len = max_q_len
    options = Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, q_len, out_dtype=out_dtype)
    given = Given(query, kv_cache, workspace_buffer, block_tables, seq_lens, cum_seq_lens_q, mask, sinks, out, lse)
    return call(op, given, options, return_lse)


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: Scale,
    bmm2_scale: Scale,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int = -1,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[DataType] = None,
    o_sf_scale: Optional[float] = None,
    o_sf_vec_size: Optional[int] = None,
    kv_layout: str = "HND",
    enable_pdl: Optional[bool] = None,
    sinks: Optional[torch.Tensor] = None,
    kv_cache_sf: Optional[PagedCache] = None,
    skip_softmax_threshold_scale_factor: Optional[float] = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: Optional[torch.Tensor] = None,
    use_fp16_softmax: Optional[bool] = None,
    uses_spcompress: Optional[bool] = None,
    backend: str = "trtllm-gen",
    window_right: int = -1,
    **later: Any,
) -> Result:
    """Prefill, chunked prefill or append over a paged cache, whose pages are in a block table. As
    `trtllm_batch_decode_with_kv_cache`, but for:

    Args:
        batch_size: rows of block_tables.
        causal: query i sees keys up to its own position; else all in the window.
        window_right: -1, or with causal any, or without 0, which is causal.
        cum_seq_lens_kv, max_q_len, max_kv_len, multi_ctas_kv_counter_buffer: accepted for compatibility.
    """
    op = "trtllm_batch_context"
    asked = {
        "o_sf_scale": o_sf_scale, "o_sf_vec_size": o_sf_vec_size, "kv_cache_sf": kv_cache_sf,
        "skip_softmax_threshold_scale_factor": skip_softmax_threshold_scale_factor,
        "uses_shared_paged_kv_idx": uses_shared_paged_kv_idx, "use_fp16_softmax": use_fp16_softmax,
        "uses_spcompress": uses_spcompress,
    }  # fmt: skip
    if later:
        asked.update(later)
    check_later_arguments(op, asked)
    is_causal = causal_by_window(op, {"window_right": window_right}, checks.boolean(op, "causal", causal))
    if not isinstance(cum_seq_lens_q, torch.Tensor):
        raise checks.not_tensors(op, cum_seq_lens_q=cum_seq_lens_q)
    if isinstance(block_tables, torch.Tensor) and block_tables.dim() > 0:
        checks.require(
            len(block_tables) == batch_size, op,
            f"block_tables has shape {list(block_tables.shape)}; expected {batch_size} rows, batch_size",
        )  # fmt: skip
    kind = "causal" if is_causal else "none"
    options = Options(bmm1_scale, bmm2_scale, window_left, kv_layout, enable_pdl, 1, kind, out_dtype)
    given = Given(query, kv_cache, workspace_buffer, block_tables, seq_lens, cum_seq_lens_q, None, sinks, out, lse)
    return call(op, given, options, return_lse)
