# SPDX-License-Identifier: Apache-2.0
"""Launches of the Hopper implementation of prefill, which finds K and V by TMA descriptors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from flashinfer.attention.tma import maps_of_rows
from flashinfer.dtypes import ITEMSIZE
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention.params import ADDRESSES, KV_STORAGE
from flashinfer.jit.loader import Launcher

_NUM_PARTS = 4  # of a KV tile that is widened: a warp's each
_K, _V = (len(families.ROWS) + ADDRESSES.index(name) for name in ("kv.k", "kv.v"))


def bind_launch(launcher: Launcher, grid_size: int, values: Mapping[str, Any], page_size: int) -> Callable[..., None]:
    """A launch with everything but the addresses laid out: called like one of any other implementation. `values`: the
    fields of PrefillParams that stay."""
    constants = launcher.config.constants
    is_paged = constants["kKvStorage"] == KV_STORAGE["paged"]
    num_heads, itemsize = values["num_kv_heads"], ITEMSIZE[str(constants["Kv"])]
    is_widened = itemsize < ITEMSIZE[str(constants["Q"])]
    most_rows = int(constants["kBlockN"]) // (_NUM_PARTS if is_widened else 1)
    box_rows = math.gcd(page_size, most_rows) if is_paged else most_rows
    if constants["kGathersKv"]:
        box_rows = 1

    launch = launcher.prepare(
        (grid_size, 1, 1),
        {**values, "box_rows": box_rows, "reserved": b""},
        varying=("k_map", "v_map", *families.ROWS, *ADDRESSES),
    )
    if constants["kGathersKv"]:
        no_map = bytes(128)
        return functools.partial(launch, no_map, no_map)

    def maps_of(half: str, head_dim: int) -> Callable[[int], bytes]:
        page, entry, head = (itemsize * values[f"kv.{half}_{axis}_stride"] for axis in ("page", "entry", "head"))
        row, pages = (entry, page) if is_paged else (page, 0)
        return maps_of_rows(head_dim * itemsize, box_rows, row, (num_heads, head), pages, swizzled=not is_widened)

    k_map_at, v_map_at = (maps_of(half, int(constants[f"kHeadDim{of}"])) for half, of in (("k", "Qk"), ("v", "Vo")))

    def launch_at(*addresses: int) -> None:
        launch(k_map_at(addresses[_K]), v_map_at(addresses[_V]), *addresses)

    return launch_at
