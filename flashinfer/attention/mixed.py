# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode as one batch, under the name and signature of upstream."""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer.attention.beside import MixedPlan
from flashinfer.attention.plan import NO_FUNCTIONS
from flashinfer.attention.planned import DataType, Result
from flashinfer.attention.prefill.wrapper import PrefillWrapper
from flashinfer.attention.variant import GivenScale, Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.host.paged_cache import PagedCache

_FLOAT_WORKSPACE_BYTES = 128 << 20


class BatchAttention(PrefillWrapper):
    """Attention of a batch over a paged cache in which some requests are prefilled and others decoded: one plan, and
    two launches, prefill's and behind it decode's of the requests of one query. On Hopper they run beside each other:
    one computes while the other reads.

    Plan and run may be captured in one CUDA graph, and replayed for other lengths in the same index tensors.

    Args:
        kv_layout: "NHD" (pages of `[page_size, num_kv_heads, head_dim]`) or "HND" (the two middle axes swapped).
        device: where to run; the workspaces are allocated there.
    """

    _op_name = "batch_attention"
    _index_names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    _whole_lengths = True
    _plan_class = MixedPlan

    def __init__(self, kv_layout: str = "NHD", device: Union[str, torch.device] = "cuda") -> None:
        where = torch.device(device)
        num_bytes = _FLOAT_WORKSPACE_BYTES if where.type == "cuda" else 8
        float_workspace = torch.empty(num_bytes, dtype=torch.uint8, device=where)
        super().__init__(float_workspace, kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: Optional[float] = None,
        logits_soft_cap: Optional[float] = None,
        q_data_type: DataType = torch.bfloat16,
        kv_data_type: DataType = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Args:
            qo_indptr: int32 `[batch_size + 1]`; request i owns tokens `[qo_indptr[i], qo_indptr[i + 1])` of q: one to
                decode, several to prefill. On the device (used in place) or the CPU (uploaded asynchronously), as the
                three below.
            kv_indptr: int32 `[batch_size + 1]`; request i owns `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`.
            kv_indices: int32 page numbers; may be longer than needed.
            kv_len_arr: int32 `[batch_size]`, tokens of each request in the cache.
            num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size: shapes.
            causal: query i of a request sees keys up to its own position, `kv_len - qo_len + i`.
            sm_scale: factor of q·k; default `1 / sqrt(head_dim_qk)`.
            logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
            q_data_type, kv_data_type: dtypes of q and of the cache, which run() is to be given.
            use_profiler: must be False; the kernels record no profile.

        Raises:
            ValueError, TypeError, IndexError: a shape, dtype, device or value does not fit.
            UnsupportedConfig: no kernel for these arguments.
        """
        if use_profiler:
            raise UnsupportedConfig(
                f"{self._op_name}: use_profiler is {use_profiler!r:.60}; expected False, these kernels record no "
                "profile. Next step: torch.profiler, or Nsight"
            )
        arguments = (
            "causal" if checks.boolean(self._op_name, "causal", causal) else "none", num_qo_heads, num_kv_heads,
            page_size, head_dim_qk, checks.integer(self._op_name, "head_dim_vo", head_dim_vo, 1), q_data_type,
            kv_data_type, None, (None, False), NO_FUNCTIONS,
            "NONE", -1, logits_soft_cap, sm_scale, None, None,
        )  # fmt: skip
        self._settle((qo_indptr, kv_indptr, kv_indices, kv_len_arr), arguments)

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Kept for compatibility: one kernel takes K and V of any strides, and plan() has loaded it."""
        checks.require(variant == "independent", self._op_name, f"variant is {variant!r:.60}; expected 'independent'")
        checks.require(self._plan is not None, self._op_name, "nothing is planned; call plan() first")

    def run(
        self,
        q: torch.Tensor,
        kv_cache: PagedCache,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Optional[torch.Tensor] = None,
        kv_cache_sf: Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor], None] = None,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim_qk]`, unit stride in the last axis.
            kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD; HND swaps the axes of page_size
                and heads) or a tuple (k, v) of such tensors without the axis of 2; dtype of q, or fp8.
            out: `[num_tokens, num_qo_heads, head_dim_vo]`, dtype of q; allocated when None.
            lse: fp32 `[num_tokens, num_qo_heads]`; allocated when None.
            k_scale, v_scale: factors of quantized k and v, numbers or one float32 on the device.
            logits_soft_cap: 0 for the planned one.
            profiler_buffer, kv_cache_sf: None.

        Returns:
            (out, lse), lse base 2. A query that sees no key gives zeros and -inf.

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        if profiler_buffer is not None or kv_cache_sf is not None:
            name = "kv_cache_sf" if profiler_buffer is None else "profiler_buffer"
            raise UnsupportedConfig(
                f"{self._op_name}: {name} is given; expected None. Next step: an fp8 cache, and torch.profiler"
            )
        overrides = Overrides(logits_soft_cap=logits_soft_cap) if logits_soft_cap else None
        return self._run(q, kv_cache, out, lse, True, (None, k_scale, v_scale), None, overrides)
