# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: a request's KV on several ranks, each attending to its own part, and the states merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

import torch
import torch.distributed as dist

from flashinfer.host import checks
from flashinfer.parallel.arguments import OP, PLACEMENTS, Lengths, host_lens
from flashinfer.parallel.exchange import HEADS, Pending, Result, StateBlock, exchange
from flashinfer.parallel.ranks import Ranks
from flashinfer.parallel.sharded import GraphSizes, ShardedAppend, ShardedDecode, ShardedMLA
from flashinfer.parallel.slices import InterleavedPages


class ContextParallel:
    """Attention over a KV cache of which every rank of a group has a part of each request.

    A rank plans and runs on the pages that it has, and the states are merged: every rank gets the result for all query
    heads, or for its share of them. All ranks bring the same queries, of all heads. A rank may have no key of a
    request, or none at all.

    A rank's calls come in the same order as those of the others, as with every collective. A rank that raises leaves
    the others waiting until the timeout of the group, which `init_process_group` and `new_group` take; with `check`
    they raise at once.

    Args:
        group: of torch.distributed, NCCL for GPUs; None: all ranks.
        placement: "interleaved": page p of every request is on rank p mod W. "contiguous": each rank has a run of keys
            of each request, in the order of ranks or any other.
        check: whether ranks tell each other in every `plan` and `run` that it succeeded and on what shapes. The host
            waits for that. None: on the CPU only. Never while a CUDA graph is captured.

    Raises:
        ValueError: torch.distributed is not initialized, or this rank is not of the group.
    """

    def __init__(
        self,
        group: Optional[dist.ProcessGroup] = None,
        *,
        placement: str = "interleaved",
        check: Optional[bool] = None,
    ) -> None:
        checks.require(
            placement in PLACEMENTS, OP, f"placement is {placement!r:.60}; expected one of {', '.join(PLACEMENTS)}"
        )
        self._ranks = Ranks(OP, group)
        self.placement = placement
        self._check = check

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.size

    def decode(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, graph: Optional[GraphSizes] = None
    ) -> ShardedDecode:
        """One new token a request. Arguments: of `BatchDecodeWithPagedKVCacheWrapper`; graph: makes index buffers for
        CUDA graphs of that batch size."""
        return ShardedDecode(self, float_workspace_buffer, kv_layout, graph)

    def append(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, graph: Optional[GraphSizes] = None
    ) -> ShardedAppend:
        """Several new tokens a request: drafts, chunks of a prompt. Arguments: as `decode`."""
        return ShardedAppend(self, float_workspace_buffer, kv_layout, graph)

    def mla(self, float_workspace_buffer: torch.Tensor, *, graph: Optional[GraphSizes] = None) -> ShardedMLA:
        """Latent attention, of one new token a request or several. Arguments: as `decode`."""
        return ShardedMLA(self, float_workspace_buffer, graph)

    def local_lens(self, kv_lens: Lengths, page_size: int) -> torch.Tensor:
        """How many keys of requests of these lengths this rank has where pages are interleaved: int64, on the host."""
        checks.require(
            self.placement == "interleaved", OP, "local_lens() of contiguous slices; they are as the caller cuts them"
        )
        return InterleavedPages(page_size, self.world_size, self.rank).count(host_lens("kv_lens", kv_lens))

    def merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        heads: str = "all",
        return_lse: bool = False,
        async_op: bool = False,
    ) -> Union[Result, Pending]:
        """Merge the state of this rank with those of the others, whatever computed it.

        Args:
            out: `[num_tokens, num_heads, head_dim]`, the same shape on every rank.
            lse: fp32 `[num_tokens, num_heads]`, base 2; -inf where this rank has no key.
            heads, return_lse, async_op: as in `ShardedDecode.run`.

        Returns and raises: as there.
        """
        checks.require_tensors(OP, out=out, lse=lse)
        checks.require(
            out.dim() == 3 and lse.shape == out.shape[:2] and lse.device == out.device, OP,
            f"out has shape {list(out.shape)}, lse {list(lse.shape)} on {lse.device}; expected [num_tokens, num_heads, "
            f"head_dim] and [num_tokens, num_heads] on {out.device}",
        )  # fmt: skip

        def attend(own_out: torch.Tensor, own_lse: torch.Tensor) -> None:
            own_out.copy_(out)
            own_lse.copy_(lse)

        block = StateBlock(out.shape[0], out.shape[1], out.shape[2], out.dtype)
        return self._exchange(block, out.device, attend, heads, return_lse, async_op)

    def _exchange(
        self,
        block: StateBlock,
        device: torch.device,
        attend: Callable[[torch.Tensor, torch.Tensor], None],
        heads: str,
        return_lse: bool,
        async_op: bool,
    ) -> Union[Result, Pending]:
        if self._checks(device):
            facts = {
                "num_tokens": block.num_tokens,
                "num_heads": block.num_heads,
                "head_dim": block.head_dim,
                "bytes of an element": block.dtype.itemsize,
                "the index of heads in ('all', 'own')": HEADS.index(heads) if heads in HEADS else -1,
            }
            attend = self._telling("run()", device, attend, facts)
        return exchange(self._ranks, block, device, attend, heads, return_lse, async_op)

    def _checks(self, device: torch.device) -> bool:
        if self._check is not None and not self._check:
            return False
        if device.type == "cuda":
            return bool(self._check) and not torch.cuda.is_current_stream_capturing()
        return True

    def _telling(
        self, what: str, device: torch.device, act: Callable[..., None], facts: Mapping[str, int]
    ) -> Callable[..., None]:
        """`act`, after which ranks compare how it went."""

        def told(*args: Any) -> None:
            failure: Optional[Exception] = None
            try:
                act(*args)
            except Exception as error:
                failure = error
            self._ranks.agree(what, device, failure, facts)

        return told
