"""A name and not a module: see IMPORTED_ONLY in flashinfer/absent.py."""

from __future__ import annotations

import sys

from flashinfer import absent

sys.modules[__name__] = absent.kernel(__name__)  # type: ignore[assignment]
