"""What the wrappers over pages and over rows have in common: from the arguments of plan() to a plan, and which tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer import dtypes
from flashinfer.attention.compat import IndexBuffer
from flashinfer.attention.plan import BoundRun, Call, Plan, Shape
from flashinfer.attention.planned import DataType, Masks, PlannedAttention, Result
from flashinfer.attention.prefill.plan import PrefillPlan, RaggedKv
from flashinfer.attention.variant import Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.host.paged_cache import PagedKv


class PrefillWrapper(PlannedAttention):
    _qo_indptr_buf = IndexBuffer("qo_indptr")
    _custom_mask_buf = IndexBuffer("mask")
    _mask_indptr_buf = IndexBuffer("mask_indptr")

    @property
    def _causal(self) -> bool:
        if self._plan is None:
            raise AttributeError(f"{self._op_name}: _causal is known after plan()")
        return self._plan.mask == "causal"

    def _plan_prefill(
        self,
        given: tuple[torch.Tensor, ...],
        masks: Masks,
        causal: bool,
        sizes: tuple[int, int, int, int, Optional[int]],
        types: tuple[DataType, Optional[DataType], Optional[DataType]],
        options: tuple[Any, ...],
        disable_split_kv: bool,
        later: dict[str, Any],
    ) -> None:
        """sizes: query heads, KV heads, page size, head dimensions of q and k and of v; types: of q, KV and output;
        options: arguments of `Variant.of` after head_dim."""
        batch_size, workspaces = self._batch_size(*given), (self._int_workspace_buffer, self._float_workspace_buffer)
        is_custom = masks[0] is not None or masks[1] is not None
        mask = "custom" if is_custom else "causal" if causal else "none"
        key = (batch_size, mask, sizes, types, options, disable_split_kv, workspaces[0].data_ptr())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans.remember(
                key, self._describe(batch_size, mask, sizes, types, options, disable_split_kv, workspaces)
            )
        longest = later.get("max_token_per_sequence")
        self._settle(plan, given, -1 if longest is None else int(longest) * batch_size, masks if is_custom else None)

    def _describe(
        self,
        batch_size: int,
        mask: str,
        sizes: tuple[int, int, int, int, Optional[int]],
        types: tuple[DataType, Optional[DataType], Optional[DataType]],
        options: tuple[Any, ...],
        disable_split_kv: bool,
        workspaces: tuple[torch.Tensor, torch.Tensor],
    ) -> PrefillPlan:
        op, (num_qo_heads, num_kv_heads, page_size, head_dim_qk, head_dim_vo) = self._op_name, sizes
        q_dtype = dtypes.torch_dtype(types[0])
        kv_dtype = q_dtype if types[1] is None else dtypes.torch_dtype(types[1])
        o_dtype = q_dtype if types[2] is None else dtypes.torch_dtype(types[2])
        if o_dtype != q_dtype and q_dtype.itemsize > 1:
            raise UnsupportedConfig(
                f"{op}: o_data_type is {types[2]}; expected that of q, {q_dtype}. Next step: convert the output"
            )
        head_dims = (head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo)
        shape = Shape.of(op, batch_size, num_qo_heads, num_kv_heads, page_size, *head_dims)
        return PrefillPlan(
            op, self.device, shape, (q_dtype, kv_dtype, o_dtype), mask, Variant.of(op, head_dim_qk, *options),
            self._kv(shape, kv_dtype), workspaces, split_kv=not disable_split_kv,
        )  # fmt: skip

    def _kv(self, shape: Shape, kv_dtype: torch.dtype) -> Union[PagedKv, RaggedKv]:
        raise NotImplementedError

    forward: Callable[..., Result]

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Result:
        """`forward(..., return_lse=True)`."""
        return self.forward(*args, return_lse=True, **kwargs)

    # Which tile. Under use_cuda_graph the first run decides for all: a plan cannot know which of the captured runs, of
    # more or fewer tokens, will be replayed on it.

    def _expect_short_queries(self, plan: Plan, num_tokens: int) -> bool:
        """A guess where qo_indptr is on the device: what the last run had. A run that finds it wrong plans again, for
        which a capture needs the other kernel loaded already."""
        assert isinstance(plan, PrefillPlan)
        as_before = self._last_run is not None and self._last_run.short_queries
        if self._seen is not None:
            return as_before
        expected = plan.is_short(num_tokens, as_before)
        if self._use_cuda_graph and num_tokens < 0 and self.device.type == "cuda":
            plan.extent(not expected)
        return expected

    def _bind(self, plan: Plan, call: Call) -> BoundRun:
        assert isinstance(plan, PrefillPlan)
        if self._seen is not None and self._last_run is not None:
            return plan.bind(call, self._last_run.short_queries)
        return plan.bind(call, plan.is_short(call.q.shape[0]) if call.q.dim() else False)
