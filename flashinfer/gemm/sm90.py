# SPDX-License-Identifier: Apache-2.0
"""Launches of the Hopper implementation of products, which finds operands by TMA descriptors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from flashinfer.dtypes import ITEMSIZE
from flashinfer.families import gemm as families
from flashinfer.jit import driver
from flashinfer.jit.loader import Launcher, PreparedLaunch

_PANEL_BYTES = 128  # that the swizzle permutes: a step of the depth
_STORED_ROWS = 16  # a warp's, in a box of the output
_SCALE_ROWS = 128  # at most, in a box of scales
_NO_MAP = bytes(driver.TENSOR_MAP_BYTES)
_MAX_MAPS = 1024  # addresses a launch remembers: a model has a weight per layer


def bind_launch(launcher: Launcher, grid: int, values: Mapping[str, Any]) -> PreparedLaunch:
    """A launch with everything but the addresses laid out: called like one of any other implementation."""
    constants = launcher.config.constants
    size = ITEMSIZE[str(constants["T"])]
    num_rows, num_columns, depth = (int(values[name]) for name in ("num_rows", "num_columns", "depth"))
    block_m, block_n, shares = (int(constants[name]) for name in ("kBlockM", "kBlockN", "kShares"))
    # Rows that there are not would be filled with zeros, which takes as long as to bring them.
    a_rows = block_m // shares if shares > 1 else min(block_m, -(-num_rows // 8) * 8)

    def prepare(has_a_scale_map: bool) -> PreparedLaunch:
        of_tile: dict[str, Any] = {"a_box_rows": a_rows, "has_a_scale_map": int(has_a_scale_map), "padding": b""}
        varying = ("a_map", "b_map", "output_map", "a_scale_map", *families.ADDRESSES)
        return launcher.prepare((grid, 1, 1), {**values, **of_tile}, varying=varying)

    a_axes = (depth, (num_rows, values["a_row_stride"]), (1, 0))
    weights = values["num_weights"], values["b_weight_stride"]
    if constants["kDepthMajor"]:
        b_axes, b_rows = (depth, (num_columns, values["b_row_stride"]), weights), block_n
    else:
        b_axes, b_rows = (num_columns, (depth, values["b_row_stride"]), weights), _PANEL_BYTES // size
    a_map_at = _maps(size, a_axes, a_rows)
    b_map_at = _maps(size, b_axes, b_rows)
    output_map_at = _maps(2, (num_columns, (num_rows, values["output_row_stride"]), (1, 0)), _STORED_ROWS)
    scale_map_at = _scale_maps(values, min(block_m, _SCALE_ROWS)) if constants["kScaleColumns"] else None
    launch, launch_with_scale_map = prepare(False), prepare(True)

    def launch_at(a: int, b: int, a_scale: int, *others: int) -> None:
        maps = a_map_at(a), b_map_at(b), output_map_at(others[-1])
        if scale_map_at is not None and a_scale % 16 == 0:
            launch_with_scale_map(*maps, scale_map_at(a_scale), a, b, a_scale, *others)
        else:
            launch(*maps, _NO_MAP, a, b, a_scale, *others)

    return launch_at


def _scale_maps(values: Mapping[str, Any], box_rows: int) -> Optional[Callable[[int], bytes]]:
    """The same of scales of a, in boxes of one block of the depth; None where rows are no neighbours in memory, or
    blocks do not lie at multiples of 16 bytes."""
    num_rows, num_blocks = int(values["num_rows"]), -(-int(values["depth"]) // families.SCALE_BLOCK)
    row_stride, block_stride = int(values["a_scale_row_stride"]), int(values["a_scale_block_stride"])
    if (num_rows > 1 and row_stride != 1) or (num_blocks > 1 and (block_stride % 4 or block_stride < num_rows)):
        return None
    return _maps_of(((2 * num_rows, 2), (num_blocks, 4 * block_stride), (1, 0)), (2 * box_rows, 1, 1), swizzled=False)


def _maps(size: int, axes: tuple[int, tuple[int, int], tuple[int, int]], box_rows: int) -> Callable[[int], bytes]:
    """From an address to the descriptor of boxes of box_rows rows of 128 bytes.

    axes: elements of a row; rows and their stride; matrices and theirs, in elements of so many bytes.
    """
    width, *others = axes
    in_bytes = ((width * size // 2, 2), *((length, stride * size) for length, stride in others))
    return _maps_of(in_bytes, (_PANEL_BYTES // 2, box_rows, 1))


def _maps_of(axes: Sequence[tuple[int, int]], box: Sequence[int], swizzled: bool = True) -> Callable[[int], bytes]:
    """From an address to the descriptor, of axes and boxes as `driver.tensor_map_of_16_bit` has them."""

    @functools.lru_cache(_MAX_MAPS)
    def map_at(address: int) -> bytes:
        return driver.tensor_map_of_16_bit(address, axes, box, swizzled)

    return map_at
