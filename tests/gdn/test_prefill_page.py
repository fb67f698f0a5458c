# SPDX-License-Identifier: Apache-2.0
"""docs/gated_delta.md runs as it stands, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.compat import pages
from tests.gdn import oracle
from tests.tolerances import assert_close


def test_the_page(device: torch.device, monkeypatch: Any) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    (program,) = pages.programs("gated_delta.md")
    exec(program, names)
    rows = [names[name] for name in ("q", "k", "v")]
    expected, states = oracle.packed_sequences(*rows, names["alpha"].log(), names["beta"], [0, 100, 300])
    assert_close(names["output"], expected)
    for actual in (names["state"], names["pool"][[3, 11]]):
        assert_close(actual.bfloat16(), states)
