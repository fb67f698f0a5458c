# SPDX-License-Identifier: Apache-2.0
"""Decode attention and its planner: legal axes, tile table."""

from __future__ import annotations

import ctypes

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.attention.params import (
    ATTENTION,
    EXTRAS,
    HEAD_DIMS,
    KV_DTYPES,
    KV_STORAGE,
    MASKS,
    POS_ENCODINGS,
    Q_DTYPES,
    require_dtypes,
)
from flashinfer.families.attention.variants import NONE, VARIANT_TEXTS
from flashinfer.families.attention.variants.cxx import function_of
from flashinfer.families.layout import DTYPES, I32, P
from flashinfer.jit.spec import Config, CxxMember, CxxType, Family, Implementation, KernelSpec, Launch, register, twins


class DecodeParams(ctypes.Structure):
    """Mirror of csrc/attention/decode/params.h."""

    _fields_ = [
        *ATTENTION,
        *[(name, P) for name in ("chunks", "requests", "empty", "counters", "partial_out", "partial_lse")],
        ("plan_is_settled", I32),
        ("num_tokens", I32),
    ]


class DecodePlanParams(ctypes.Structure):
    """Mirror of csrc/attention/decode/params.h."""

    _fields_ = [
        *[(name, P) for name in ("kv_indptr", "last_page_len", "qo_indptr")],
        *[(name, P) for name in ("chunks", "requests", "empty", "tile_indptr", "counters")],
        *[(name, I32) for name in ("batch_size", "num_chunks", "num_head_blocks", "page_size")],
        *[(name, I32) for name in ("table_len", "tile_len", "window_left")],
        ("has_lengths", I32),
        EXTRAS,
    ]


# --------------------------------------------------------------------------------------------------------------- decode


def _decode_smem_bytes(
    num_warps: int, warp_rows: int, num_stages: int, group_tile: int, dim_qk: int, dim_vo: int, kv: int, q: int
) -> int:
    """DecodeSmem in csrc/attention/decode/tile.cuh."""
    stage = warp_rows * (dim_qk + dim_vo) * kv + group_tile * dim_qk * q
    merge = num_warps * 8 * (dim_vo + 4) * 4 + 2 * num_warps * group_tile * 4 + 8
    return -(-(num_warps * num_stages * stage + merge) // 128) * 128


def _decode_tile(spec: KernelSpec) -> tuple[dict[str, int], Launch]:
    """The first row of the table that fits. Each warp keeps two stages of 4 to 16 KB: 32 to 128 KB in flight per SM.

    More warps beat more stages: rows that are read together then lie closer together in memory. Eight warps are within
    1% of two blocks of four at many long requests, and 11 to 18% ahead at one. docs/notes/2026-11-decode-tiles.md
    """
    dim_qk, dim_vo, group_tile = spec.arg("head_dim_qk"), spec.arg("head_dim_vo"), spec.arg("group_tile")
    kv, q = ITEMSIZE[spec.arg("kv_dtype")], ITEMSIZE[spec.arg("q_dtype")]
    warp_rows = 32 if max(dim_qk, dim_vo) * kv <= 128 else 16
    per_sm, per_block, _ = arch(spec.target)
    # warps, blocks an SM, stages
    for num_warps, blocks_per_sm, num_stages in ((8, 2, 2), (8, 1, 2), (4, 1, 3), (4, 1, 2), (2, 1, 2)):
        smem = _decode_smem_bytes(num_warps, warp_rows, num_stages, group_tile, dim_qk, dim_vo, kv, q)
        if smem <= per_block and (smem + 1024) * blocks_per_sm <= per_sm:
            break
    else:
        raise UnsupportedConfig(
            f"decode: head_dim {dim_qk}/{dim_vo} needs {smem} bytes of shared memory on {spec.target}"
        )
    launch = Launch(32 * num_warps, blocks_per_sm, smem, units_per_block=warp_rows * num_warps)
    return {"kWarpRows": warp_rows, "kNumStages": num_stages}, launch


def _decode_config(spec: KernelSpec) -> Config:
    is_cuda = targets.kind(spec.target) == "cuda"
    q_dtype, kv_dtype = spec.arg("q_dtype"), spec.arg("kv_dtype")
    require_dtypes("decode", q_dtype, kv_dtype, is_cuda)
    if is_cuda and spec.arg("o_dtype") == "fp32":
        raise UnsupportedConfig("decode: fp32 is supported on the CPU alone; use float16 or bfloat16 on CUDA")
    if not is_cuda and (q_dtype == "fp32") != (kv_dtype == "fp32"):
        raise UnsupportedConfig(f"decode: q is {q_dtype} and the KV cache {kv_dtype}; use fp32 for both or neither")
    constants: dict[str, CxxType | CxxMember | int | bool | float] = {
        "Q": CxxType(q_dtype),
        "Kv": CxxType(kv_dtype),
        "O": CxxType(spec.arg("o_dtype")),
        "kHeadDimQk": spec.arg("head_dim_qk"),
        "kHeadDimVo": spec.arg("head_dim_vo"),
        "kKvStorage": KV_STORAGE[spec.arg("kv_storage")],
        "kMask": MASKS["none"],
        "kPosEncoding": POS_ENCODINGS[spec.arg("pos_encoding")],
        "kHasWindow": spec.arg("has_window"),
        "kHasSoftCap": spec.arg("has_soft_cap"),
        "kHasSinks": spec.arg("has_sinks"),
        "kHasDeviceScales": spec.arg("device_scales"),
        "kGroupTile": spec.arg("group_tile"),
        **function_of(spec.arg("variant")),
    }
    if not is_cuda:
        return Config(constants)
    tile, launch = _decode_tile(spec)
    return Config({**constants, **tile, "kIsMixed": spec.arg("mixed")}, launch)


DECODE = Family(
    name="decode",
    axes={
        "q_dtype": Q_DTYPES,
        "kv_dtype": KV_DTYPES,
        "o_dtype": DTYPES,
        "head_dim_qk": HEAD_DIMS,
        "head_dim_vo": HEAD_DIMS,
        "kv_storage": ("single", "paged"),
        "pos_encoding": tuple(POS_ENCODINGS),
        "has_window": (False, True),
        "has_soft_cap": (False, True),
        "has_sinks": (False, True),
        "device_scales": (False, True),  # scales of quantized tensors that the host does not know
        "group_tile": (8, 16),  # query heads that share one pass over the KV
        "variant": VARIANT_TEXTS,
        "mixed": (False, True),
    },
    optional={"variant": NONE, "mixed": False},
    implementations=twins(
        DecodeParams, _decode_config, cuda="attention/decode/kernel.cuh", cpu="cpu/attention/decode.h"
    ),
)


def group_tile(target: str, group_size: int, head_dim: int) -> int:
    """The query heads of one KV head that one block takes. Sixteen do not fit the registers at large head_dim."""
    return 16 if group_size > 8 and head_dim <= 128 and targets.kind(target) == "cuda" else 8


def decode(
    target: str,
    *,
    q_dtype: str,
    kv_dtype: str,
    head_dim: int,
    group_size: int,
    kv_storage: str = "paged",
    o_dtype: str = "",
    head_dim_vo: int = 0,
    pos_encoding: str = "none",
    has_window: bool = False,
    has_soft_cap: bool = False,
    has_sinks: bool = False,
    device_scales: bool = False,
    variant: str = NONE,
    mixed: bool = False,
) -> KernelSpec:
    """One query token per request over its KV. `group_size` is query heads per KV head; `mixed`: of those requests of a
    batch that have one, beside prefill of the others."""
    return DECODE.spec(
        target,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype or q_dtype,
        head_dim_qk=head_dim,
        head_dim_vo=head_dim_vo or head_dim,
        kv_storage=kv_storage,
        pos_encoding=pos_encoding,
        has_window=has_window,
        has_soft_cap=has_soft_cap,
        has_sinks=has_sinks,
        device_scales=device_scales,
        group_tile=group_tile(target, group_size, head_dim),
        variant=variant,
        mixed=mixed,
    )


def decode_tile_len(config: Config) -> int:
    """KV rows of one tile, the unit in which a decode is planned."""
    return config.launch.units_per_block


def decode_num_chunks(resident_blocks: int, num_head_blocks: int, mixed: bool = False) -> int:
    """Chunks that fill the device once with every head block; where that would leave a fifth of it idle, enough
    for several rounds. Of a mixed batch twice: blocks begin as prefill leaves SMs to them."""
    whole = resident_blocks // num_head_blocks
    if mixed and whole > 0:
        return 2 * whole
    if whole * num_head_blocks * 5 >= resident_blocks * 4:
        return whole
    return -(-4 * resident_blocks // num_head_blocks)


DECODE_PLAN = Family(
    name="decode_plan",
    axes={"variant": VARIANT_TEXTS, "mixed": (False, True)},  # variant: of ranges of keys
    optional={"variant": NONE, "mixed": False},
    implementations=(
        Implementation(
            "cuda",
            "attention/decode/plan.cuh",
            DecodePlanParams,
            lambda spec: Config(
                {"kIsMixed": spec.arg("mixed"), **function_of(spec.arg("variant"))}, Launch(num_threads=512)
            ),
        ),
    ),
)
register(DECODE, DECODE_PLAN)
