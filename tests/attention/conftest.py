# SPDX-License-Identifier: Apache-2.0
"""Fixtures of attention's tests."""

from __future__ import annotations

import pytest

from tests.attention.hostile_kit import KINDS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of a planned wrapper."""
    return str(request.param)
