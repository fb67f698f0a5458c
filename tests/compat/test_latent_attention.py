"""docs/latent_attention.md runs as it stands, block after block, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

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
    own = attention(names["q_own"], names["k"], names["v"], causal=True)
    check((names["of_prompt"], own[1].float()), own)
