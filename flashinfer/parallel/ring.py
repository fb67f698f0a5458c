# SPDX-License-Identifier: Apache-2.0
"""Prefill of one sequence whose tokens are spread over ranks: keys and values go round, queries stay (Ring Attention,
Liu et al. 2023, arXiv:2310.01889).

Under a causal mask the sequence is cut into 2 W chunks, of which rank r has r and 2 W - 1 - r, end to end: zig-zag.
With keys of its own a rank computes one causal attention over both. With keys of rank s < r, all of its queries see the
first chunk of s and none the second; of rank s > r, its second chunk sees both and the first none. Either is half of
all pairs, without a mask: the ranks have the same work in every step.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.distributed as dist

from flashinfer.attention.merge import merge_list, merge_states
from flashinfer.attention.prefill.single import prefill_into
from flashinfer.host import checks
from flashinfer.parallel.ranks import Ranks

_OP = "ring_prefill"
_MOST_STATES = 4  # kept before they are merged


def zigzag_positions(num_tokens: int, num_ranks: int, rank: int) -> torch.Tensor:
    """Which tokens of a sequence a rank of a causal ring has, in its order: int64 `[num_tokens / num_ranks]`.

    They index the sequence, and are the positions for a rotary embedding. Raises ValueError unless 2 num_ranks divides
    num_tokens; pad at the end, where no earlier query sees it.
    """
    count = checks.integer("zigzag_positions", "num_tokens", num_tokens, 0)
    checks.integer("zigzag_positions", "num_ranks", num_ranks, 1)
    checks.integer("zigzag_positions", "rank", rank, 0, num_ranks - 1)
    checks.require(
        count % (2 * num_ranks) == 0, "zigzag_positions",
        f"num_tokens is {count}; expected a multiple of {2 * num_ranks}, two chunks a rank. Next step: pad at the end",
    )  # fmt: skip
    chunk = count // (2 * num_ranks)
    positions = torch.arange(chunk)
    return torch.cat([positions + rank * chunk, positions + (2 * num_ranks - 1 - rank) * chunk])


def ring_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Optional[dist.ProcessGroup] = None,
    *,
    causal: bool = True,
    sm_scale: Optional[float] = None,
    logits_soft_cap: Optional[float] = None,
    return_lse: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Attention of one sequence over all of its tokens, of which every rank has as many.

    While a rank computes with the keys of one rank, those of the next are on their way. It keeps the keys of two ranks
    besides its own, and up to four partial outputs, which are merged at once.

    Args:
        q: `[num_tokens / W, num_qo_heads, head_dim_qk]` of this rank, as `single_prefill_with_kv_cache` takes it, but
            not fp8. With causal the tokens `zigzag_positions` names; else any share, in any order.
        k, v: `[num_tokens / W, num_kv_heads, head_dim]`, of the same tokens.
        group: of torch.distributed; None: all ranks.
        causal: a query sees keys up to its own position.
        sm_scale, logits_soft_cap: as of `single_prefill_with_kv_cache`.
        return_lse: also return the base-2 logarithm of the sum of exponentials.

    Returns:
        `[num_tokens / W, num_qo_heads, head_dim_vo]`, and fp32 `[num_tokens / W, num_qo_heads]`, of this rank's tokens.

    Raises:
        ValueError: a shape, dtype or device does not fit, or with causal an odd number of tokens.
        UnsupportedConfig: no kernel for this dtype or head_dim.
        ExchangeFailed: the exchange failed, here or on another rank.
    """
    ranks = Ranks(_OP, group)
    checks.require_tensors(_OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.require(
            x.dim() == 3 and len(x) == len(q) and x.device == q.device, _OP,
            f"{name} is {list(x.shape)} on {x.device}; expected [{len(q)}, num_heads, head_dim] on {q.device}, the "
            "tokens of q",
        )  # fmt: skip
    checks.require(
        not causal or len(q) % 2 == 0, _OP,
        f"q has {len(q)} tokens; expected an even number, the two chunks of zigzag_positions(). Next step: pad the "
        "sequence at its end",
    )  # fmt: skip
    checks.require(q.element_size() > 1, _OP, f"q is {q.dtype}; expected fp16 or bf16, or fp32 on the CPU")

    half, states = len(q) // 2, _States(q, v, min(ranks.size, _MOST_STATES))

    def attend(first: int, keys: list[torch.Tensor], mask: bool = False) -> None:
        """Of queries from the first on."""
        out, lse = states.next(first)
        options = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
        prefill_into(q[first:], keys[0], keys[1], out, lse, causal=mask, **options)

    held = [k.contiguous(), v.contiguous()]
    spare: list[torch.Tensor] = []
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        works: list[Any] = []
        arriving: list[torch.Tensor] = []
        if step + 1 < ranks.size and len(q):
            arriving = spare or [torch.empty_like(x) for x in held]
            works = _pass_on(ranks, held, arriving)
        if source == ranks.rank:
            attend(0, held, causal)
        elif not causal:
            attend(0, held)
        elif source < ranks.rank:
            attend(0, [x[:half] for x in held])
        else:
            attend(half, held)
        if works:
            with ranks.telling("ring"):
                for work in works:
                    work.wait()
            # What was sent may be written from the next step on, but for the caller's tensors.
            spare = held if step > 0 else []
            held = arriving
    out, lse = states.merged()
    return (out, lse) if return_lse else out


class _States:
    """Partial results of all queries, and behind them of those from some query on."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor, limit: int) -> None:
        rows, self._limit = q.shape[:2], limit
        self._outs = q.new_empty((limit, *rows, v.shape[-1]))
        self._lses = q.new_empty((limit, *rows), dtype=torch.float32)
        self._num = self._num_whole = self._first = 0

    def next(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the next one goes, of queries from the first on."""
        if self._num == self._limit:
            for states, one in zip((self._outs, self._lses), self.merged()):
                states[0].copy_(one)
            self._num = self._num_whole = 1
        at = self._num
        self._num += 1
        if first == 0:
            self._num_whole = self._num
        else:
            self._first = first
        return self._outs[at, first:], self._lses[at, first:]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._num == 1:
            return self._outs[0], self._lses[0]
        outs, lses = self._outs.transpose(0, 1), self._lses.transpose(0, 1)
        if self._num == self._num_whole:
            return merge_states(outs[:, : self._num], lses[:, : self._num])
        out, lse = torch.empty_like(self._outs[0]), torch.empty_like(self._lses[0])
        for rows, num in ((slice(self._first), self._num_whole), (slice(self._first, None), self._num)):
            merge_list(_OP, outs[rows, :num], lses[rows, :num], None, (out[rows], lse[rows]))
        return out, lse


def _pass_on(ranks: Ranks, held: list[torch.Tensor], arriving: list[torch.Tensor]) -> list[Any]:
    """To the next rank, while the one before sends."""
    group = ranks.group
    next_rank = dist.get_global_rank(group, (ranks.rank + 1) % ranks.size)
    last_rank = dist.get_global_rank(group, (ranks.rank - 1) % ranks.size)
    sends = [dist.P2POp(dist.isend, x, next_rank, group) for x in held]
    receives = [dist.P2POp(dist.irecv, x, last_rank, group) for x in arriving]
    with ranks.telling("ring"):
        works: list[Any] = dist.batch_isend_irecv([*sends, *receives])
    return works
