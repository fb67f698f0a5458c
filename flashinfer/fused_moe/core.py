# SPDX-License-Identifier: Apache-2.0
"""As the package: names that engines import as they start."""

from __future__ import annotations

from flashinfer import absent

__getattr__ = absent.names_of(__name__)
