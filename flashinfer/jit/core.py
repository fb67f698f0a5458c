# SPDX-License-Identifier: Apache-2.0
"""Upstream's logger of builds, which SGLang sets to ERROR as it starts.

What is compiled here is said by the logger `flashinfer`, in a line each, so that an engine that silences nvcc does not
silence a stall.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("flashinfer.jit")
