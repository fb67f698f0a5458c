# SPDX-License-Identifier: Apache-2.0
"""Sequences for heads, and back (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509)."""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist

from flashinfer.host import checks
from flashinfer.parallel.ranks import Ranks

_OP = "all_to_all_heads"


def all_to_all_heads(
    x: torch.Tensor, group: Optional[dist.ProcessGroup] = None, *, scatter: str = "heads"
) -> torch.Tensor:
    """Exchange a share of the tokens with all heads for all tokens with a share of the heads, or back.

    Each rank sends (W - 1) / W of its bytes. Of q, k and v each needs a call; KV heads that are fewer than ranks are
    repeated first.

    Args:
        x: with scatter="heads" `[num_tokens / W, num_heads, head_dim]`, tokens in the order of ranks, as many on each.
            With scatter="tokens" `[num_tokens, num_heads / W, head_dim]`. W is the number of ranks.
        group: of torch.distributed; None: all ranks.
        scatter: which axis is shared out: "heads" or "tokens".

    Returns:
        `[num_tokens, num_heads / W, head_dim]`, or with scatter="tokens" `[num_tokens / W, num_heads, head_dim]`;
        contiguous.

    Raises:
        ValueError: the axis does not divide by the number of ranks, or x is not of three dimensions.
        ExchangeFailed: the all-to-all failed, here or on another rank.
    """
    ranks = Ranks(_OP, group)
    checks.require_tensors(_OP, x=x)
    checks.require(scatter in ("heads", "tokens"), _OP, f"scatter is {scatter!r:.60}; expected 'heads' or 'tokens'")
    checks.require(x.dim() == 3, _OP, f"x has shape {list(x.shape)}; expected [num_tokens, num_heads, head_dim]")
    axis = 1 if scatter == "heads" else 0
    checks.require(
        x.shape[axis] % ranks.size == 0, _OP,
        f"x has {x.shape[axis]} {scatter}; expected a multiple of {ranks.size}, the number of ranks"
        + ("; repeat KV heads that are fewer" if axis else ""),
    )  # fmt: skip
    size, (num_tokens, num_heads, head_dim) = ranks.size, x.shape
    if axis:
        send = x.reshape(num_tokens, size, num_heads // size, head_dim).transpose(0, 1).contiguous()
    else:
        send = x.contiguous().view(size, num_tokens // size, num_heads, head_dim)
    receive = torch.empty_like(send)
    if x.numel() > 0:
        flat = (receive.view(-1).view(torch.uint8), send.view(-1).view(torch.uint8))
        ranks.run("all-to-all", dist.all_to_all_single, *flat)
    if axis:
        return receive.view(size * num_tokens, num_heads // size, head_dim)
    return receive.transpose(0, 1).reshape(num_tokens // size, size * num_heads, head_dim)
