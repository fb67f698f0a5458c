# SPDX-License-Identifier: Apache-2.0
"""What the wrappers over pages and over rows have in common: from the arguments of plan() to a plan, and which tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention.compat import IndexBuffer, causal_by_window, check_later_arguments
from flashinfer.attention.items import Items, items_of
from flashinfer.attention.plan import Shape, dtype_of, planned_functions
from flashinfer.attention.planned import DataType, Masks, PlannedAttention, Result
from flashinfer.attention.prefill.plan import PrefillPlan, RaggedKv, fixed_split
from flashinfer.attention.variant import Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.host.paged_cache import PagedKv


class PrefillArguments(NamedTuple):
    """What plan() of every prefill wrapper hands on, in this order; as a plain tuple, which is faster to make."""

    mask: str
    num_qo_heads: int
    num_kv_heads: int
    page_size: int
    head_dim_qk: int
    head_dim_vo: Optional[int]
    q_data_type: DataType
    kv_data_type: Optional[DataType]
    o_data_type: Optional[DataType]
    splitting: tuple[Optional[int], bool]  # fixed_split_size, disable_split_kv
    functions: tuple[Any, Any]  # variant, mask
    pos_encoding_mode: str
    window_left: int
    logits_soft_cap: Optional[float]
    sm_scale: Optional[float]
    rope_scale: Optional[float]
    rope_theta: Optional[float]


class PrefillWrapper(PlannedAttention):
    """Over pages, unless a subclass says otherwise."""

    _roles: tuple[str, ...] = ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
    _qo_indptr_buf = IndexBuffer("qo_indptr")
    _custom_mask_buf = IndexBuffer("mask")
    _mask_indptr_buf = IndexBuffer("mask_indptr")
    _plan_class: type[PrefillPlan] = PrefillPlan
    _sinks: Optional[torch.Tensor] = None  # which vLLM assigns, for runs that bring none

    @property
    def _causal(self) -> bool:
        if self._plan is None:
            raise AttributeError(f"{self._op_name}: _causal is known after plan()")
        return self._plan.mask == "causal"

    def _mask_of(
        self,
        custom_mask: Optional[torch.Tensor],
        packed_custom_mask: Optional[torch.Tensor],
        causal: bool,
        later: dict[str, Any],
    ) -> tuple[str, Union[Masks, Items, None]]:
        """The kind of mask that arguments of plan() ask for, and what says which bits it has."""
        is_masked = custom_mask is not None or packed_custom_mask is not None
        if later:
            items = items_of(self._op_name, later, is_masked, self._use_cuda_graph)
            causal = causal_by_window(self._op_name, later, causal)
            check_later_arguments(self._op_name, later)
            if items is not None:
                return "items", items
        if is_masked:
            return "custom", (custom_mask, packed_custom_mask)
        return "causal" if causal else "none", None

    def _describe(
        self, batch_size: int, workspaces: tuple[torch.Tensor, torch.Tensor], arguments: tuple[Any, ...]
    ) -> PrefillPlan:
        op, given = self._op_name, PrefillArguments(*arguments)
        q_dtype = dtype_of(op, "q_data_type", given.q_data_type)
        kv_dtype = q_dtype if given.kv_data_type is None else dtype_of(op, "kv_data_type", given.kv_data_type)
        o_dtype = q_dtype if given.o_data_type is None else dtype_of(op, "o_data_type", given.o_data_type)
        if o_dtype != q_dtype and q_dtype.itemsize > 1:
            raise UnsupportedConfig(
                f"{op}: o_data_type is {given.o_data_type}; expected that of q, {q_dtype}. Next step: convert the "
                "output"
            )
        shape = Shape.of(
            op, batch_size, given.num_qo_heads, given.num_kv_heads, given.page_size, given.head_dim_qk,
            given.head_dim_qk if given.head_dim_vo is None else given.head_dim_vo,
        )  # fmt: skip
        variant = Variant.of(
            op, given.head_dim_qk, given.pos_encoding_mode, given.window_left, given.logits_soft_cap, given.sm_scale,
            given.rope_scale, given.rope_theta, has_sinks=self._has_sinks,
            functions=planned_functions(op, given.functions, shape, self.device),
        )  # fmt: skip
        split_size, is_unsplit = given.splitting
        plan = self._plan_class(
            op, self.device, shape, (q_dtype, kv_dtype, o_dtype), given.mask, variant, self._kv(shape, kv_dtype),
            workspaces=workspaces, split_kv=not is_unsplit,
            fixed_split=fixed_split(op, shape.page_size, given.splitting), whole_lengths=self._whole_lengths,
        )  # fmt: skip
        plan.splitting = (-1 if split_size is None else split_size, bool(is_unsplit))
        return plan

    def _kv(self, shape: Shape, kv_dtype: torch.dtype) -> Union[PagedKv, RaggedKv]:
        return shape.pages(self._kv_layout, kv_dtype)

    forward: Callable[..., Result]

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Result:
        """`forward(..., return_lse=True)`."""
        return self.forward(*args, return_lse=True, **kwargs)
