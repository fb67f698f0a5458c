# SPDX-License-Identifier: Apache-2.0
"""Latent attention over a paged cache."""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer.attention.compat import IndexBuffer, check_later_arguments
from flashinfer.attention.mla.plan import MlaPlan
from flashinfer.attention.plan import Plan, Shape, dtype_of
from flashinfer.attention.planned import DataType, PlannedAttention, Result
from flashinfer.attention.variant import Variant, require_positive
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks


class BatchMLAPagedAttentionWrapper(PlannedAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) of a batch over a paged cache, with the projections
    of keys and values absorbed: every query head attends to one row of 512 + 64 elements a token, whose first 512 are
    the values too.

        logit = sm_scale * (q_nope · ckv + q_pe · kpe)          out = softmax(logit) ckv

    One wrapper for decode, several tokens a request (speculative decoding) and chunked prefill: query i of a request
    stands at position `kv_len - qo_len + i`, and the new tokens' rows are in the cache already.

    With use_cuda_graph plan and run may both be captured, and a captured run may be replayed after planning other
    lengths for the same batch size: give padding requests no tokens and no KV.

    Args:
        float_workspace_buffer: scratch memory on the device to run on, for partial results of long KV under few
            queries; 128 MB suffice for every common shape. Wrappers that run on one stream may share it. A CPU tensor
            of any size makes this a wrapper for the CPU.
        use_cuda_graph: keep index tensors in the buffers below, whose addresses a graph may hold.
        qo_indptr, kv_indptr: int32 `[batch_size + 1]`. They fix the batch size.
        kv_indices: int32, as long as the longest list of pages.
        kv_len_arr: int32 `[batch_size]`.
        backend: accepted for compatibility.
    """

    _op_name = "batch_mla_paged"
    _index_names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    _roles = ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
    _whole_lengths = True
    _operands = ("q_nope", "ckv_cache", "kpe_cache")
    _planned_arguments: tuple[Any, ...] = ()  # of `_describe`, by the last plan
    _qo_indptr_buf = IndexBuffer("qo_indptr")
    _kv_indptr_buf = IndexBuffer("kv_indptr")
    _kv_indices_buf = IndexBuffer("kv_indices")
    _kv_len_arr_buf = IndexBuffer("last_page_len")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Optional[torch.Tensor] = None,
        kv_indptr: Optional[torch.Tensor] = None,
        kv_indices: Optional[torch.Tensor] = None,
        kv_len_arr: Optional[torch.Tensor] = None,
        backend: str = "auto",
    ) -> None:
        buffers = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr}
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph, buffers, backend=backend)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: DataType,
        kv_data_type: DataType,
        use_profiler: bool = False,
        **later: Any,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Args:
            qo_indptr: int32 `[batch_size + 1]`; request i owns tokens `[qo_indptr[i], qo_indptr[i + 1])` of q. On the
                device (used in place) or the CPU (uploaded asynchronously), as the three below.
            kv_indptr: int32 `[batch_size + 1]`; request i owns `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`.
            kv_indices: int32 page numbers; may be longer than needed, and requests may share pages.
            kv_len_arr: int32 `[batch_size]`, tokens of each request in the cache; 0 for one without KV.
            num_heads: query heads, of this rank: any number.
            head_dim_ckv, head_dim_kpe: elements of the latent part of a row and of its rotary part: 512 or 256, and 64
                or 0.
            page_size: tokens of a page, any number.
            causal: query i sees keys up to its own position.
            sm_scale: factor of the logits. Of DeepSeek's models 1 / sqrt(128 + 64), times what YaRN asks for.
            q_data_type, kv_data_type: dtypes of q (and of the output) and of the cache: the same, or a cache of fp8
                e4m3. fp16 or bf16; fp32 on the CPU. `torch.uint8`, under bf16 and 512 + 64: rows of 656 bytes as
                DeepSeek-V3.2 stores them (vLLM's fp8_ds_mla), 512 elements of e4m3, float32 scales of each 128 of them,
                64 elements of bf16.
            use_profiler: must be False; the kernels record no profile.
            later: what later releases added, as far as it asks for nothing that is not here (compat.py).

        Raises:
            ValueError: a shape, dtype or device does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        if later:
            check_later_arguments(self._op_name, later)
        if use_profiler:
            raise UnsupportedConfig(
                f"{self._op_name}: use_profiler is {use_profiler!r:.60}; expected False, these kernels record no "
                "profile. Next step: torch.profiler, or Nsight"
            )
        arguments = (num_heads, head_dim_ckv, head_dim_kpe, page_size), causal, sm_scale, (q_data_type, kv_data_type)
        self._settle((qo_indptr, kv_indptr, kv_indices, kv_len_arr), arguments)
        self._planned_arguments = arguments

    begin_forward = plan

    def _describe(
        self,
        batch_size: int,
        workspaces: tuple[torch.Tensor, torch.Tensor],
        arguments: tuple[tuple[int, int, int, int], bool, float, tuple[DataType, DataType]],
    ) -> MlaPlan:
        """arguments: query heads, head dimensions of ckv and kpe, page size; causal, sm_scale; types of q and cache."""
        sizes, causal, sm_scale, types = arguments
        op, (num_heads, head_dim_ckv, head_dim_kpe, page_size) = self._op_name, sizes
        dim_ckv = checks.integer(op, "head_dim_ckv", head_dim_ckv, 1)
        dim_qk = dim_ckv + checks.integer(op, "head_dim_kpe", head_dim_kpe, 0)
        shape = Shape.of(op, batch_size, num_heads, 1, page_size, dim_qk, dim_ckv)
        mask = "causal" if checks.boolean(op, "causal", causal) else "none"
        variant = Variant.of(op, dim_qk, sm_scale=require_positive(op, "sm_scale", sm_scale))
        q_dtype, kv_dtype = dtype_of(op, "q_data_type", types[0]), dtype_of(op, "kv_data_type", types[1])
        return MlaPlan(op, self.device, shape, (q_dtype, kv_dtype), mask, variant, workspaces)

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: Optional[torch.Tensor] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        profiler_buffer: Optional[torch.Tensor] = None,
        kv_len: Optional[torch.Tensor] = None,
        page_table: Optional[torch.Tensor] = None,
        return_lse_base_on_e: bool = False,
        o_scale: Optional[float] = None,
        *,
        ckv_scale: Optional[float] = None,
        kpe_scale: Optional[float] = None,
        enable_pdl: Optional[bool] = None,
        **later: Any,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q_nope: `[num_tokens, num_heads, head_dim_ckv]`, queries after the absorbed projection; unit stride in the
                last axis, as all.
            q_pe: `[num_tokens, num_heads, head_dim_kpe]`, rotated already.
            ckv_cache, kpe_cache: `[num_pages, page_size, head_dim_ckv]` and `[…, head_dim_kpe]`, usually views of one
                row of 576: any strides over rows. What lies in entries no request uses is never read into a result, NaN
                included. Without a rotary part q_pe and kpe_cache have no columns. Of rows of 656 bytes, ckv_cache is
                uint8 `[num_pages, page_size, 656]`, at multiples of 16 bytes, and kpe_cache None.
            out: `[num_tokens, num_heads, head_dim_ckv]`, dtype of q; allocated when None.
            lse: fp32 `[num_tokens, num_heads]`; allocated when None and return_lse.
            return_lse: also return the base-2 logarithm of the sum of exponentials.
            ckv_scale, kpe_scale: factor of a quantized cache without scales of its own; kpe_scale None or the same.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
            profiler_buffer, kv_len, page_table, return_lse_base_on_e, o_scale: of upstream's other backends; leave them
                out.
            later: as in `plan`.

        Returns:
            out, or (out, lse). A query that sees no key gives zeros and -inf.

        Raises:
            ValueError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        if later or return_lse_base_on_e or not (profiler_buffer is kv_len is page_table is o_scale is None):
            _refuse(self._op_name, (profiler_buffer, kv_len, page_table, return_lse_base_on_e or None, o_scale), later)
        if kpe_scale is not None and kpe_scale is not ckv_scale:
            self._require_one_scale(ckv_scale, kpe_scale)
        scales = (None, ckv_scale, ckv_scale)
        if kpe_cache is None and isinstance(self._plan, MlaPlan) and self._plan.has_scaled_rows:
            kpe_cache = ckv_cache
        kv: Any = ckv_cache, kpe_cache
        return self._run(q_nope, kv, out, lse, return_lse, scales, enable_pdl, None, q_pe)

    def _require_one_scale(self, ckv_scale: object, kpe_scale: object) -> None:
        given = [1.0 if scale is None else scale for scale in (ckv_scale, kpe_scale)]
        if not all(isinstance(scale, (int, float)) for scale in given) or given[0] != given[1]:
            raise UnsupportedConfig(
                f"{self._op_name}: ckv_scale is {ckv_scale!r:.60}, kpe_scale {kpe_scale!r:.60}; expected one number "
                "for both parts of a row. Next step: multiply q_pe by kpe_scale / ckv_scale"
            )

    # ------------------------------------------------------------------------------------------- what engines reach for

    @property
    def _causal(self) -> bool:
        if self._plan is None:
            raise AttributeError(f"{self._op_name}: _causal is known after plan()")
        return self._plan.mask == "causal"

    @_causal.setter
    def _causal(self, value: bool) -> None:
        if value != self._causal:
            raise UnsupportedConfig(
                f"{self._op_name}: _causal was planned as {self._causal} and cannot be assigned; got {value!r:.60}. "
                "Next step: call plan() with it"
            )

    def _planner_arguments(self, plan: Plan) -> tuple[int, str, tuple[Any, ...]]:
        return 6, "heads, head_dim_ckv and causal", (plan.shape.num_qo_heads, plan.shape.head_dim_vo, self._causal)

    def _plan_by_engine(self, arguments: tuple[Any, ...]) -> None:
        qo_indptr, kv_indptr, kv_len_arr = arguments[3:6]  # on the host; of the buffers only that of pages is filled
        self._settle((qo_indptr, kv_indptr, self._buffer("kv_indices"), kv_len_arr), self._planned_arguments)


_BACKEND_ARGUMENTS = {
    "profiler_buffer": ("these kernels record no profile", "leave it out"),
    "kv_len": ("lengths are planned", "pass kv_len_arr to plan()"),
    "page_table": ("page numbers are planned", "pass kv_indptr and kv_indices to plan()"),
    "return_lse_base_on_e": ("the LSE is base 2", "multiply it by ln(2)"),
    "o_scale": ("the output is not quantized", "scale it afterwards"),
}


def _refuse(op: str, asked: tuple[object, ...], later: dict[str, Any]) -> None:
    for (name, (why, next_step)), value in zip(_BACKEND_ARGUMENTS.items(), asked):
        if value is not None:
            raise UnsupportedConfig(f"{op}: run() does not take {name}: {why}. Next step: {next_step}")
    check_later_arguments(op, later)
