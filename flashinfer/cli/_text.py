# SPDX-License-Identifier: Apache-2.0
"""Tables, sizes and durations for a terminal."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from flashinfer.cli import UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns padded to their widest cell, under a rule. `right` names the right-aligned columns, separated by commas.

    The last column is for long text, such as names of kernels: it is not padded and wraps without harm.
    """
    aligned_right = set(right.split(",")) if right else set()
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in aligned_right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths)
        ]
        return "  ".join(padded).rstrip()

    widths[-1] = len(header[-1])
    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def size(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} {_UNITS[-1]}"


def parse_size(text: str) -> int:
    """`1G`, `1GiB`, `500M`, `4096` -> bytes; units are powers of 1024. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"size {text!r} is not understood; expected a number with K, M, G or T, such as 500M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_since(text: str, now: float) -> float:
    """`30min`, `2h`, `7d` before now, or `2026-11-29`, `2026-11-29T03:00` in local time -> Unix time.

    Raises UsageError.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d)", text.strip())
    if match is not None:
        return now - float(match[1]) * {"min": 60, "h": 3600, "d": 86400}[match[2]]
    try:
        return datetime.datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"time {text!r} is not understood; expected an age such as 30min, 2h or 7d, or a date such as "
            "2026-11-29T03:00"
        ) from None


def ago(seconds: float) -> str:
    """`7200` -> `2 h ago`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def count(number: int, noun: str) -> str:
    """`(1, "kernel")` -> `1 kernel`; `(2, "kernel")` -> `2 kernels`; `(2, "process")` -> `2 processes`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"
