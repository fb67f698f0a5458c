# SPDX-License-Identifier: Apache-2.0
"""The batch wrappers over the pages that a rank has, and what a plan of causal queries takes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention.decode.paged import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.attention.merge import merge_state_in_place
from flashinfer.attention.mla.paged import BatchMLAPagedAttentionWrapper
from flashinfer.attention.planned import PlannedAttention
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.host import checks
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache
from flashinfer.parallel.arguments import OP, Lengths, cut_batch, page_table, refuse_positions
from flashinfer.parallel.exchange import Pending, Result, StateBlock
from flashinfer.parallel.slices import PageTable, mask_of

if TYPE_CHECKING:
    from flashinfer.parallel.context import ContextParallel


# Options of plan() that name keys or tokens of whole requests.
_MASKS = ("custom_mask", "packed_custom_mask", "prefix_len_ptr", "token_pos_in_items_ptr")


class GraphSizes(NamedTuple):
    """For CUDA graphs: the batch size, and the most that any plan brings of the rest, on this rank."""

    batch_size: int
    num_pages: int
    num_tokens: int  # queries
    page_size: int


class _Sharded(Uncopyable):
    """What the three have in common. Wrappers run one after another on the caller's stream and share a workspace."""

    def __init__(self, parallel: ContextParallel, device: torch.device) -> None:
        self._parallel, self._device = parallel, device
        self._in_use: list[PlannedAttention] = []  # by the last plan, of which the first has the sinks

    def _plan(self, act: Callable[[], list[PlannedAttention]], batch: Any) -> None:
        def plan() -> None:
            found.extend(act())

        found: list[PlannedAttention] = []
        self._in_use = []  # a plan that fails, here or on another rank, leaves none in force
        if self._parallel._checks(self._device):
            batch_size = len(batch) if isinstance(batch, torch.Tensor) and batch.dim() else 0
            self._parallel._telling("plan()", self._device, plan, {"entries of indptr": batch_size})()
        else:
            plan()
        self._in_use = found

    def _run(
        self,
        q: torch.Tensor,
        call: Callable[..., Any],
        first_only: dict[str, Any],
        heads: str,
        return_lse: bool,
        async_op: bool,
    ) -> Union[Result, Pending]:
        """call: a run of one wrapper, which takes out, lse and return_lse."""
        checks.require_tensors(OP, q=q)
        if not self._in_use or self._in_use[0]._plan is None:
            raise ValueError(f"{OP}: run() before a plan() that succeeded; call plan() with the batch's lengths first")
        checks.require(q.dim() == 3, OP, f"q has shape {list(q.shape)}; expected [num_tokens, num_heads, head_dim]")
        plan = self._in_use[0]._plan
        block = StateBlock(len(q), plan.shape.num_qo_heads, plan.shape.head_dim_vo, plan.out_dtype(q.dtype))

        def attend(out: torch.Tensor, lse: torch.Tensor) -> None:
            first, *others = self._in_use
            call(first, out=out, lse=lse, return_lse=True, **first_only)
            for wrapper in others:
                merge_state_in_place(out, lse, *call(wrapper, return_lse=True))

        return self._parallel._exchange(block, self._device, attend, heads, return_lse, async_op)


class ShardedDecode(_Sharded):
    """Decode over the pages that this rank has; made by `ContextParallel.decode`."""

    def __init__(
        self,
        parallel: ContextParallel,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        graph: Optional[GraphSizes] = None,
    ) -> None:
        buffers: dict[str, Any] = {}
        if graph is not None:
            new = _new_buffer(float_workspace_buffer)
            buffers = {
                "paged_kv_indptr_buffer": new(graph.batch_size + 1),
                "paged_kv_indices_buffer": new(graph.num_pages),
                "paged_kv_last_page_len_buffer": new(graph.batch_size),
            }
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph=graph is not None, **buffers
        )
        super().__init__(parallel, self._wrapper.device)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        """Describe this rank's part of the batch. On GPUs neither copies from the device nor waits for it.

        Args:
            indptr, indices, last_page_len: of the pages on this rank; a request may have none.
            num_qo_heads, num_kv_heads, head_dim, page_size: as of `BatchDecodeWithPagedKVCacheWrapper.plan`.
            options: others of it; windows and position encodings, which depend on positions, are not among them.

        Raises: as there, and UnsupportedConfig for an option by position.
        """
        refuse_positions(options)

        def plan() -> list[PlannedAttention]:
            shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
            self._wrapper.plan(indptr, indices, last_page_len, *shape, **options)
            return [self._wrapper]

        self._plan(plan, indptr)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *,
        heads: str = "all",
        return_lse: bool = False,
        async_op: bool = False,
        sinks: Optional[torch.Tensor] = None,
        **options: Any,
    ) -> Union[Result, Pending]:
        """Attention of one layer over all ranks' keys.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim]`, the same on every rank.
            paged_kv_cache: of this rank.
            heads: "all": every rank gets the result of all query heads; "own": rank r that of heads
                `[r * num_qo_heads / W, (r + 1) * num_qo_heads / W)`, by W / 2 times fewer bytes or better.
            return_lse: also return the base-2 logarithm of the sum of exponentials.
            async_op: return a `Pending` at once. What is launched before its `wait` runs beside the exchange.
            sinks: as of the wrapper's run, on every rank; those of rank 0 count.
            options: scales of quantized operands, enable_pdl.

        Returns:
            out, or (out, lse), or a `Pending` of them. A request without KV on any rank gives zeros and -inf.

        Raises: as the wrapper's run, ValueError for heads that do not divide, and ExchangeFailed.
        """
        first_only = {} if sinks is None or self._parallel.rank > 0 else {"sinks": sinks}
        return self._run(
            q,
            lambda wrapper, **places: wrapper.run(q, paged_kv_cache, **options, **places),
            first_only, heads, return_lse, async_op,
        )  # fmt: skip


class ShardedAppend(_Sharded):
    """Several new tokens a request over the pages that this rank has; made by `ContextParallel.append`. The new tokens'
    keys are in the ranks' caches already."""

    def __init__(
        self,
        parallel: ContextParallel,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        graph: Optional[GraphSizes] = None,
    ) -> None:
        def make() -> BatchPrefillWithPagedKVCacheWrapper:
            if graph is None:
                return BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
            new = _new_buffer(float_workspace_buffer)
            batch_size, num_pages, num_tokens, page_size = graph
            mask_bytes = num_tokens * (num_tokens + page_size) // 8 + batch_size + 1
            return BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer, kv_layout, True, new(batch_size + 1), new(batch_size + 1), new(num_pages),
                new(batch_size), new(mask_bytes).to(torch.uint8), new(batch_size + 1),
            )  # fmt: skip

        self._old, self._recent = make(), make()
        self._is_captured = graph is not None
        super().__init__(parallel, self._old.device)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = True,
        kv_lens: Optional[Lengths] = None,
        kv_starts: Optional[Lengths] = None,
        **options: Any,
    ) -> None:
        """Describe this rank's part of the batch. Waits for no device.

        Without causal, or where no query is hidden a key of this rank, that is one plan. It is one as well where the
        hidden keys are the last of their requests, as on the last rank of contiguous slices. Else two: a run then has
        one launch over the pages that all queries see and one over the rest, at most `qo_len + page_size` keys a
        request, under a custom mask.

        Args:
            qo_indptr: int32 `[batch_size + 1]`, where each request's queries start.
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: of the pages on this rank.
            causal: query i of a request stands at position `kv_len - qo_len + i` of the whole request, and sees the
                keys of all ranks up to there. Index tensors are on the CPU then.
            kv_lens: keys of each whole request, with the new ones: a tensor on the CPU, or numbers. Needed for causal.
            kv_starts: of contiguous slices: the position of this rank's first key of each request.
            options: others of `BatchPrefillWithPagedKVCacheWrapper.plan`, but windows and position encodings.

        Raises: as there, and ValueError where lengths and pages do not fit together.
        """
        refuse_positions(options, _MASKS)
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)

        def plan() -> list[PlannedAttention]:
            given = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            if not causal:
                self._old.plan(qo_indptr, *given, *shape, causal=False, **options)
                return [self._old]
            tensors = dict(zip(BatchPrefillWithPagedKVCacheWrapper._index_names, (qo_indptr, *given)))
            qo_lens, table = page_table(tensors, page_size, whole_lengths=False)
            cut = cut_batch(self._parallel, qo_lens, table, kv_lens, kv_starts, self._is_captured)
            if cut.old is None or cut.recent is None or cut.counts is None or cut.requests is None:
                self._old.plan(qo_indptr, *given, *shape, causal=cut.mask == "causal", **options)
                return [self._old]
            self._old.plan(qo_indptr, *_int32(cut.old, last=True), *shape, causal=False, **options)
            mask: dict[str, Any] = {"causal": True}
            if not cut.is_aligned:
                mask = {"custom_mask": mask_of(cut.counts, cut.recent.lens[cut.requests], self._device)}
            self._recent.plan(qo_indptr, *_int32(cut.recent, last=True), *shape, **{**options, **mask})
            return [self._old, self._recent]

        self._plan(plan, qo_indptr)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *,
        heads: str = "all",
        return_lse: bool = False,
        async_op: bool = False,
        sinks: Optional[torch.Tensor] = None,
        **options: Any,
    ) -> Union[Result, Pending]:
        """Attention of one layer over all ranks' keys. Arguments, returns and raises: as `ShardedDecode.run`."""
        first_only = {} if sinks is None or self._parallel.rank > 0 else {"sinks": sinks}
        return self._run(
            q,
            lambda wrapper, **places: wrapper.run(q, paged_kv_cache, **options, **places),
            first_only, heads, return_lse, async_op,
        )  # fmt: skip


class ShardedMLA(_Sharded):
    """Latent attention over the pages that this rank has; made by `ContextParallel.mla`. The new tokens' rows are in
    the ranks' caches already."""

    def __init__(
        self, parallel: ContextParallel, float_workspace_buffer: torch.Tensor, graph: Optional[GraphSizes] = None
    ) -> None:
        def make(batch_size: int = 0, num_pages: int = 0) -> BatchMLAPagedAttentionWrapper:
            if graph is None:
                return BatchMLAPagedAttentionWrapper(float_workspace_buffer)
            new = _new_buffer(float_workspace_buffer)
            buffers = (new(batch_size + 1), new(batch_size + 1), new(num_pages), new(batch_size))
            return BatchMLAPagedAttentionWrapper(float_workspace_buffer, True, *buffers)

        self._num_captured = None if graph is None else graph.num_tokens
        if graph is None:
            self._old, self._recent = make(), make()
        else:
            recent_pages = graph.num_tokens * (graph.num_tokens // graph.page_size + 2)
            self._old, self._recent = make(graph.batch_size, graph.num_pages), make(graph.num_tokens, recent_pages)
        super().__init__(parallel, self._old.device)

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
        q_data_type: Any,
        kv_data_type: Any,
        *,
        kv_lens: Optional[Lengths] = None,
        kv_starts: Optional[Lengths] = None,
    ) -> None:
        """Describe this rank's part of the batch. Waits for no device.

        One plan or two, as of `ShardedAppend.plan`; the second has an entry for each query here, over at most `qo_len +
        page_size` rows, which costs nothing where a token's heads fill a tile of the kernel (64 or 128).

        Args:
            kv_indptr, kv_indices: of the pages on this rank.
            kv_len_arr: int32 `[batch_size]`, rows of each request on this rank.
            causal, kv_lens, kv_starts: as of `ShardedAppend.plan`. Of one query a request, causal=False is the same and
                takes index tensors on the device.
            qo_indptr, num_heads, head_dim_ckv, head_dim_kpe, page_size, sm_scale, q_data_type, kv_data_type: as of
                `BatchMLAPagedAttentionWrapper.plan`.

        Raises: as there, and ValueError where lengths and pages do not fit together.
        """
        shape = (num_heads, head_dim_ckv, head_dim_kpe, page_size)
        options = (sm_scale, q_data_type, kv_data_type)

        def plan() -> list[PlannedAttention]:
            given = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            if not causal:
                self._old.plan(*given, *shape, False, *options)
                return [self._old]
            tensors = dict(zip(BatchMLAPagedAttentionWrapper._index_names, given))
            qo_lens, table = page_table(tensors, page_size, whole_lengths=True)
            captured = self._num_captured
            cut = cut_batch(self._parallel, qo_lens, table, kv_lens, kv_starts, captured is not None)
            if cut.old is None or cut.recent is None or cut.counts is None or cut.requests is None:
                self._old.plan(*given, *shape, cut.mask == "causal", *options)
                return [self._old]
            self._old.plan(qo_indptr, *_int32(cut.old, last=False), *shape, False, *options)
            first = (cut.old.lens // page_size)[cut.requests]
            by_token = table.pages(cut.requests, first, cut.counts)
            lens, start = by_token.lens, int(qo_indptr[0])
            ends = torch.arange(start, start + len(lens) + 1)
            if captured is not None:
                checks.require(
                    len(lens) <= captured, OP, f"qo_indptr has {len(lens)} tokens; the graph's sizes say {captured}"
                )
                more = captured - len(lens)
                pad = torch.nn.functional.pad
                lens, ends = pad(lens, (0, more)), torch.cat([ends, ends[-1:].expand(more)])
                indptr = torch.cat([by_token.indptr, by_token.indptr[-1:].expand(more)])
                by_token = PageTable(indptr, by_token.indices, lens, page_size)
            self._recent.plan(ends.int(), *_int32(by_token, last=False), *shape, False, *options)
            return [self._old, self._recent]

        self._plan(plan, qo_indptr)

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        *,
        heads: str = "all",
        return_lse: bool = False,
        async_op: bool = False,
        **options: Any,
    ) -> Union[Result, Pending]:
        """Attention of one layer over all ranks' rows. q_nope, q_pe: the same on every rank. ckv_cache, kpe_cache: of
        this rank. options: others of `BatchMLAPagedAttentionWrapper.run`. The rest: as `ShardedDecode.run`."""
        return self._run(
            q_nope,
            lambda wrapper, **places: wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache, **options, **places),
            {}, heads, return_lse, async_op,
        )  # fmt: skip


def _int32(table: PageTable, last: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index tensors of a wrapper. last: with lengths of last pages, else of requests."""
    return table.indptr.int(), table.indices.int(), (table.last_page_len if last else table.lens).int()


def _new_buffer(workspace: torch.Tensor) -> Callable[[int], torch.Tensor]:
    checks.require_tensors(OP, float_workspace_buffer=workspace)
    return lambda size: torch.zeros(size, dtype=torch.int32, device=workspace.device)
