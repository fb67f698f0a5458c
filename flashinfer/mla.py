# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: queries over a cache of latent rows. What needs attention alone is in
flashinfer/attention/mla/.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer.attention import workspace
from flashinfer.attention.lengths import FixedBuffers
from flashinfer.attention.mla.paged import BatchMLAPagedAttentionWrapper
from flashinfer.attention.mla.sparse import sparse_mla_decode, sparse_mla_prefill
from flashinfer.attention.planned import DataType, Result
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, traced
from flashinfer.host.handles import Uncopyable
from flashinfer.host.uploads import upload
from flashinfer.page import get_seq_lens
from flashinfer.rope import apply_rope_pos_ids

__all__ = [
    "BatchDecodeMlaWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "sparse_mla_decode",
    "sparse_mla_prefill",
]


class BatchDecodeMlaWithPagedKVCacheWrapper(Uncopyable):
    """Decode by multi-head latent attention, with rotary embedding of q_pe on the fly.

    `BatchMLAPagedAttentionWrapper` behind the arguments of upstream 0.2.5. `run` turns q_pe to the position of its
    token, the last of its request, in a kernel ahead of the attention; kpe rows are in the cache turned already. Pairs
    of neighbouring elements turn together (`interleave=True` of `apply_rope`), as in DeepSeek's models.

    Args:
        float_workspace_buffer: as of `BatchMLAPagedAttentionWrapper`.
        use_cuda_graph: keep index tensors in the three buffers below, whose addresses a graph may hold.
        use_tensor_cores: accepted for compatibility.
        paged_kv_indptr_buffer: int32 `[batch_size + 1]`. Fixes the batch size.
        paged_kv_indices_buffer: int32, as long as the longest list of pages.
        paged_kv_last_page_len_buffer: int32 `[batch_size]`.
    """

    _op_name = "batch_decode_mla"

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Optional[torch.Tensor] = None,
        paged_kv_indices_buffer: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buffer: Optional[torch.Tensor] = None,
    ) -> None:
        self._use_tensor_cores = use_tensor_cores
        self._last_page_len_buffer = paged_kv_last_page_len_buffer
        buffers: dict[str, Any] = {}
        if use_cuda_graph:
            workspace.require_workspace(self._op_name, float_workspace_buffer)
            device, like = float_workspace_buffer.device, paged_kv_last_page_len_buffer
            FixedBuffers(self._op_name, device, {"paged_kv_last_page_len_buffer": like})  # checks it
            batch_size = 0 if like is None else like.numel()
            buffers = {
                "qo_indptr": torch.empty(batch_size + 1, dtype=torch.int32, device=device),
                "kv_indptr": paged_kv_indptr_buffer,
                "kv_indices": paged_kv_indices_buffer,
                "kv_len_arr": torch.empty(batch_size, dtype=torch.int32, device=device),
            }
        self._attention = _Attention(float_workspace_buffer, use_cuda_graph, **buffers)
        self._positions: Optional[torch.Tensor] = None
        self._pe_shape = (0, 0, 0)
        self._rotation = (1.0, 1e4)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._attention.is_cuda_graph_enabled

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        self._attention.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        head_dim_compressed_kv: int,
        page_size: int,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        data_type: DataType = "float16",
        q_data_type: Optional[DataType] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Args:
            indptr: int32 `[batch_size + 1]`; request i owns `indices[indptr[i]:indptr[i + 1]]`. On the device, or on
                the CPU; all three on one.
            indices: int32 page numbers; may be longer than needed.
            last_page_len: int32 `[batch_size]`, entries in use of each request's last page, 1 to page_size.
            num_qo_heads, head_dim_compressed_kv, page_size: shapes; the rotary part has 64 elements.
            sm_scale: factor of the logits.
            window_left, logits_soft_cap: -1, and None or 0; latent attention has neither here.
            data_type, q_data_type: dtypes of the cache and of q (default the same).
            rope_scale, rope_theta: of the rotation; default 1 and 1e4.

        Raises:
            ValueError: a shape, dtype or device does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        op, attention = self._op_name, self._attention
        for name, value, neutral in (("window_left", window_left, -1), ("logits_soft_cap", logits_soft_cap, 0.0)):
            number = neutral if value is None else checks.real(op, name, value)
            if number > neutral:
                raise UnsupportedConfig(f"{op}: {name} is {value!r:.60}; expected {neutral}, latent attention has none")
        rotation = (
            1.0 if rope_scale is None else checks.real(op, "rope_scale", rope_scale, above=0.0),
            1e4 if rope_theta is None else checks.real(op, "rope_theta", rope_theta, above=0.0),
        )
        checks.require_tensors(op, indptr=indptr, last_page_len=last_page_len)
        checks.require(
            indptr.shape == (last_page_len.numel() + 1,),
            op,
            f"indptr has shape {list(indptr.shape)}; expected [{last_page_len.numel() + 1}] beside last_page_len of "
            f"shape {list(last_page_len.shape)}",
        )
        lengths = get_seq_lens(indptr, last_page_len, page_size)
        qo_indptr = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        attention.plan(
            qo_indptr, indptr, indices, lengths, num_qo_heads, head_dim_compressed_kv, _HEAD_DIM_KPE, page_size, False,
            sm_scale, data_type if q_data_type is None else q_data_type, data_type,
        )  # fmt: skip
        held = attention._kv_len_arr_buf
        if attention.is_cuda_graph_enabled and self._positions is not None:
            torch.sub(held, 1, out=self._positions)  # a graph holds its address
        else:
            self._positions = held - 1
        if self._last_page_len_buffer is not None and self.is_cuda_graph_enabled:
            self._last_page_len_buffer.copy_(upload(last_page_len, held.device), non_blocking=True)
        self._rotation, self._pe_shape = rotation, (len(lengths), attention._num_heads, _HEAD_DIM_KPE)

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        paged_ckv_cache: torch.Tensor,
        paged_kpe_cache: torch.Tensor,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q_nope: `[batch_size, num_qo_heads, head_dim_compressed_kv]`.
            q_pe: `[batch_size, num_qo_heads, 64]`, not rotated; is left as it is.
            paged_ckv_cache, paged_kpe_cache: as of `BatchMLAPagedAttentionWrapper.run`.
            q_scale, k_scale, v_scale: factors of quantized q and of the cache, as keys and as values.
            out, lse, return_lse, enable_pdl: as there.

        Returns:
            out, or (out, lse). A request without KV gives zeros and -inf.

        Raises:
            ValueError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        positions, kv = self._positions, (paged_ckv_cache, paged_kpe_cache)
        if positions is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        if not traced.is_dynamo_compiling():
            checks.require_tensors(self._op_name, q_nope=q_nope, q_pe=q_pe)
            checks.require(
                q_pe.shape == self._pe_shape,
                self._op_name,
                f"q_pe has shape {list(q_pe.shape)}; planned for {list(self._pe_shape)}",
            )
        turned = apply_rope_pos_ids(q_pe, q_pe[:, :0], positions, None, True, *self._rotation)[0]
        scales = (q_scale, k_scale, v_scale)
        return self._attention._run(q_nope, kv, out, lse, return_lse, scales, enable_pdl, None, turned)

    def run_return_lse(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        paged_ckv_cache: torch.Tensor,
        paged_kpe_cache: torch.Tensor,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        enable_pdl: Optional[bool] = None,
    ) -> Result:
        """`run(..., return_lse=True)`."""
        return self.run(
            q_nope, q_pe, paged_ckv_cache, paged_kpe_cache, q_scale, k_scale, v_scale, out, lse, True, enable_pdl
        )


_HEAD_DIM_KPE = 64


class _Attention(BatchMLAPagedAttentionWrapper):
    """Under the name of its caller."""

    _op_name = BatchDecodeMlaWithPagedKVCacheWrapper._op_name

    @property
    def _num_heads(self) -> int:
        assert self._plan is not None
        return self._plan.shape.num_qo_heads
