# SPDX-License-Identifier: Apache-2.0
"""Launches of the Hopper implementation of products, which finds operands by TMA descriptors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flashinfer.dtypes import ITEMSIZE
from flashinfer.families import gemm as families
from flashinfer.jit import driver
from flashinfer.jit.loader import Launcher, PreparedLaunch

_PANEL_BYTES = 128  # that the swizzle permutes: a step of the depth
_MAX_MAPS = 1024  # addresses a launch remembers: a model has a weight per layer


def bind_launch(launcher: Launcher, grid: int, values: Mapping[str, Any]) -> PreparedLaunch:
    """A launch with everything but the addresses laid out: called like one of any other implementation."""
    constants = launcher.config.constants
    size = ITEMSIZE[str(constants["T"])]
    num_rows, num_columns, depth = (int(values[name]) for name in ("num_rows", "num_columns", "depth"))
    block_m, block_n, shares = (int(constants[name]) for name in ("kBlockM", "kBlockN", "kShares"))
    # Rows that there are not would be filled with zeros, which takes as long as to bring them.
    a_rows = block_m // shares if shares > 1 else min(block_m, -(-num_rows // 8) * 8)
    launch = launcher.prepare(
        (grid, 1, 1), {**values, "a_box_rows": a_rows, "padding": b""},
        varying=("a_map", "b_map", *families.ADDRESSES),
    )  # fmt: skip
    a_axes = (depth, (num_rows, values["a_row_stride"]), (1, 0))
    weights = values["num_weights"], values["b_weight_stride"]
    if constants["kDepthMajor"]:
        b_axes, b_rows = (depth, (num_columns, values["b_row_stride"]), weights), block_n
    else:
        b_axes, b_rows = (num_columns, (depth, values["b_row_stride"]), weights), _PANEL_BYTES // size
    a_map_at = _maps(size, a_axes, a_rows)
    b_map_at = _maps(size, b_axes, b_rows)

    def launch_at(a: int, b: int, *others: int) -> None:
        launch(a_map_at(a), b_map_at(b), a, b, *others)

    return launch_at


def _maps(size: int, axes: tuple[int, tuple[int, int], tuple[int, int]], box_rows: int) -> Callable[[int], bytes]:
    """From an address to the descriptor of boxes of box_rows rows of 128 bytes.

    axes: elements of a row; rows and their stride; matrices and theirs, in elements of so many bytes.
    """
    width, *others = axes
    in_bytes = ((width * size // 2, 2), *((length, stride * size) for length, stride in others))

    @functools.lru_cache(_MAX_MAPS)
    def map_at(address: int) -> bytes:
        return driver.tensor_map_of_16_bit(address, in_bytes, (_PANEL_BYTES // 2, box_rows, 1))

    return map_at
