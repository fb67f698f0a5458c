# SPDX-License-Identifier: Apache-2.0
"""Named cases as parameters of a test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch


def named(cases: Sequence[Any], *, sanitized: Collection[str]) -> list[Any]:
    """Each case under its name; those of `sanitized` are also run under compute-sanitizer, which has time for few."""
    unknown = set(sanitized) - {case.name for case in cases}
    assert not unknown, f"no such case: {sorted(unknown)}"
    marks = {name: pytest.mark.sanitizer for name in sanitized}
    return [pytest.param(case, id=case.name, marks=marks.get(case.name, ())) for case in cases]


def skip_elsewhere(case: Any, device: torch.device) -> None:
    """A case about how a GPU shares work out is one like others on a CPU, and costs it seconds."""
    if case.cuda_only and device.type == "cpu":
        pytest.skip("differs from other cases on a GPU alone")
