# SPDX-License-Identifier: Apache-2.0
"""docs/matrix_products.md runs as it stands, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.compat import pages
from tests.oracles import gemm as oracle
from tests.tolerances import assert_close


def test_the_page(device: torch.device, monkeypatch: Any) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for program in pages.programs("matrix_products.md"):
        exec(program, names)
    x, y = names["x"], names["y"]
    assert_close(y, oracle.segments(x, names["adapters"], [0, 100, 101, 300], [4, 0, 4], torch.zeros_like(y)))
    values, scale = oracle.quantized(x)
    weight = oracle.dequantized(names["weight"], names["weight_scale"]).cpu()
    # An element halfway between two of 8 bits falls to either.
    assert_close(names["projected"], values * scale.repeat_interleave(128, 1) @ weight.T, scale=2.0)
