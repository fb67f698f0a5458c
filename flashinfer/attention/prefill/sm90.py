"""Launches of the Hopper implementation of prefill, which finds K and V by TMA descriptors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from flashinfer.dtypes import ITEMSIZE
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention.params import ADDRESSES, KV_STORAGE
from flashinfer.jit import driver
from flashinfer.jit.loader import Launcher

_PANEL_BYTES = 128  # that the swizzle permutes
_UNBOUNDED = 1 << 31  # of an axis whose bounds the kernel keeps itself
_MAX_MAPS = 256  # addresses a launch remembers: a serving process has a KV cache per layer
_K, _V = (len(families.ROWS) + ADDRESSES.index(name) for name in ("kv.k", "kv.v"))


def bind_launch(launcher: Launcher, grid_size: int, values: Mapping[str, Any], page_size: int) -> Callable[..., None]:
    """A launch with everything but the addresses laid out: called like one of any other implementation. `values`: the
    fields of PrefillParams that stay."""
    constants = launcher.config.constants
    is_paged = constants["kKvStorage"] == KV_STORAGE["paged"]
    box_rows = math.gcd(page_size, int(constants["kBlockN"])) if is_paged else int(constants["kBlockN"])
    num_heads, itemsize = values["num_kv_heads"], ITEMSIZE[str(constants["Kv"])]

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
        row = entry if is_paged else page
        axes = (
            (head_dim * itemsize // 2, 2), (box_rows, row), (num_heads, head),
            (_UNBOUNDED if is_paged else 1, page if is_paged else 0), (_UNBOUNDED, row),
        )  # fmt: skip

        @functools.lru_cache(_MAX_MAPS)
        def map_at(address: int) -> bytes:
            # Elements of 8 bits in pairs. Before the first row: see csrc/attention/sm90/params.h. Of an empty tensor
            # nothing is read.
            start = max(address - box_rows * row, 16)
            return driver.tensor_map_of_16_bit(start, axes, (_PANEL_BYTES // 2, box_rows, 1, 1, 1))

        return map_at

    k_map_at, v_map_at = (maps_of(half, int(constants[f"kHeadDim{of}"])) for half, of in (("k", "Qk"), ("v", "Vo")))

    def launch_at(*addresses: int) -> None:
        launch(k_map_at(addresses[_K]), v_map_at(addresses[_V]), *addresses)

    return launch_at
