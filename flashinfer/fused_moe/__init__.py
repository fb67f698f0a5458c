# SPDX-License-Identifier: Apache-2.0
"""No mixture-of-experts kernels. The names that engines import as they start: flashinfer/absent.py."""

from __future__ import annotations

from flashinfer import absent

__getattr__ = absent.names_of(__name__)
