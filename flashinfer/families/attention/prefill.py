# SPDX-License-Identifier: Apache-2.0
"""Prefill attention and its planner: legal axes, tile table."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.attention import prefill_sm90
from flashinfer.families.attention.params import (
    ATTENTION,
    EXTRAS,
    HEAD_DIMS,
    KV_DTYPES,
    KV_INDEX,
    KV_STORAGE,
    MASKS,
    MASKS_OF_BITS,
    POS_ENCODINGS,
    Q_DTYPES,
    QUERIES,
    require_dtypes,
)
from flashinfer.families.attention.variants import NONE, VARIANT_TEXTS
from flashinfer.families.attention.variants.cxx import changes_scores, function_of, has_gap, proves_tiles
from flashinfer.families.layout import DTYPES, F32, FP8_DTYPES, I32, Fields, P, nested
from flashinfer.jit.spec import Config, Constants, CxxType, Family, Implementation, KernelSpec, Launch, register, twins

# sizeof of the structs in csrc/attention/prefill/params.h.
ITEM_BYTES = 48
MAX_ITEMS = 1 << 20  # that a planner sums up in 32 bits
MAX_SPLITS = 1024  # of a query tile: csrc/attention/prefill/params.h
MAX_COUNTERS = 1 << 15  # query tiles times KV heads that may be split
SCHEDULE_BYTES = 256

# Splits that do not depend on the batch: how many a query tile has at most, and what its partial results and their
# merging then take (PartialResults in csrc/attention/prefill/work.cuh).
MAX_FIXED_SPLITS, FIXED_SLOTS, FIXED_COUNTERS = 16, 20, 5

# Query rows of a request (tokens times query heads per KV head) up to which the tile for short queries is faster, and
# from which that for long ones, if there are so many of all requests and KV heads that its units fill the last round of
# blocks well: 10 rounds, on 132 SMs.
SHORT_ROWS, LONG_ROWS = 64, 4096
MANY_ROWS = 1 << 18


def queries_of(num_rows: int, batch_size: int, num_kv_heads: int) -> str:
    """The class, of QUERIES, of a batch of so many query rows of each KV head."""
    if num_rows <= SHORT_ROWS * batch_size:
        return "short"
    is_long = num_rows >= LONG_ROWS * batch_size and num_rows * num_kv_heads >= MANY_ROWS
    return "long" if is_long else "medium"


# What a launch is given besides ADDRESSES, and before them.
ROWS = ("qo_indptr", "mask", "mask_indptr")
SCRATCH: Fields = [(name, P) for name in ("items", "schedule", "counters", "partial_out")]


class PrefillParams(ctypes.Structure):
    """Mirror of csrc/attention/prefill/params.h."""

    _fields_ = [
        *[(name, P) for name in ROWS],
        *ATTENTION,
        *SCRATCH,
        ("partial_lse", P),
        ("qo_len", I32),
        ("num_tokens", I32),
    ]


class Sm90PrefillParams(ctypes.Structure):
    """Mirror of csrc/attention/sm90/params.h. The descriptors of K and V hold their addresses."""

    _fields_ = [
        ("k_map", ctypes.c_uint8 * 128),
        ("v_map", ctypes.c_uint8 * 128),
        *PrefillParams._fields_,
        ("box_rows", I32),
        ("reserved", ctypes.c_uint8 * 4),
    ]


class PrefillPlanParams(ctypes.Structure):
    """Mirror of csrc/attention/prefill/params.h, its nested struct laid out flat."""

    _fields_ = [
        ("qo_indptr", P),
        *nested("kv", KV_INDEX),
        *[(name, P) for name in ("schedule", "items", "tile_indptr", "counters")],
        *[(name, I32) for name in ("batch_size", "qo_len", "num_kv_heads", "group_size", "num_blocks")],
        *[(name, I32) for name in ("max_items", "max_counters", "max_partial_rows", "block_m", "block_n")],
        *[(name, I32) for name in ("mask", "window_left", "fixed_split")],
        *nested("costs", [("of_item", F32), ("of_partial", F32), ("min_split", I32), ("fills_gaps", I32)]),
        ("time_to_read", F32),
        EXTRAS,
    ]


MIN_SHARED_BLOCKS = 114  # an H100's over PCIe; what has fewer SMs (H20) is another balance of tensor cores and memory


def time_to_read(constants: Constants, num_blocks: int) -> float:
    """As of PrefillPlanParams, of a kernel on so many blocks; 0 where the launches are to be one behind the other: on
    few SMs, and where fp8 KV are widened, of which nothing is known."""
    if constants["Q"] != constants["Kv"] or num_blocks < MIN_SHARED_BLOCKS:
        return 0.0
    flops_per_byte = 110 if constants["kHeadDimQk"] == 64 else 140  # of an H200, as fast as both are
    block_m = int(constants["kBlockM"])
    return ITEMSIZE[str(constants["Kv"])] * flops_per_byte / (2 * block_m * num_blocks)


class PlanCosts(NamedTuple):
    """What the planner weighs against the KV tiles of an item, in tiles of time: csrc/attention/prefill/params.h."""

    of_item: float
    of_partial: float
    min_split: int
    fills_gaps: bool = False


COSTS = PlanCosts(1.5, 3.0, 2)


# A tile: query rows, KV rows, threads, stages of KV, blocks an SM is meant to hold. By head_dim, the first that fits.
# Four warps of 32 rows each reuse every K and V fragment twice; eight warps of 16 rows need half the registers. With
# one stage, keys and values take turns (prefill/tile.cuh), which leaves room for twice the KV rows of two stages. How
# much slower the alternatives are, on an H100 at 4 x 4096 causal, and all figures: docs/notes/2026-11-prefill-tiles.md
Tile = tuple[int, int, int, int, int]
_TILES: dict[str, tuple[Tile, ...]] = {
    "small": ((128, 64, 128, 2, 2), (128, 32, 128, 2, 2), (128, 32, 128, 2, 1)),  # head_dim up to 64
    # head_dim 64: two stages 2%, KV tiles of 64 rows 9%. KV tiles of 128 rows fill the registers: masks and position
    # encodings spill, and head_dim 32 loses 13% on sequences of 128.
    "small, plain": ((128, 128, 128, 1, 2), (128, 64, 128, 1, 2), (128, 32, 128, 2, 1)),
    # 96 and 128: two stages 1%, KV tiles of 32 rows 11%, 256 query rows in one block 2%, eight warps 27%.
    "medium": ((128, 64, 128, 1, 2),),
    # Less shared memory an SM than sm_90 has. That of sm_80 would do for the tile above, which spills there.
    "medium, less memory": ((128, 32, 128, 2, 2), (128, 64, 256, 2, 1), (128, 32, 256, 2, 1)),
    # 192 with values of 128: KV tiles of 32 rows 12% in two stages and 15% in one, 64 query rows 46%.
    "wide keys": ((128, 64, 128, 1, 2), (128, 32, 128, 1, 2), (128, 64, 128, 1, 1), (64, 32, 128, 2, 1)),
    # 192, 256: eight warps in one block, two stages 5%.
    "large": ((64, 64, 128, 1, 2), (128, 64, 256, 2, 1), (128, 32, 256, 2, 1), (64, 32, 128, 2, 1), (32, 32, 64, 2, 1)),
    # At most 64 rows a request: appends and speculative verification, which read KV at the speed of memory. One
    # fragment of rows a warp leaves registers, so that two blocks an SM keep more loads in flight.
    "short": ((64, 64, 128, 2, 2), (64, 32, 128, 2, 2), (64, 64, 128, 2, 1), (64, 32, 128, 2, 1), (32, 32, 64, 2, 1)),
    # fp8 KV: unpacking takes the registers that the second fragment of rows would need.
    "fp8": ((128, 64, 256, 3, 1), (128, 64, 256, 2, 1), (128, 32, 256, 2, 1), (64, 32, 128, 2, 1), (32, 32, 64, 2, 1)),
}


def _smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """PrefillSmem in csrc/attention/prefill/tile.cuh."""
    block_m, block_n, num_threads, num_stages, _ = tile
    dim_qk, dim_vo, kv = spec.arg("head_dim_qk"), spec.arg("head_dim_vo"), ITEMSIZE[spec.arg("kv_dtype")]
    size = block_m * dim_qk * 2 + num_stages * block_n * (dim_qk + dim_vo) * kv
    size += block_n * dim_qk * 2 if spec.arg("pos_encoding") == "rope" else 128
    size += block_n * 32 if spec.arg("kv_storage") == "paged" else 32
    variant = spec.arg("variant")
    size += 192 + 8 * has_gap(variant) + num_threads // 32 * (32 if proves_tiles(variant) else 16) + block_m * 4
    return int(-(-size // 128) * 128)


def _is_plain(spec: KernelSpec) -> bool:
    """Whether nothing happens to a score beyond a causal mask or a window: all registers are left to the tile."""
    is_plain = spec.arg("mask") not in MASKS_OF_BITS and spec.arg("pos_encoding") == "none"
    return is_plain and not spec.arg("has_soft_cap") and not changes_scores(spec.arg("variant"))


def _tile(spec: KernelSpec) -> tuple[dict[str, int], Launch]:
    dim_qk, dim_vo = spec.arg("head_dim_qk"), spec.arg("head_dim_vo")
    kind = "small" if dim_qk <= 64 else "medium" if dim_qk <= 128 else "wide keys" if dim_vo <= 128 else "large"
    if dim_qk == 64 and _is_plain(spec):
        kind = "small, plain"
    if ITEMSIZE[spec.arg("kv_dtype")] == 1:
        kind = "fp8"
    if spec.arg("queries") == "short":
        kind = "short"
    per_sm, per_block, _ = arch(spec.target)
    if kind == "medium" and per_sm < 200 << 10:
        kind = "medium, less memory"
    for tile in _TILES[kind]:
        smem, blocks_per_sm = _smem_bytes(spec, tile), tile[4]
        if smem <= per_block and (smem + 1024) * blocks_per_sm <= per_sm:
            break
    else:
        raise UnsupportedConfig(
            f"prefill: head_dim {dim_qk}/{dim_vo} needs {smem} bytes of shared memory on {spec.target}"
        )
    block_m, block_n, num_threads, num_stages, _ = tile
    constants = {"kBlockM": block_m, "kBlockN": block_n, "kNumStages": num_stages}
    return constants, Launch(num_threads, blocks_per_sm, smem)


def _constants(spec: KernelSpec) -> Constants:
    is_cuda = targets.kind(spec.target) == "cuda"
    q_dtype, kv_dtype, o_dtype = spec.arg("q_dtype"), spec.arg("kv_dtype"), spec.arg("o_dtype")
    dims = spec.arg("head_dim_qk"), spec.arg("head_dim_vo")
    if dims[0] != dims[1] and dims != (192, 128):
        raise UnsupportedConfig(
            f"prefill: head_dim_qk {dims[0]} with head_dim_vo {dims[1]}; they are equal or 192 and 128"
        )
    require_dtypes("prefill", q_dtype, kv_dtype, is_cuda)
    if is_cuda and spec.arg("kv_storage") == "paged_lens":
        raise UnsupportedConfig("prefill: lengths of whole requests are read by the planner alone on CUDA; use paged")
    if q_dtype not in FP8_DTYPES and o_dtype != q_dtype:
        raise UnsupportedConfig(f"prefill: q is {q_dtype} and the output {o_dtype}; expected the dtype of q")
    if q_dtype != kv_dtype and kv_dtype not in FP8_DTYPES:
        raise UnsupportedConfig(f"prefill: q is {q_dtype} and KV {kv_dtype}; expected the same dtype, or fp8 KV")
    return {
        "Q": CxxType(q_dtype),
        "Kv": CxxType(kv_dtype),
        "Out": CxxType(o_dtype),
        "kHeadDimQk": dims[0],
        "kHeadDimVo": dims[1],
        "kKvStorage": KV_STORAGE[spec.arg("kv_storage")],
        "kMask": MASKS[spec.arg("mask")],
        "kPosEncoding": POS_ENCODINGS[spec.arg("pos_encoding")],
        "kHasWindow": spec.arg("has_window"),
        "kHasSoftCap": spec.arg("has_soft_cap"),
        "kHasSinks": spec.arg("has_sinks"),
        "kHasDeviceScales": spec.arg("device_scales"),
        **function_of(spec.arg("variant")),
    }


def _config(spec: KernelSpec) -> Config:
    constants = _constants(spec)
    if targets.kind(spec.target) == "cpu":
        return Config(constants)
    tile, launch = _tile(spec)
    return Config({**constants, **tile}, launch)


def _sm90_config(spec: KernelSpec) -> Config:
    return prefill_sm90.config(spec, _constants(spec))


PREFILL = Family(
    name="prefill",
    axes={
        "q_dtype": Q_DTYPES,
        "kv_dtype": KV_DTYPES,
        "o_dtype": DTYPES,
        "head_dim_qk": HEAD_DIMS,
        "head_dim_vo": HEAD_DIMS,
        "kv_storage": tuple(KV_STORAGE),
        "queries": (*QUERIES, "shared"),
        "large_pages": (False, True),
        "mask": tuple(MASKS),
        "pos_encoding": tuple(POS_ENCODINGS),
        "has_window": (False, True),
        "has_soft_cap": (False, True),
        "has_sinks": (False, True),
        "device_scales": (False, True),  # scales of quantized tensors that the host does not know
        "variant": VARIANT_TEXTS,
        "mixed": (False, True),
    },
    optional={"variant": NONE, "mixed": False},
    implementations=(
        Implementation(
            "sm_90a", "attention/sm90/prefill.cuh", Sm90PrefillParams, _sm90_config, serves=prefill_sm90.serves
        ),
        *twins(PrefillParams, _config, cuda="attention/prefill/kernel.cuh", cpu="cpu/attention/prefill.h"),
    ),
)


def prefill(
    target: str,
    *,
    q_dtype: str,
    kv_dtype: str,
    o_dtype: str = "",
    head_dim: int,
    head_dim_vo: int = 0,
    kv_storage: str = "paged",
    queries: str = "medium",
    page_size: int = 1,
    mask: str = "causal",
    pos_encoding: str = "none",
    has_window: bool = False,
    has_soft_cap: bool = False,
    has_sinks: bool = False,
    device_scales: bool = False,
    variant: str = NONE,
    mixed: bool = False,
) -> KernelSpec:
    """Many query rows per request over its KV. `head_dim_vo` 0: the same as head_dim; `o_dtype` "": that of q.

    `queries`, of QUERIES or "shared" (short ones over KV that other requests read as well), picks the tile that is
    fastest for them (`queries_of`), where there are several, `page_size` the kernel that reads pages of that size
    fastest, and `mixed` one that lets decode of the other requests run beside it; the results are the same.
    """
    axes: dict[str, str | int | bool] = {
        "q_dtype": q_dtype,
        "kv_dtype": kv_dtype,
        "o_dtype": o_dtype or q_dtype,
        "head_dim_qk": head_dim,
        "head_dim_vo": head_dim_vo or head_dim,
        "kv_storage": kv_storage,
        "queries": queries if targets.kind(target) == "cuda" else "medium",
        "large_pages": kv_storage == "paged" and page_size % prefill_sm90.MIN_BOX_ROWS == 0,
        "mask": mask,
        "pos_encoding": pos_encoding,
        "has_window": has_window,
        "has_soft_cap": has_soft_cap,
        "has_sinks": has_sinks,
        "device_scales": device_scales,
        "variant": variant,
        "mixed": mixed,
    }
    # What makes no difference to a kernel makes no two kernels.
    spec = PREFILL.spec(target, **axes)
    is_sm90 = PREFILL.implementation(spec).params is Sm90PrefillParams
    if axes["queries"] == "shared" and not (is_sm90 and prefill_sm90.has_shared_tile(spec)):
        axes["queries"] = "short"
        spec = PREFILL.spec(target, **axes)
        is_sm90 = PREFILL.implementation(spec).params is Sm90PrefillParams
    if not is_sm90 or prefill_sm90.gathers(spec):
        axes["large_pages"] = False
    if queries == "long" and not (is_sm90 and prefill_sm90.has_long_tile(spec)):
        axes["queries"] = "medium"
    if not is_sm90 or queries == "short":
        axes["mixed"] = False  # one behind the other, or one launch of all requests
    return PREFILL.spec(target, **axes)


PREFILL_PLAN = Family(
    name="prefill_plan",
    axes={
        "kv_storage": tuple(KV_STORAGE),
        "variant": VARIANT_TEXTS,  # of ranges of keys
        "mixed": (False, True),
    },
    optional={"variant": NONE, "mixed": False},
    implementations=(
        Implementation(
            "cuda",
            "attention/prefill/plan.cuh",
            PrefillPlanParams,
            lambda spec: Config(
                {
                    "kKvStorage": KV_STORAGE[spec.arg("kv_storage")],
                    "kIsMixed": spec.arg("mixed"),
                    **function_of(spec.arg("variant")),
                },
                Launch(num_threads=1024),
            ),
        ),
    ),
)
register(PREFILL, PREFILL_PLAN)
