"""docs/gated_delta_decode.md runs as it stands, and computes what it says."""

from __future__ import annotations

from typing import Any

import torch

from tests.compat import pages
from tests.gdn.test_decode import Tokens, assert_rule


def test_the_page(device: torch.device, monkeypatch: Any) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    one, drafts = pages.programs("gated_delta_decode.md")

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
