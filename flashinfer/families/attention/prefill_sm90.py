# SPDX-License-Identifier: Apache-2.0
"""What the Hopper implementation of prefill computes, and its tile table."""

from __future__ import annotations

from typing import NamedTuple, Union

from flashinfer.dtypes import ITEMSIZE
from flashinfer.families.attention.params import MASKS_OF_BITS
from flashinfer.families.attention.variants import cxx
from flashinfer.jit.spec import Config, Constants, KernelSpec, Launch

# TMA brings boxes of a page's entries. Of a smaller page, or one that is no multiple, they would be too small: all
# warps of the producers then copy 16 bytes a lane. 4 x 4096 / 1 x 16384 of page size 1: 526 / 576 TFLOP/s, FA3 549 /
# 615; with twice the instructions a copy 434 / 460.
MIN_BOX_ROWS = 8
_PANEL_BYTES = 128  # of a row of a tile
_SM_BYTES = 228 << 10  # of shared memory, of which each block takes 1024 besides its own
# Of functions of scores and masks, on each of the 64 scores of a thread. 12 and 20 spill nothing but 16 bytes in one
# case, 90 spill 480 and compile for 12 seconds, where the kernel for every GPU takes 3 and spills none.
MOST_OPERATIONS = 40


class Tile(NamedTuple):
    """Rows of queries, 64 a consumer warpgroup, and of KV; stages of KV, and of queries; blocks an SM is to hold."""

    block_m: int
    block_n: int
    num_stages: int
    num_query_stages: int
    blocks_per_sm: int = 1


# By head_dim of keys and values. TFLOP/s on an H200, 32 query heads on 8 (head_dim 256: 16 on 4; 192: 128), in one run,
# causal, 4 x 4096 / 1 x 16384.
TILES = {
    # 472 / 534, FA3 443 / 505; 192 x 192, of three consumers that cannot overlap their own work, 436 / 504.
    (64, 64): Tile(192, 128, 2, 2),
    # 599 / 641, 16 x 1024: 405. 128 x 176 and 128 x 160, in another run before tiles went by the maximum of those
    # before: 533 and 535, where this tile made 569.
    (128, 128): Tile(128, 128, 2, 2),
    # 595, FA3 572; with one warp for queries 586. 192 x 96 in another run: 506, where this tile made 538.
    (192, 128): Tile(128, 128, 2, 1),
    # 631, FA3 622; with one warp for queries 620. 128 x 64, in another run: 498, where this tile made 522. Until
    # queries were released early, in two runs: 581 and 600 / 676 and 684, since then 612 and 616 / 680 and 691.
    (256, 256): Tile(128, 80, 2, 1),
}
# At least LONG_ROWS query rows a request: units of a larger tile are fewer, and read KV from the L2 cache less often
# (`has_long_tile`; others have the tile above). For 80 keys three consumers have registers to overlap their own work.
LONG_TILES = {
    # 624 / 700, the tile above 599 / 641, FA3 565 / 627; 192 x 128, of consumers that only overlap with each other,
    # - / 652. 16 x 1024: 452, the tile above 425. Of page size 1 559, the tile above 539, FA3 536. 192 on 128, three
    # stages: 585, the tile above 592.
    (128, 128): Tile(192, 80, 2, 2),
}
# Where more happens to a score than a causal mask or a window, or KV are gathered, which takes registers: three
# consumers of tiles of 128 keys have not got them, nor two beside 256 dimensions.
SMALLER_TILES = {(64, 64): Tile(128, 128, 2, 2)}
# A mask with holes and besides it gathered rows, of which 80 keys spill 60 bytes, or a window or ALiBi, up to 20, or a
# gap, 88.
SMALLEST_TILES = {(256, 256): Tile(128, 64, 2, 1)}
# At most 64 query rows a request, which wait for memory. Microseconds of 64 x 16 on 4096, pages of 16, 32 query heads
# on 8 (head_dim 256: 16 on 4; 192: 8 x 32, 128 heads). One block an SM has fewer partial results to merge than two.
SHORT_TILES = {
    # 138, FA3 160, the kernel for every GPU 204 to 218. One block, 64 x 128, 6 stages: 140 to 152, but 16 x 16 on 1024
    # 12.4, where this tile takes 16.5 and FA3 17.2.
    (64, 64): Tile(64, 128, 3, 1, 2),
    # 257, 64 x 4 251, 1 x 16 on 131072 144; FA3 267, 257, 140; the kernel for every GPU 268 to 341, 252 to 257, 169 to
    # 222. Two blocks, 64 x 64: 257, 252, 161. 64 x 64, 6 stages: 261, 255, 147. By TMA 266 and 263 at best, 165; by TMA
    # with the tile for long queries 276 to 285, 265 to 272, 154.
    (128, 128): Tile(64, 128, 3, 2, 1),
    # 618, FA3 736 to 758, the kernel for every GPU 646. One block, 64 x 64, 4 stages: 624.
    (192, 128): Tile(64, 64, 2, 1, 2),
    # 257, FA3 277, the kernel for every GPU 333.
    (256, 256): Tile(64, 64, 3, 1, 1),
}

# The same rows over KV that other requests read as well (`shared`), as under masks of blocks: they come from the L2
# cache, few KV heads at a time, and one consumer an SM has nothing to do beside its own softmax. TFLOP/s of blocks of
# 16 x 16, 32 query heads on 8 / of 64 x 64, 32 on 32: 468 / 470, all heads at a time 454 / 338; 64 x 64, 3 stages, 420
# / 398; gathered 305 / 282; the tile above 338 / 303.
SHARED_TILES = {
    (128, 128): Tile(64, 96, 2, 1, 2),
}

# fp8 (e4m3) of q, k and v: values are transposed on the way (csrc/attention/sm90/transpose.cuh). Of a KV tile the
# tensor cores sum as much as its 128 keys: longer ones lose more (TileWalk::step_of_8_bits).
FP8_TILES = {
    # Pages of 16: 465 / 506, bf16 451 / 528.
    (64, 64): Tile(192, 128, 2, 2),
    # 707 to 714 / 788 to 801, of pages of 16 707 / 787; FA3 582 / 667, 544 / 600. 128 x 128: 636 / 696; 128 x 192:
    # 670 / 733; 128 x 256: 693 / 777; 192 x 96: 690 / 751; one stage of queries and four of KV: 678 / 793. With
    # everything summed by the tensor cores 805 / 897, and 26% of the mean of 16384 keys lost.
    (128, 128): Tile(192, 128, 2, 2),
    # 832 / -, bf16 682 / -.
    (192, 128): Tile(192, 128, 2, 2),
    # 787 / 880, FA3 355 / 384.
    (256, 256): Tile(128, 128, 2, 1),
}
# Of pages of 1, by the gather before 4fdadd9, (128, 128) made 618 / 670, bf16 470 / 511.
SMALLER_FP8_TILES = {
    (64, 64): Tile(128, 128, 2, 2),
    (128, 128): Tile(128, 128, 2, 2),
    (192, 128): Tile(128, 128, 2, 2),
    (256, 256): Tile(128, 96, 2, 1),  # whose quarters are too short to be gathered and transposed
}


# 16-bit queries over fp8 KV, which are widened to fp16 on the way (csrc/attention/sm90/widen.cuh). Pages of 16.
WIDENING_TILES = {
    # 371 / 423; 128 x 128, with two stages or four, 341 / 385 (the kernel for every GPU 135 / -). bf16 KV 451 / 528.
    (64, 64): Tile(128, 192, 2, 2),
    # 496 / 556, 8 x 512 on 8192: 532; by the kernel for every GPU 170 / 179, 173. Three stages of values and one of
    # queries 483 / 548, of 128 x 96 440 / 484. Widened to bf16: 418 / 460; by two warps instead of four: 379 to 413 /
    # 395 to 439. Without the work of widening 592 / 686; bf16 KV 639 / 706. Pages of 1: 461 / 511, by the kernel for
    # every GPU 169 / -, bf16 KV 470 / 511.
    (128, 128): Tile(128, 128, 2, 2),
    # 554 / -, by the kernel for every GPU 190 / -.
    (256, 256): Tile(128, 64, 2, 1),
}


# The same for short queries, microseconds of 64 x 16 on 4096, 64 x 4 on 4096, 1 x 16 on 131072 and 16 x 16 on 1024, as
# above, pages of 16. 8-bit KV come in boxes where pages allow: a row by cp.async is half as many granules.
SHORT_FP8_TILES = {
    # 126. Gathered 134, the tile for long queries 206, the kernel for every GPU 217.
    (64, 64): Tile(64, 128, 3, 1, 1),
    # 151, 149, 93, 14; gathered 159, 158, 98, 14. Two blocks, 64 x 128, two stages: 145, 144, 96, 22; gathered 141,
    # 137, 96, 23. The tile for long queries 266, 267, 148, 24; the kernel for every GPU 333, 184, 189, 41.
    (128, 128): Tile(64, 128, 4, 2, 1),
    # Not timed.
    (192, 128): Tile(64, 128, 3, 1, 1),
    # 139. Gathered 136, the tile for long queries 163, the kernel for every GPU 273.
    (256, 256): Tile(64, 128, 2, 1, 1),
}
SHORT_WIDENING_TILES = {
    # 120. Gathered 126, the tile for long queries 186, the kernel for every GPU 264.
    (64, 64): Tile(64, 128, 2, 1, 2),
    # 213, 211, 133, 29; gathered 230, 228, 140, 30. One block, four stages: 301, 300, 166, 23. The tile for long
    # queries 272, 273, 147, 23; the kernel for every GPU 440, 221, 234, 47.
    (128, 128): Tile(64, 64, 2, 1, 2),
    # 211. Gathered 242, the tile for long queries 247, the kernel for every GPU 385.
    (256, 256): Tile(64, 64, 2, 1, 1),
}


def _is_fp8(spec: KernelSpec) -> bool:
    return ITEMSIZE[spec.arg("q_dtype")] == 1


def _widens(spec: KernelSpec) -> bool:
    return ITEMSIZE[spec.arg("kv_dtype")] < ITEMSIZE[spec.arg("q_dtype")]


def _changes_scores(spec: KernelSpec) -> bool:
    """Whether more happens to a score than a causal mask or a window."""
    arg = spec.arg
    has_option = arg("mask") in MASKS_OF_BITS or arg("pos_encoding") != "none" or arg("has_soft_cap") is True
    return has_option or cxx.changes_scores(arg("variant"))


def has_long_tile(spec: KernelSpec) -> bool:
    """Whether long queries have a tile of their own, where there is one that gains."""
    dims, is_quantized = (spec.arg("head_dim_qk"), spec.arg("head_dim_vo")), ITEMSIZE[spec.arg("kv_dtype")] == 1
    variant = spec.arg("variant")
    has_begin = spec.arg("has_window") or cxx.has_begin(variant) or cxx.has_gap(variant)
    return dims in LONG_TILES and not (is_quantized or _changes_scores(spec) or has_begin)


def has_shared_tile(spec: KernelSpec) -> bool:
    """Whether short queries over KV that others read too have a tile of their own: where boxes bring them."""
    dims = spec.arg("head_dim_qk"), spec.arg("head_dim_vo")
    return dims in SHARED_TILES and ITEMSIZE[spec.arg("kv_dtype")] > 1 and bool(spec.arg("large_pages"))


def _tiles(spec: KernelSpec) -> dict[tuple[int, int], Tile]:
    if spec.arg("queries") == "shared":
        return SHARED_TILES
    if spec.arg("queries") == "short":
        return SHORT_FP8_TILES if _is_fp8(spec) else SHORT_WIDENING_TILES if _widens(spec) else SHORT_TILES
    return FP8_TILES if _is_fp8(spec) else WIDENING_TILES if _widens(spec) else TILES


def _tile(spec: KernelSpec) -> Tile:
    dims = spec.arg("head_dim_qk"), spec.arg("head_dim_vo")
    if spec.arg("queries") in ("short", "shared"):
        return _tiles(spec)[dims]
    if spec.arg("queries") == "long" and has_long_tile(spec):
        return LONG_TILES[dims]
    has_holes = spec.arg("mask") in MASKS_OF_BITS or cxx.has_holes(spec.arg("variant"))
    has_gap = cxx.has_gap(spec.arg("variant"))
    has_more = gathers(spec) or spec.arg("has_window") or spec.arg("pos_encoding") != "none" or has_gap
    if has_holes and has_more and _tiles(spec) is TILES and dims in SMALLEST_TILES:
        return SMALLEST_TILES[dims]
    tiles, smaller = _tiles(spec), SMALLER_FP8_TILES if _is_fp8(spec) else SMALLER_TILES
    needs_registers = _changes_scores(spec) or gathers(spec)
    return smaller.get(dims, tiles[dims]) if needs_registers else tiles[dims]


def gathers(spec: KernelSpec) -> bool:
    """Whether rows of KV come one by one and not in boxes (csrc/attention/sm90/gather.cuh)."""
    has_small_pages = spec.arg("kv_storage") == "paged" and not spec.arg("large_pages")
    return has_small_pages or (spec.arg("queries") == "short" and ITEMSIZE[spec.arg("kv_dtype")] > 1)


def _spills(spec: KernelSpec) -> bool:
    """Whether there are no registers for it: everything at once, of rows of 256 that are gathered and widened."""
    arg, is_largest = spec.arg, (spec.arg("head_dim_qk"), spec.arg("queries")) == (256, "medium")
    has_all = arg("mask") in MASKS_OF_BITS and arg("pos_encoding") == "alibi" and arg("has_soft_cap")
    return bool(is_largest and has_all and _widens(spec) and gathers(spec))


def serves(spec: KernelSpec) -> bool:
    arg = spec.arg
    return (
        (arg("q_dtype") == arg("kv_dtype") or _widens(spec))
        and (arg("head_dim_qk"), arg("head_dim_vo")) in _tiles(spec)
        and arg("pos_encoding") != "rope"
        and not _spills(spec)
        and cxx.num_operations(arg("variant")) <= MOST_OPERATIONS
        and not (_is_fp8(spec) and gathers(spec) and arg("head_dim_qk") == 256 and arg("queries") != "short")
    )


def _proofs(variant: str, bytes_left: int) -> tuple[int, int]:
    """Bytes of sm90::Proofs, and in how many places it remembers what each look at entries found, where there is room:
    of 65,536 keys of a request, each place 128 of them."""
    num_looks = cxx.num_looks_by_keys(variant)
    num_places = 512 if num_looks > 0 else 0
    while num_places > 0 and 16 * num_looks * num_places > bytes_left - 536:
        num_places //= 2
    num_places = num_places if num_places >= 32 else 0  # those that a warp looks for at once
    return 536 + 16 * max(num_looks, 1) * max(num_places, 1), num_places


def config(spec: KernelSpec, constants: Constants) -> Config:
    """`constants`: what the compiler is told of the spec for every GPU."""
    dim_qk, dim_vo = spec.arg("head_dim_qk"), spec.arg("head_dim_vo")
    tile = _tile(spec)
    tile_constants: dict[str, Union[int, bool]] = {
        "kBlockM": tile.block_m,
        "kBlockN": tile.block_n,
        "kNumStages": tile.num_stages,
        "kNumQueryStages": tile.num_query_stages,
        "kGathersKv": gathers(spec),
        "kSharesKv": spec.arg("queries") == "shared",
        "kIsMixed": spec.arg("mixed"),
    }
    # sm90::Smem: the tiles, and what is small.
    size = ITEMSIZE[spec.arg("q_dtype")]
    row_qk, row_vo = (-(-dim * size // _PANEL_BYTES) * _PANEL_BYTES for dim in (dim_qk, dim_vo))
    smem_bytes = tile.num_query_stages * tile.block_m * row_qk
    small_bytes = 448 + 8 * tile.block_n * gathers(spec)  # and addresses of rows
    smem_bytes += tile.num_stages * tile.block_n * (row_qk + row_vo)
    if _is_fp8(spec):  # transposed, in panels of 128 keys
        smem_bytes += tile.num_stages * -(-tile.block_n // 128) * 128 * dim_vo
    if _widens(spec):  # as they come in
        smem_bytes += tile.block_n * (dim_qk + dim_vo)
    if cxx.proves_tiles(spec.arg("variant")):
        bytes_left = _SM_BYTES // tile.blocks_per_sm - 1024 - smem_bytes - small_bytes
        proofs_bytes, tile_constants["kNumRemembered"] = _proofs(spec.arg("variant"), bytes_left)
        small_bytes += proofs_bytes
    smem_bytes += -(-small_bytes // 1024) * 1024
    launch = Launch((tile.block_m // 64 + 1) * 128, tile.blocks_per_sm, smem_bytes)
    return Config({**constants, **tile_constants}, launch)
