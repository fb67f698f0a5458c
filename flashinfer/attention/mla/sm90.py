# SPDX-License-Identifier: Apache-2.0
"""Launches of the Hopper implementation of latent attention, which finds the cache by TMA descriptors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from flashinfer.attention.tma import maps_of_rows
from flashinfer.dtypes import ITEMSIZE
from flashinfer.families.attention import mla as families
from flashinfer.jit.loader import Launcher

_CKV, _KPE = (families.ADDRESSES.index(name) for name in ("kv.ckv", "kv.kpe"))


def bind_launch(launcher: Launcher, grid_size: int, values: Mapping[str, Any], page_size: int) -> Callable[..., None]:
    """A launch with everything but the addresses laid out: called like one of any other implementation. `values`: the
    fields of MlaParams that stay."""
    constants = launcher.config.constants
    box_rows, itemsize = math.gcd(page_size, int(constants["kBlockN"]) // 2), ITEMSIZE[str(constants["Kv"])]
    launch = launcher.prepare(
        (grid_size, 1, 1),
        {**values, "box_rows": box_rows, "reserved": b""},
        varying=("ckv_map", "kpe_map", *families.ADDRESSES),
    )

    if constants["kGathersKv"]:
        no_map = bytes(128)
        return functools.partial(launch, no_map, no_map)

    def maps_of(part: str, head_dim: int) -> Callable[[int], bytes]:
        page, entry = (itemsize * values[f"kv.{part}_{axis}_stride"] for axis in ("page", "entry"))
        return maps_of_rows(head_dim * itemsize, box_rows, entry, (1, 0), page)

    dim_ckv, dim_kpe = int(constants["kHeadDimCkv"]), int(constants["kHeadDimKpe"])
    ckv_map_at = maps_of("ckv", dim_ckv)
    kpe_map_at = maps_of("kpe", dim_kpe) if dim_kpe else lambda address: bytes(128)

    def launch_at(*addresses: int) -> None:
        launch(ckv_map_at(addresses[_CKV]), kpe_map_at(addresses[_KPE]), *addresses)

    return launch_at
