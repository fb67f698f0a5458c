# SPDX-License-Identifier: Apache-2.0
"""Products of segments of rows with weights, and what makes their rows 8 bits wide."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.layout import DTYPES, I32, I64, P
from flashinfer.jit.spec import (
    ArgValue,
    Config,
    Constants,
    CxxType,
    Family,
    Implementation,
    KernelSpec,
    Launch,
    register,
    twins,
)

SCALE_BLOCK = 128  # kScaleBlock in csrc/gemm/params.h
ADDRESSES = ("a", "b", "a_scale", "b_scale", "indptr", "weight_indices", "output")
_STRIDES = (
    "a_row_stride", "b_weight_stride", "b_row_stride", "output_row_stride", "a_scale_row_stride",
    "a_scale_block_stride", "b_scale_weight_stride", "b_scale_row_stride", "b_scale_block_stride",
)  # fmt: skip
_COUNTS = (
    "num_rows", "num_columns", "depth", "num_groups", "num_weights", "has_long_indptr", "has_long_indices", "reserved",
)  # fmt: skip


class GroupGemmParams(ctypes.Structure):
    """Mirror of csrc/gemm/params.h."""

    _fields_ = [
        *[(name, P) for name in ADDRESSES],
        *[(name, I64) for name in _STRIDES],
        *[(name, I32) for name in _COUNTS],
    ]


class Sm90GroupGemmParams(ctypes.Structure):
    """Mirror of csrc/gemm/sm90/params.h. Descriptors hold the addresses of what they describe."""

    _fields_ = [
        ("a_map", ctypes.c_uint8 * 128),
        ("b_map", ctypes.c_uint8 * 128),
        ("output_map", ctypes.c_uint8 * 128),
        ("a_scale_map", ctypes.c_uint8 * 128),
        *GroupGemmParams._fields_,
        ("a_box_rows", I32),
        ("has_a_scale_map", I32),
        ("padding", ctypes.c_uint8 * 24),
    ]


class QuantizeGroupsParams(ctypes.Structure):
    """Mirror of csrc/gemm/params.h."""

    _fields_ = [
        *[(name, P) for name in ("input", "output", "scale")],
        ("input_row_stride", I64),
        ("num_rows", I32),
        ("num_columns", I32),
    ]


class Tile(NamedTuple):
    """Rows and columns of the output that a block computes at a time, warps along the rows, stages, blocks an SM."""

    block_m: int
    block_n: int
    warps_m: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int


TILES = {
    "m16": Tile(16, 128, 1, 4, 4, 1),
    "m64": Tile(64, 128, 2, 8, 3, 1),
    "m128": Tile(128, 128, 2, 8, 3, 1),
}
SCALED_TILES = ("m16", "m64")  # of two sets of sums: there are no registers for those of the largest
CPU_TILE = "m128"  # of which the CPU makes nothing


class Sm90Tile(NamedTuple):
    """The same on Hopper. Of a cluster, `shares` blocks side by side multiply the same rows, each of which one of them
    brings in; `splits` divide the depth."""

    block_m: int
    block_n: int
    num_stages: int
    shares: int = 1
    splits: int = 1
    blocks_per_sm: int = 1


# fp8 with scales. Microseconds of so many rows by a weight [num_columns, depth].
SM90_SCALED_TILES = {
    # 16, 64 and 128 x 2112 x 7168 with two splits: 10.5, 9.9, 10.4; with one 14.4, 14.7, 14.9. Of 64 rows, four splits
    # 9.2, eight 11.5: the exchange takes longer, and no block of the next kernel starts beside them.
    "m64n64k1": Sm90Tile(64, 64, 6, blocks_per_sm=2),
    "m64n64k2": Sm90Tile(64, 64, 6, splits=2, blocks_per_sm=2),
    # 16, 64 and 128 x 4096 x 7168 with two splits: 12.9, 12.5, 14.8; of 64 columns 15.3, 12.3, 15.1. 16 and 128 x 24576
    # x 1536 with one: 14.2, 16.4; of 64 columns 18.6, 17.9. With weights brought into the L2 cache 12 steps ahead, all
    # of these take a fifth to a half longer.
    "m64n128k1": Sm90Tile(64, 128, 8),
    "m64n128k2": Sm90Tile(64, 128, 8, splits=2),
    # 4096 x 2112 x 7168: 161; 128 x 192 123. 4096 x 4096 x 7168: 221; 256 x 128 205.
    "m128n128": Sm90Tile(128, 128, 5),
    # 4096 x 4096 x 7168: 205, 4096 x 24576 x 1536: 277. With four stages, for which there is room where threads store
    # sums themselves, 222 and 331.
    "m256n128c2": Sm90Tile(256, 128, 3, shares=2),
    # 4096 x 2112 x 7168: 123, as without a cluster.
    "m128n192c2": Sm90Tile(128, 192, 4, shares=2),
}
# 16 bits. Microseconds of 8 segments of 512 rows and of 64 of 16, by weights 4096 x 4096 and 4096 x 2048.
SM90_TILES = {
    # 327 and 261.
    "m64n128": Sm90Tile(64, 128, 4, blocks_per_sm=2),
    # 194 and 270; of 8 of 4096 rows 1580, with four stages and sums stored by threads 1684.
    "m128n256": Sm90Tile(128, 256, 3),
}
# Of a tile of many rows, how long its elements take beside those of the largest.
_SCALED_COSTS = {"m64n128k1": 1.6, "m128n128": 1.08, "m256n128c2": 1.0, "m128n192c2": 1.05}


def _is_scaled(spec: KernelSpec) -> bool:
    return bool(spec.arg("scale_columns"))


def _constants(spec: KernelSpec) -> Constants:
    return {
        "T": CxxType(spec.arg("dtype")),
        "Out": CxxType(spec.arg("out_dtype")),
        "kDepthMajor": spec.arg("depth_major"),
        "kScaleColumns": spec.arg("scale_columns"),
    }


def _require(spec: KernelSpec) -> None:
    """What every implementation asks for."""
    is_fp8 = ITEMSIZE[spec.arg("dtype")] == 1
    if is_fp8 != _is_scaled(spec) or (is_fp8 and not spec.arg("depth_major")):
        raise UnsupportedConfig(f"{spec.name}: expected scales of 8-bit operands alone, whose weights are depth-major")


def _cpu_config(spec: KernelSpec) -> Config:
    _require(spec)
    return Config(_constants(spec))


def _config(spec: KernelSpec) -> Config:
    _require(spec)
    if "fp32" in (spec.arg("dtype"), spec.arg("out_dtype")):
        raise UnsupportedConfig(f"{spec.family}: fp32 is for the CPU; expected fp16 or bf16")
    legal = SCALED_TILES if _is_scaled(spec) else tuple(TILES)
    if spec.arg("tile") not in legal:
        raise UnsupportedConfig(f"{spec.name}: no such tile on {spec.target}; expected {', '.join(legal)}")
    tile = TILES[spec.arg("tile")]
    stage = (tile.block_m + tile.block_n) * 128
    num_stages = min(tile.num_stages, arch(spec.target).smem_per_block // stage)
    of_tile: Constants = {
        "kBlockM": tile.block_m,
        "kBlockN": tile.block_n,
        "kWarpsM": tile.warps_m,
        "kNumStages": num_stages,
    }
    launch = Launch(tile.num_warps * 32, tile.blocks_per_sm, num_stages * stage)
    return Config({**_constants(spec), **of_tile}, launch)


def _sm90_tiles(spec: KernelSpec) -> dict[str, Sm90Tile]:
    if not _is_scaled(spec):
        return SM90_TILES
    return SM90_SCALED_TILES if spec.arg("scale_columns") == SCALE_BLOCK else {}


def _sm90_config(spec: KernelSpec) -> Config:
    _require(spec)
    tile, is_scaled = _sm90_tiles(spec)[spec.arg("tile")], _is_scaled(spec)
    num_consumers = 2 if tile.block_m > 64 else 1
    of_tile: Constants = {
        "kBlockM": tile.block_m,
        "kBlockN": tile.block_n,
        "kNumStages": tile.num_stages,
        "kShares": tile.shares,
        "kSplits": tile.splits,
    }
    # sm90::GemmSmem.
    smem_bytes = tile.num_stages * (tile.block_m + tile.block_n) * 128
    exchanged = (tile.splits - 1) * tile.block_n // tile.splits * 64 * 4
    smem_bytes += tile.block_m * tile.block_n * 2 if tile.splits == 1 else num_consumers * exchanged
    scale_runs = 1 if tile.block_n <= SCALE_BLOCK else tile.block_n // 64
    smem_bytes += (128 + tile.num_stages * ((tile.block_m + scale_runs) * 4 + 8)) * is_scaled
    smem_bytes += tile.num_stages * 16 + 8
    smem_bytes = -(-smem_bytes // 1024) * 1024
    launch = Launch((num_consumers + 1) * 128, tile.blocks_per_sm, smem_bytes, tile.shares * tile.splits)
    return Config({**_constants(spec), **of_tile}, launch)


def _sm90_serves(spec: KernelSpec) -> bool:
    return spec.arg("tile") in _sm90_tiles(spec)


GROUP_GEMM = Family(
    name="group_gemm",
    axes={
        "dtype": (*DTYPES, "fp8_e4m3"),
        "out_dtype": DTYPES,
        "depth_major": (False, True),  # weights are [num_columns, depth], not [depth, num_columns]
        "scale_columns": (0, 1, SCALE_BLOCK),  # that have a scale of the weight in common; 0: nothing has scales
        "tile": tuple(dict.fromkeys((*TILES, *SM90_TILES, *SM90_SCALED_TILES))),
    },
    implementations=(
        Implementation("sm_90a", "gemm/sm90/group_gemm.cuh", Sm90GroupGemmParams, _sm90_config, serves=_sm90_serves),
        Implementation("cuda", "gemm/group_gemm.cuh", GroupGemmParams, _config),
        Implementation("cpu", "cpu/gemm/group_gemm.h", GroupGemmParams, _cpu_config),
    ),
)


def group_gemm(
    target: str,
    *,
    dtype: str,
    out_dtype: str,
    depth_major: bool,
    scale_columns: int,
    num_rows: int,
    num_groups: int | None,
    num_columns: int,
    depth: int,
    num_sms: int,
) -> KernelSpec:
    """The kernel for a product of such a size. num_groups None: of all rows with one weight."""
    axes: dict[str, ArgValue] = {
        "dtype": dtype,
        "out_dtype": out_dtype,
        "depth_major": depth_major,
        "scale_columns": scale_columns,
    }
    tile = CPU_TILE
    if targets.kind(target) == "cuda":
        rows_of_group = -(-num_rows // (num_groups or 1))
        tile = "m16" if rows_of_group <= 16 else "m64" if rows_of_group <= 64 or scale_columns else "m128"
        if "sm_90a" in targets.candidates(target) and dtype in ("fp16", "bf16"):
            tile = "m64n128" if rows_of_group <= 64 or num_columns <= 128 else "m128n256"
        elif "sm_90a" in targets.candidates(target) and scale_columns == SCALE_BLOCK:
            tile = _sm90_scaled_tile(num_rows, num_groups, num_columns, depth, num_sms)
    return GROUP_GEMM.spec(target, **axes, tile=tile)


def scaled(target: str, out_dtype: str) -> Iterator[KernelSpec]:
    """Those of `group_gemm` for fp8 with scales of blocks, of any size, on a GPU."""
    tiles = SM90_SCALED_TILES if "sm_90a" in targets.candidates(target) else SCALED_TILES
    for tile in tiles:
        yield GROUP_GEMM.spec(
            target, dtype="fp8_e4m3", out_dtype=out_dtype, depth_major=True, scale_columns=SCALE_BLOCK, tile=tile
        )


def _sm90_scaled_tile(num_rows: int, num_groups: int | None, num_columns: int, depth: int, num_sms: int) -> str:
    if num_groups is not None:
        rows_of_group = -(-num_rows // max(1, num_groups))
        return "m64n128k1" if rows_of_group <= 64 else "m128n128" if rows_of_group <= 256 else "m256n128c2"

    def num_tiles(tile: Sm90Tile) -> int:
        return -(-num_rows // tile.block_m) * -(-num_columns // (tile.block_n * tile.shares)) * tile.shares

    if num_rows <= 128:
        # Wide tiles if there are enough to bring weights in, and two splits if all of them run at the same time.
        name = "m64n128" if num_columns > num_sms // 4 * 120 else "m64n64"
        is_split = 2 * num_tiles(SM90_SCALED_TILES[f"{name}k1"]) <= num_sms and depth >= 24 * SCALE_BLOCK
        return f"{name}k{2 if is_split else 1}"

    def cost(name: str) -> float:
        tile = SM90_SCALED_TILES[name]
        return -(-num_tiles(tile) // num_sms) * tile.block_m * tile.block_n * _SCALED_COSTS[name]

    return min(_SCALED_COSTS, key=cost)


def grid(config: Config, num_rows: int, num_groups: int, num_columns: int, num_sms: int) -> int:
    """Blocks of a launch: as many as run at the same time, or of splits of the depth one for each."""
    constants, launch = config.constants, config.launch
    block_m, shares = int(constants["kBlockM"]), int(constants.get("kShares", 1))
    row_tiles = -(-num_rows // block_m) if num_groups == 1 else num_rows // block_m + num_groups
    num_clusters = row_tiles * -(-num_columns // (int(constants["kBlockN"]) * shares))
    if int(constants.get("kSplits", 1)) > 1:
        return num_clusters * launch.cluster_size
    most = num_sms * launch.min_blocks_per_sm // launch.cluster_size
    num_rounds = -(-num_clusters // most)
    return -(-num_clusters // num_rounds) * launch.cluster_size


def _quantize_config(spec: KernelSpec) -> Config:
    return Config({"T": CxxType(spec.arg("dtype"))}, Launch(num_threads=256))


QUANTIZE_GROUPS = Family(
    name="quantize_groups",
    axes={"dtype": DTYPES[:2]},
    implementations=twins(
        QuantizeGroupsParams, _quantize_config, cuda="gemm/quantize_groups.cuh", cpu="cpu/gemm/quantize_groups.h"
    ),
)
register(GROUP_GEMM, QUANTIZE_GROUPS)
