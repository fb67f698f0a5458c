# SPDX-License-Identifier: Apache-2.0
"""Descriptors by which TMA finds rows of KV on Hopper."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flashinfer.jit import driver

_PANEL_BYTES = 128  # that the swizzle permutes
_UNBOUNDED = 1 << 31  # of an axis whose bounds the kernel keeps itself
_MAX_MAPS = 256  # addresses a launch remembers: a serving process has a KV cache per layer


def maps_of_rows(
    row_bytes: int,
    box_rows: int,
    row_stride: int,
    heads: tuple[int, int],
    page_stride: int = 0,
    swizzled: bool = True,
) -> Callable[[int], bytes]:
    """From the address of K or V to its descriptor (csrc/attention/sm90/params.h), of boxes of box_rows rows.

    heads: how many, and their stride. Strides in bytes; page_stride 0: one page. swizzled: 128 bytes of the rows, for
    wgmma; else whole rows, as they are.
    """
    axes = (
        (row_bytes // 2, 2), (box_rows, row_stride), heads, (_UNBOUNDED if page_stride else 1, page_stride),
        (_UNBOUNDED, row_stride),
    )  # fmt: skip

    @functools.lru_cache(_MAX_MAPS)
    def map_at(address: int) -> bytes:
        # Elements of 8 bits in pairs. Before the first row: see csrc/attention/sm90/params.h. Of an empty tensor
        # nothing is read.
        start = max(address - box_rows * row_stride, 16)
        box_bytes = _PANEL_BYTES if swizzled else row_bytes
        return driver.tensor_map_of_16_bit(start, axes, (box_bytes // 2, box_rows, 1, 1, 1), swizzled)

    return map_at
