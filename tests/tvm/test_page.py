# SPDX-License-Identifier: Apache-2.0
"""docs/tvm.md runs as it stands, block after block, and computes what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.compat import pages
from tests.oracles.attention import attention
from tests.tolerances import assert_close


def test_the_page(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in pages.programs("tvm.md"):
        exec(block, names)
    for cache, result in zip(names["layers"].transpose(3, 4), names["results"]):  # pages as rows of heads
        for i, (numbers, length) in enumerate((([4, 0], 20), ([2, 1, 5], 33))):
            k, v = (torch.cat(list(cache[numbers, half]))[:length] for half in (0, 1))
            assert_close(result[i : i + 1], attention(names["q"][i : i + 1], k, v)[0])
    sums = names["probs"][[0, 1, 1]].double().cumsum(1).cpu()
    expected = torch.searchsorted(sums, torch.tensor([[0.1], [0.9], [0.5]]).double() * sums[:, -1:]).flatten()
    assert names["tokens"].tolist() == expected.tolist()
