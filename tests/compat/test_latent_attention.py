# SPDX-License-Identifier: Apache-2.0
"""docs/latent_attention.md runs as it stands, block after block, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.attention.mla_kit import check_scaled, unpack_rows
from tests.attention.prefill_kit import check
from tests.compat import pages
from tests.oracles.attention import attention


def test_the_page(device: torch.device, monkeypatch: Any) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in pages.programs("latent_attention.md"):
        exec(block, names)
    q, scale = names["q"], names["sm_scale"]
    cache = names["cache"].flatten(0, 1)[:, None]

    def rows(*numbers: int) -> torch.Tensor:
        return torch.cat([cache[64 * page : 64 * page + 64] for page in numbers])

    def over(q: torch.Tensor, kv: torch.Tensor, causal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(q, kv, kv[..., :512], causal=causal, sm_scale=scale)

    def joined(*states: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])

    check((names["out"], names["lse"]), joined(over(q[:1], rows(3, 0)[:100]), over(q[1:], rows(7, 1, 2, 5)[:200])))
    shared = over(q[:1], rows(3, 0)[:100]), over(q[1:], rows(3, 1, 2, 5)[:200])
    check((names["merged"], names["merged_lse"]), joined(*shared))
    chosen = [numbers[numbers >= 0].long() for numbers in names["lists"]]
    sparse = joined(*[over(query[None], cache[numbers], causal=False) for query, numbers in zip(q, chosen)])
    for result in (names["sparse"], names["same"][:, 0]):
        check((result, sparse[1].float()), sparse)
    packed = unpack_rows(names["packed"].cpu()).flatten(0, 1)[:, None].to(device)
    of_second = torch.cat([packed[64 * page : 64 * page + 64] for page in (7, 1, 2, 5)])[:200]
    of_first = torch.cat([packed[64 * 3 : 64 * 4], packed[:64]])[:100]
    check_scaled(
        (names["of_packed"], names["packed_lse"]), joined(over(q[:1], of_first), over(q[1:], of_second)), 32, device
    )
    sparse = joined(*[over(query[None], packed[numbers], causal=False) for query, numbers in zip(q, chosen)])
    check_scaled((names["from_packed"][:, 0], sparse[1].float()), sparse, 16, device)
    own = attention(names["q_own"], names["k"], names["v"], causal=True)
    check((names["of_prompt"], own[1].float()), own)
