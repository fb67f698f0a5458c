# SPDX-License-Identifier: Apache-2.0
"""docs/gated_delta_decode.md runs as it stands, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.compat import pages
from tests.gdn.test_decode import Tokens, assert_rule
from tests.oracles.conv import causal_conv1d
from tests.oracles.norm import gated_rmsnorm
from tests.tolerances import assert_close


def test_the_page(device: torch.device, monkeypatch: Any) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    one, drafts, around = pages.programs("gated_delta_decode.md")

    def tokens() -> Tokens:
        return Tokens(*(names[name] for name in Tokens._fields))

    exec(one, names)
    before = names["pool"].clone()
    zero = torch.zeros_like(before[0])
    for request, slot in ((0, 5), (2, 2)):
        rule = tokens().expect(request, zero)
        assert_rule(names["out"][request], rule.output)
        assert_rule(before[slot], rule.final_state)
    exec(drafts, names)
    for request, slot, accepted in ((0, 5, 2), (2, 2, 4)):
        rule = tokens().expect(request, before[slot])
        assert_rule(names["out"][request], rule.output)
        assert_rule(names["pool"][slot], rule.states[accepted])

    drafted = names["out"]
    exec(around, names)
    weight, states = names["weight"], names["conv_states"]
    prompt, steps = names["prompt"], names["step"]
    for request, slot, begin, end in ((0, 5, 0, 5), (2, 2, 5, 12)):
        expected, inputs = causal_conv1d(prompt[begin:end], weight, None, None, True)
        assert_close(names["prompt_rows"][begin:end], expected)
        expected, inputs = causal_conv1d(steps[request : request + 1], weight, None, inputs[-3:], True)
        assert_close(names["step_rows"][request], expected[0])
        assert torch.equal(states[slot].T.cpu().double(), inputs[-3:])
    assert_close(names["gated"], gated_rmsnorm(drafted, names["gate"], names["norm_weight"], 1e-6))
